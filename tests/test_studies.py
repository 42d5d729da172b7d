"Best of n at a very small setting: what it writes has the form that it promises."

import json
import math

import numpy as np
import pytest

TINY = dict(
    pairs="100,200",
    seeds=0,
    members=2,
    n_prompts=4,
    n_max=4,
    n_warm_up=200,
    max_new_tokens=24,
    bootstraps=50,
    check=False,
)
PESSIMISTIC = {"quantile 0.1", "cvar 0.2", "mean_spread 0.5", "entropic 1"}
MEASURES = {"scalar": {"mean", "minus length"}, "ensemble": {"mean", "cvar 0.5"}}
MEASURES |= dict.fromkeys(("paper", "distributional"), {"mean"} | PESSIMISTIC)
SOURCES = "generator", "language model"


@pytest.fixture(scope="module")
def results(project):
    done = project.papermill("studies/best_of_n", "runs/best_of_n.ipynb", **TINY)
    assert done.returncode == 0, done.stderr
    return project.results("best_of_n")


def curves(results, source):
    "Each choice's curve, the truth's left out."
    sizes = [
        of for by in results["workloads"]["harmless"][source].values() for of in by.values()
    ]
    return [curve for measures in sizes for curve in measures.values()]


def test_every_model_is_read_by_every_measure(results):
    assert results["n"] == [1, 2, 4] and list(results["workloads"]) == ["harmless"]
    for source in SOURCES:
        models = results["workloads"]["harmless"][source]
        assert list(models) == list(MEASURES)
        assert set(results["truth"]["harmless"][source]) == {"mean"} | PESSIMISTIC
        for model, sizes in models.items():
            assert list(sizes) == ["100", "200"]
            assert all(set(measures) == MEASURES[model] for measures in sizes.values())


@pytest.mark.parametrize("source", SOURCES)
def test_curves_begin_at_the_average_candidate(results, source):
    pool = results["pool"]["harmless"][source]
    for first, *_, last in curves(results, source):
        assert first["n"] == 1 and first["kl"] == 0 and last["n"] == 4
        assert abs(last["kl"] - (math.log(4) - 3 / 4)) < 1e-12
        for metric in ("true_mean", "true_tail", "unrecognised"):
            assert abs(first[metric]["value"] - pool[metric]) < 1e-9
        proxy = last["proxy"]
        assert abs(first["proxy"]["value"]) < 1e-9 < proxy["value"]
        assert proxy["low"] <= proxy["value"] <= proxy["high"]


@pytest.mark.parametrize("source", SOURCES)
def test_nobody_beats_the_truth(results, source):
    best = results["truth"]["harmless"][source]["mean"][-1]["true_mean"]["value"]
    found = [curve[-1]["true_mean"]["value"] for curve in curves(results, source)]
    assert best >= max(found) - 0.05


def test_one_seed_is_its_own_mean(results):
    for row in results["pessimistic_minus_mean"]:
        (only,) = row["true_mean"]["seeds"]
        assert np.isclose(only, row["true_mean"]["value"])


def test_figures_and_findings_are_written(results, project):
    folder = project.folder / "runs" / "best_of_n"
    for stem in ("best_of_n", "pessimistic_minus_mean"):
        assert (folder / f"{stem}_harmless.png").stat().st_size > 1000
    findings = json.loads((folder / "findings.json").read_text())
    assert {"better", "worse", "comparisons", "generator", "language_model"} < set(findings)
    assert findings["better"] + findings["worse"] <= findings["comparisons"]
    assert findings["seeds"] == 1 and "[" in findings["generator"]


def test_finished_models_are_taken_up(results, project):
    again = project.papermill("studies/best_of_n", "runs/best_of_n.ipynb", **TINY)
    assert again.returncode == 0, again.stderr
    text = (project.folder / "runs" / "best_of_n.ipynb").read_text()
    assert "8 reward models, 8 of them taken up" in text
    now = project.results("best_of_n")
    assert {k: v for k, v in now.items() if k != "seconds"} == {
        k: v for k, v in results.items() if k != "seconds"
    }
