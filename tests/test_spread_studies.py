"The two studies on learning spread, at a tiny setting: they write what they promise."

import json

from conftest import error

MEASURES = (
    "log_loss_gap",
    "accuracy",
    "mean_correlation",
    "spread_correlation",
    "partial_spread_correlation",
    "spread_by_mean",
    "scale_ratio",
    "coverage",
    "wasserstein",
    "wasserstein_constant",
    "crossing",
)
FEATURES = dict(pairs=600, curve=300, seeds="0,1", epochs=1, n_test=100, check=False)
TEXT = dict(n_start=100, n_train=100, n_eval=40, seeds="3,4", check=False)


def size(project, path):
    return (project.folder / "runs" / path).stat().st_size


def findings(project, name):
    return json.loads((project.folder / "runs" / name / "findings.json").read_text())


def test_spread_from_features(project):
    project.run("studies/spread_features", "runs/spread_features.ipynb", **FEATURES)
    results = project.results("spread_features")
    worlds = results["worlds"]
    assert set(worlds) == {"bimodal", "skewed"}
    assert set(worlds["skewed"]["distributional"]) == {"300", "600"}
    assert set(worlds["skewed"]["ensemble"]) == {"300", "600"}
    assert set(worlds["skewed"]["purm"]) == {"600"}
    found = worlds["bimodal"]["distributional"]["600"]
    assert all(len(found[measure]) == 2 for measure in MEASURES)
    assert min(found["log_loss_gap"]) > 0
    assert worlds["bimodal"]["scalar"]["600"]["spread_correlation"] == [0, 0]
    assert min(worlds["bimodal"]["paper"]["600"]["temperature"]) > 0
    assert set(results["same_judge"]["correlation"]) == {"A", "B"}
    for figure in ("ranges", "curve", "identification"):
        assert size(project, f"spread_features/{figure}.png") > 1000
    said = findings(project, "spread_features")
    assert " to " in said["distributional"] and " and " in said["same_judge"]
    assert said["pairs"] == 600 and said["seeds"] == 2


def test_spread_from_text(project):
    project.run("studies/spread_text", "runs/spread_text.ipynb", **TEXT)
    models = project.results("spread_text")["models"]
    known = models["means"]
    assert set(models["language model"]) == {"distributional"}
    assert set(known) == {"scalar", "paper", "distributional"}
    for found in known.values():
        assert all(len(found[measure]) == 2 for measure in MEASURES)
    assert known["scalar"]["spread_correlation"] == [0, 0]
    assert min(known["paper"]["temperature"]) > 0
    assert size(project, "spread_text/ranges.png") > 1000
    assert size(project, "spread_text/starts.png") > 1000
    assert findings(project, "spread_text")["votes"] == 20
    once = TEXT | dict(votes=1)
    assert "votes was 20 and is now 1" in error(
        project.papermill("studies/spread_text", **once)
    )
