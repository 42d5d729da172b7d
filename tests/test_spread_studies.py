"The two studies on learning spread, at a tiny setting: they write what they promise."

import json

from conftest import ROOT, error
from test_project import read_cells

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
FEATURES = dict(pairs=1200, paper_pairs=900, curve=600, seeds="0,1", epochs=1, n_test=100)
TUNING = dict(worlds="0,1", pairs=400, epochs=1, rates="0.002,0.004", decays=0.2, n_test=100)
TUNING |= dict(beyond=0.008)
TEXT = dict(n_start=100, n_train=100, n_eval=40, seeds="3,4", check=False)


def size(project, path):
    return (project.folder / "runs" / path).stat().st_size


def findings(project, name):
    return json.loads((project.folder / "runs" / name / "findings.json").read_text())


def test_spread_from_features(project):
    project.run("studies/spread_features", check=False, **FEATURES)
    results = project.results("spread_features")
    worlds = results["worlds"]
    assert set(worlds) == {"bimodal", "skewed"}
    assert set(worlds["skewed"]["distributional"]) == {"600", "900", "1200"}
    assert set(worlds["skewed"]["ensemble"]) == {"600", "900", "1200"}
    assert set(worlds["skewed"]["purm"]) == {"1200"}
    readings = [model for model in worlds["skewed"] if model.startswith("paper,")]
    assert len(readings) == 5
    for model in readings:
        found = worlds["skewed"][model]["900"]
        assert min(found["factor"]) > 0 and len(found["spread_by_mean"]) == 2
    found = worlds["bimodal"]["distributional"]["1200"]
    assert all(len(found[measure]) == 2 for measure in MEASURES)
    assert min(found["log_loss_gap"]) > 0
    assert worlds["bimodal"]["scalar"]["1200"]["spread_correlation"] == [0, 0]
    assert all(0.75 < value < 0.85 for value in results["perfect_coverage"].values())
    assert set(results["same_judge"]["correlation"]) == {"A", "B"}
    for figure in ("ranges", "reconstructions", "curve", "identification"):
        assert size(project, f"spread_features/{figure}.png") > 1000
    said = findings(project, "spread_features")
    assert " to " in said["distributional"] and " and " in said["same_judge"]
    assert said["pairs"] == 1200 and said["seeds"] == 2
    assert "bimodal" in said["label_with_link"] and len(said["spread_by_mean"]) == 4


def test_every_objective_is_tuned_alike(project):
    project.run("studies/tuning", check=False, **TUNING)
    results = project.results("tuning")
    said = findings(project, "tuning")
    assert set(results["gaps"]) == set(said["settings"]) == set(said["objectives"])
    assert all(len(gaps) == 2 * 2 for gaps in results["gaps"].values())
    for model, (rate, decay) in said["settings"].items():
        low, high = sum(results["gaps"][model][:2]), sum(results["gaps"][model][2:])
        assert (rate, decay) == (0.002 if low < high else 0.004, 0.2)
        gained = (min(low, high) - sum(results["beyond"][model])) / 2
        assert abs(gained - float(said["gain_beyond"][model])) < 0.06
    assert said["pool"] in (0, 0.0001, 0.001, 0.01)
    assert size(project, "tuning/tuning.png") > 1000


def test_the_study_of_features_trains_with_what_was_tuned():
    cells = [
        "".join(c["source"]) for c in read_cells(ROOT / "nbs/studies/spread_features.ipynb")
    ]
    (table,) = [cell for cell in cells if "\nTUNED = " in cell]
    stated = {}
    exec(table, stated)
    stored = json.loads((ROOT / "nbs/results/tuning.json").read_text())
    assert {model: list(values) for model, values in stated["TUNED"].items()} == stored[
        "settings"
    ]
    assert stated["POOL"] == stored["pool"]


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
