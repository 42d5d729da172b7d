"Ingredients, caution and the demo's values, at sizes at which they only have to run."

import numpy as np
import pandas as pd
import pytest


@pytest.fixture(scope="module")
def ablation(project):
    small = dict(workloads="harmless", seeds="0", varied_seeds="0", n_train=120, n_eval=24)
    project.run("studies/ablation", check=False, n_resamples=10, **small)
    return project.results("ablation")["recipes"]["harmless"]


def test_ingredients_follow_from_the_rewards_table(ablation, project):
    rewards = pd.read_parquet(project.folder / "runs" / "ablation" / "harmless/rewards.parquet")
    means = rewards.groupby(["model", "pair", "side"]).reward.mean().unstack("side")
    for recipe, measures in ablation.items():
        chosen, rejected = means.loc[recipe].chosen, means.loc[recipe].rejected
        right = (chosen > rejected) + (chosen == rejected) / 2
        assert np.isclose(right.mean(), measures["accuracy"]["value"])
        pooled = np.concatenate([chosen, rejected])
        between = ((chosen + rejected) / 2).var(ddof=0) / pooled.var()
        assert np.isclose(between, measures["offsets"]["value"])


def test_one_output_and_ten_are_both_among_the_recipes(ablation, project):
    rewards = pd.read_parquet(project.folder / "runs" / "ablation" / "harmless/rewards.parquet")
    levels = rewards.groupby("model")["level"].nunique()
    assert levels["one output, label"] == 1 and levels["ten outputs, label"] == 10
    assert levels["N = 50"] == 50


def test_the_truth_gains_by_caution_and_bounds_the_models(project):
    small = dict(seeds="0", n_pairs=600, n_sets=200, n="4,16", epochs=1)
    project.run("studies/caution", check=False, **small)
    results = project.results("caution")
    rows = pd.DataFrame(results["rows"])
    most = results["truth"]["separate judges"]["true CVaR"]
    assert most > 1
    at_most = rows[(rows.n == 16) & (rows.world == "separate judges")]
    assert (at_most["true CVaR"] < most).all()


def test_each_model_takes_the_values_with_the_lowest_log_loss(project):
    small = dict(workloads="harmless", seeds="0", n_train=120, n_eval=48)
    project.run("studies/demo_values", check=False, epochs="1", learning_rates="4e-4", **small)
    results = project.results("demo_values")
    rows = pd.DataFrame(results["measures"])
    means = rows.groupby(["model", "trial"]).log_loss_choose.mean()
    assert results["best"] == {m: means[m].idxmin() for m in ("quantile", "scalar")}
    demo, changed = results["trials"][0], results["trials"][1:]
    assert all(sum(trial[k] != demo[k] for k in demo) == 1 for trial in changed)
