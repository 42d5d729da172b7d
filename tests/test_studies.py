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
MEASURES = {"scalar": {"mean"}, "ensemble": {"mean", "cvar 0.5"}}
MEASURES |= dict.fromkeys(("paper", "distributional"), {"mean"} | PESSIMISTIC)
SOURCES = "generator", "language model"


@pytest.fixture(scope="module")
def results(project):
    done = project.papermill("studies/best_of_n", "runs/best_of_n.ipynb", **TINY)
    assert done.returncode == 0, done.stderr
    return project.results("best_of_n")


def curves(results, source):
    "Each choice's curve, the truth's left out."
    sizes = [of for by in results["workloads"]["harmless"][source].values() for of in by.values()]
    return [curve for measures in sizes for curve in measures.values()]


def test_every_model_is_read_by_every_measure(results):
    assert results["n"] == [1, 2, 4] and list(results["workloads"]) == ["harmless"]
    for source in SOURCES:
        models = results["workloads"]["harmless"][source]
        assert list(models) == list(MEASURES)
        assert set(results["truth"]["harmless"][source]) == {"mean"} | PESSIMISTIC
        for model, sizes in models.items():
            assert list(sizes) == ["100", "200"]
            for measures in sizes.values():
                assert set(measures) == {
                    "scalar": {"mean"},
                    "ensemble": {"mean", "cvar 0.5"},
                }.get(model, {"mean", *pessimistic})
                for first, *_, last in measures.values():
                    assert (
                        first["n"] == 1
                        and first["kl"] == 0
                        and last["n"] == 4
                        and abs(last["kl"] - (math.log(4) - 3 / 4)) < 1e-12
                    )
                    for metric in ("true_mean", "true_tail", "unrecognised"):
                        assert (
                            abs(first[metric]["value"] - pool[metric]) < 1e-9
                        )  # best of 1 is the average over the candidates
                    assert (
                        abs(first["proxy"]["value"]) < 1e-9 < last["proxy"]["value"]
                        and last["proxy"]["low"]
                        <= last["proxy"]["value"]
                        <= last["proxy"]["high"]
                    )
        best = results["truth"]["harmless"][source]["mean"]
        assert (
            best[-1]["true_mean"]["value"]
            >= max(
                m["mean"][-1]["true_mean"]["value"]
                for sizes in models.values()
                for m in sizes.values()
            )
            - 0.05
        )  # nobody beats the truth
    for row in results["pessimistic_minus_mean"]:
        assert len(row["true_mean"]["seeds"]) == 1 and np.isclose(
            row["true_mean"]["seeds"][0], row["true_mean"]["value"]
        )
    assert (
        project.folder / "runs" / "best_of_n" / "best_of_n_harmless.png"
    ).stat().st_size > 1000
