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


def test_what_text_teaches_by_votes_and_ratings(project):
    small = dict(n_prompts=60, n_eval=24, epochs=1, seeds="3,4", shares=0.5)
    project.run("studies/collect_text", check=False, **small)
    results = project.results("collect_text")
    models = results["models"]
    assert set(models) == {
        "votes, one judge",
        "votes, a judge each",
        "half and half",
        "ratings",
    }
    assert set(models["ratings"]) == {"distributional", "scalar"}
    assert all(0 < value < 1 for value in models["ratings"]["scalar"]["accuracy"])
    assert set(results["curve"]) == {"120", "240"}
    whole = models["ratings"]["distributional"]["spread_correlation"]
    assert results["curve"]["240"] == whole and len(whole) == 2
    assert len(results["differences"]["accuracy"]) == 3
    for figure in ("recipes", "ranges", "curve"):
        assert (
            project.folder / "runs" / "collect_text" / f"{figure}.png"
        ).stat().st_size > 1000
