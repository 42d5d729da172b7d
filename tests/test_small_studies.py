"The studies of ingredients and of caution, at sizes at which they only have to run."

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


COLLECT = dict(
    worlds="10,11",
    budgets="300",
    votes_there=400,
    added="0,50",
    anchors=200,
    tuning_worlds="0",
    tuning_budget=300,
    rates="0.03",
    decays="0.3",
    n_test=100,
    epochs=1,
)


def test_what_is_collected_costs_what_it_should(project):
    project.run("studies/collect", check=False, rating_cost=2, **COLLECT)
    bought = pd.DataFrame(project.results("collect")["bought"])
    assert set(bought.objective) == {"scalar", "distributional", "means only"}
    assert (bought.votes * bought.ratings > 0)[bought.objective == "means only"].all()
    cost = bought.votes + 2 * bought.ratings
    at_equal_cost = (cost == 300) & (bought.anchors == "true")
    with_ratings = bought.one_judge & bought.votes.eq(400) & bought.categories.eq(5)
    assert (
        at_equal_cost | with_ratings | (bought.anchors != "true") | cost.isin([100, 800])
    ).all()
    mixed = bought[at_equal_cost & (bought.votes > 0) & (bought.ratings > 0)]
    assert (mixed.votes == 2 * mixed.ratings).all() and len(mixed) == 12
    assert set(bought[bought.anchors != "true"].anchors) == {"noisy", "a model's"}
    for what in ("mean_correlation", "spread_correlation", "scale_ratio", "shape", "gap"):
        assert np.isfinite(np.stack(bought[what])).all() and len(bought[what][0]) == 2
    scalar = np.stack(bought[bought.objective == "scalar"].spread_correlation)
    assert (scalar == 0).all() and (np.stack(bought.gap) > 0).all()
