"Tests of the study on calibration that stood in test_run.py: for whoever owns test_studies.py."

from conftest import error


def test_calibration_study(project):
    done = project.papermill(
        "studies/calibration",
        "runs/calibration.ipynb",
        pairs=600,
        curve=300,
        seeds="0,1",
        epochs=1,
        n_test=100,
    )
    assert done.returncode == 0, done.stderr
    worlds = project.results("calibration")["worlds"]
    assert (
        set(worlds) == {"bimodal", "skewed"}
        and set(worlds["skewed"]["distributional"]) == {"300", "600"}
        and set(worlds["skewed"]["PURM"]) == {"600"}
    )
    found = worlds["bimodal"]["distributional"]["600"]
    assert (
        all(
            len(found[k]) == 2
            for k in (
                "nll_gap",
                "spread_correlation",
                "partial_spread_correlation",
                "scale_ratio",
                "coverage",
                "wasserstein",
            )
        )
        and min(found["nll_gap"]) > 0
    )
    assert (
        project.folder / "runs" / "calibration" / "identification.png"
    ).stat().st_size > 1000
    assert "-p votes" in error(project.papermill("studies/annotators"))


def test_calibration_study_on_text(project):
    done = project.papermill(
        "studies/calibration",
        "runs/calibration-text.ipynb",
        level="text",
        n_start=100,
        n_train=100,
        n_eval=40,
        text_seeds="3,4",
    )
    assert done.returncode == 0, done.stderr
    worlds = project.results("calibration-text")["worlds"]
    known = worlds["harmless, from the means"]
    assert set(worlds["harmless, from the language model"]) == {"distributional"} and set(
        known
    ) == {"scalar", "label QR", "distributional"}
    assert all(
        len(m["100"]["accuracy_on_votes"]) == len(m["100"]["spread_correlation"]) == 2
        for m in known.values()
    ) and known["scalar"]["100"]["spread_correlation"] == [0, 0]
    assert (
        min(known["label QR"]["100"]["temperature"]) > 0
        and (project.folder / "runs" / "calibration-text" / "text.png").stat().st_size > 1000
    )
    assert "votes was 20 and is now 1" in error(
        project.papermill(
            "studies/calibration",
            level="text",
            n_start=100,
            n_train=100,
            n_eval=40,
            text_seeds="3,4",
            votes=1,
        )
    )
