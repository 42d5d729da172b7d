"Some studies, at sizes at which they only have to run."

import ast
import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, error
from scipy.stats import t

from qr_rlhf.formats import InputError
from qr_rlhf.sources import ENDINGS, read_file, root_path


@pytest.fixture(scope="module")
def ablation(project):
    small = dict(workloads="harmless", seeds="0,1", fewer_seeds=1, n_train=120, n_eval=24)
    project.run("studies/ablation", check=False, n_resamples=10, **small)
    return project.results("ablation")


@pytest.fixture(scope="module")
def means(ablation, project):
    "Mean rewards, a row per recipe, seed and pair."
    rewards = pd.read_parquet(project.folder / "runs" / "ablation" / "harmless/rewards.parquet")
    by = ["model", "seed", "pair", "side"]
    return rewards.groupby(by).reward.mean().unstack("side")


def accuracies(means):
    "Accuracy of each recipe and seed."
    right = (means.chosen > means.rejected) + (means.chosen == means.rejected) / 2
    return right.groupby(["model", "seed"]).mean()


def test_ingredients_follow_from_the_rewards_table(ablation, means):
    accuracy = accuracies(means)
    for recipe, measures in ablation["recipes"]["harmless"].items():
        assert np.isclose(accuracy[recipe].mean(), measures["accuracy"]["value"])
        offsets = []
        for _, part in means.loc[recipe].groupby("seed"):
            pooled = np.concatenate([part.chosen, part.rejected])
            offsets.append(((part.chosen + part.rejected) / 2).var(ddof=0) / pooled.var())
        assert np.isclose(np.mean(offsets), measures["offsets"]["value"])


def test_what_has_fewer_seeds_borrows_how_much_seeds_differ(ablation, means):
    accuracy = accuracies(means)
    one, ten = "one output, label", "ten outputs, label"
    changes = [(one, "one output"), (ten, "ten outputs"), ("ten outputs", "one output")]
    changes += [(ten, one), ("ten outputs, shift", "one output")]
    squares = [(accuracy[after] - accuracy[before]).var() for after, before in changes]
    by_seeds = t.ppf(0.975, len(changes)) * np.mean(squares) ** 0.5
    part = ablation["varied"]["N = 1 for 10"]["accuracy"]
    assert np.isclose(part["value"], accuracy[one][0] - accuracy[ten][0])
    pairs = np.sqrt((part["high"] - part["value"]) ** 2 - by_seeds**2)
    assert 0 < pairs < 0.5


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


def test_which_objective_reports_on_other_worlds_than_it_tunes_on(project):
    small = dict(worlds="5,7", tuned_on="4", weights=0.01, pairs=600, tuning_pairs=300)
    kinds = "spread of response,spread of prompt"
    project.run("studies/objective", check=False, kinds=kinds, n_test=60, epochs=1, **small)
    results = project.results("objective")
    assert set(results["results"]) == {"spread of response", "spread of prompt"}
    for found in results["results"].values():
        assert set(found) == {
            "pool 0.001",
            "no pool",
            "pool within pairs, 0.01",
            "purm",
            "free",
        }
        assert all(len(values) == 2 for model in found.values() for values in model.values())
        assert min(min(model["gap"]) for model in found.values()) > 0
    assert {row["world"] for row in results["tried"]} == {4}
    assert set(results["noise"]) == set(results["known"]) == set(results["results"])
    assert set(results["fixed"]) == {"opposed tastes", "DPL's"}
    assert all(len(found["no pool"]["scale"]) == 2 for found in results["fixed"].values())
    assert min(results["noise"].values()) > 0
    of_prompt, of_response = (
        results["known"][f"spread of {owner}"] for owner in ("prompt", "response")
    )
    assert sum(of_prompt) <= sum(of_response)


def write_ratings(path, known=True, responses=12, people=16):
    "A table of ratings: strict and mild people, good and bad responses."
    rng = np.random.default_rng(0)
    mild = rng.normal(size=people)
    with open(path, "w") as file:
        for quality in np.linspace(-2, 2, responses):
            felt = quality + mild + rng.normal(size=people)
            given = np.digitize(felt, [-0.5, 0.5])
            row = [["No", "Unsure", "Yes"][k] for k in given]
            row = row if known else row[: people - int(rng.integers(4))]
            file.write(json.dumps(dict(prompt="Why?", ratings=row)) + "\n")


KNOWN = dict(votes="200,600", seeds="0,1", precisions="0.3,1", target=0.5, check=False)


def test_known_people_study(project):
    place = project.folder / "ratings"
    place.mkdir()
    write_ratings(place / "all.jsonl")
    write_ratings(place / "some.jsonl", known=False)
    project.run("studies/known_people", ratings="ratings", **KNOWN)
    results = project.results("known_people")
    table = [json.loads(line)["ratings"] for line in (place / "all.jsonl").open()]
    table = np.array([[dict(No=0, Unsure=0.5, Yes=1)[r] for r in row] for row in table])
    assert np.isclose(results["deviations"]["means of people"], table.mean(0).std())
    assert np.isclose(results["deviations"]["means of responses"], table.mean(1).std())
    tied = [(a == b).mean() for i, a in enumerate(table) for b in table[:i]]
    assert np.isclose(results["designs"]["one judge"]["votes that decide"], 1 - np.mean(tied))
    rows = pd.DataFrame(results["rows"])
    assert set(rows.table) == {"all", "some"}
    assert (rows[rows.table == "some"].judges == "separate judges").all()
    at_end = rows[(rows.votes == rows.votes.max()) & (rows.model == "scalar")]
    assert (at_end.means > 0.9).all()
    assert set(rows.model) == {"scalar", "dpl_normal", "purm"}


def code_cells(study):
    cells = json.loads((ROOT / "nbs" / "studies" / f"{study}.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


READERS = "read_ratings read_table check_table find_tables first_with_people".split()


@pytest.fixture(scope="module")
def readers():
    "The functions of the notebook that read tables of ratings."
    known = dict(np=np, InputError=InputError, read_file=read_file, root_path=root_path)
    known |= dict(ENDINGS=ENDINGS, VALUES=dict(No=0, Unsure=0.5, Yes=1))
    for cell in code_cells("known_people"):
        source = "".join(cell["source"])
        if "%config" not in source:
            tree = ast.parse(source)
            tree.body = [node for node in tree.body if getattr(node, "name", None) in READERS]
            exec(compile(tree, "known_people.ipynb", "exec"), known)
    return known


def test_tables_of_ratings(readers, tmp_path):
    write_ratings(tmp_path / "all.jsonl")
    write_ratings(tmp_path / "some.jsonl", known=False)
    tables = readers["find_tables"](tmp_path)
    assert {title: people for title, (_, people) in tables.items()} == dict(
        all=True, some=False
    )
    assert readers["first_with_people"](tables) == "all"
    whole, part = (tables[title][0] for title in ("all", "some"))
    assert whole.shape == part.shape == (12, 16)
    there = ~np.isnan(part)
    assert not there.all() and not np.isnan(whole).any()
    assert there[:, :13].all()
    (tmp_path / "gap.jsonl").write_text('{"ratings": ["No", null, "Yes", "No", "No"]}\n' * 3)
    gap, people = readers["read_table"](tmp_path / "gap.jsonl")
    assert people and np.isnan(gap).sum() == 3


@pytest.mark.parametrize(
    "lines, message",
    [
        (
            '{"ratings": ["No", "Perhaps"]}',
            "line 1: the rating 'Perhaps' is none of No, Unsure",
        ),
        ('{"prompt": "Why?"}', "line 1: there is no list 'ratings'"),
        ('{"ratings": []}', "line 1: there is no list 'ratings'"),
        ('{"ratings": ["No", "No", "No", "No"]}', "holds 1 responses"),
    ],
)
def test_bad_ratings_are_named(readers, tmp_path, lines, message):
    (tmp_path / "bad.jsonl").write_text(lines)
    with pytest.raises(InputError, match=message):
        readers["find_tables"](tmp_path)


def test_known_people_are_needed(readers, project, tmp_path):
    write_ratings(tmp_path / "some.jsonl", known=False)
    with pytest.raises(InputError, match="nobody knows who gave which"):
        readers["first_with_people"](readers["find_tables"](tmp_path))
    with pytest.raises(InputError, match="holds no file of ratings"):
        readers["find_tables"](tmp_path / "nothing.jsonl")
    assert "-p ratings" in error(project.papermill("studies/known_people"))


def test_bounds_study(demo):
    small = dict(seeds="10,11", pairs="300,600", n_test=200, epochs=2, check=False)
    demo.run("studies/bounds", run="harmless", **small)
    results = demo.results("bounds")
    rows = pd.DataFrame(results["rows"])
    assert len(rows) == 2 * 2 * 6
    assert rows.width.gt(0).all() and rows.people.between(0, 1).all()
    unknown = rows.groupby("method").log_odds.apply(lambda held: held.isna().all())
    assert unknown.to_dict() == {
        "dpl_normal": True,
        "distributional": True,
        "ensemble": False,
        "laplace": False,
        "laplace, purm": False,
        "purm": True,
    }
    assert (rows.confident_true + rows.confident_false <= 1).all()
    assert set(results["run"]) == {"laplace"}  # this run has one seed
    trained = demo.results("harmless")["models"]["scalar"]["accuracy"]
    assert abs(results["run"]["laplace"]["accuracy"] - trained) < 1e-6


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


def test_what_text_teaches_by_votes_and_ratings(project):
    small = dict(n_prompts=30, n_dialogues=60, n_eval=24, epochs=1, seeds="3,4", few=1)
    project.run("studies/collect_text", check=False, shares=0.5, **small)
    results = project.results("collect_text")
    models, folder = results["models"], project.folder / "runs" / "collect_text"
    rated, scalar = models["ratings"]["held"], models["ratings"]["scalar"]
    assert scalar["spread"] == [0, 0]
    assert set(results["curve"]) == {"240", "480"}
    assert results["curve"]["480"] == rated["spread"][:1]
    difference = np.mean(rated["accuracy"]) - np.mean(scalar["accuracy"])
    assert np.isclose(results["accuracy_minus_scalar"]["value"], difference)
    scales = {
        recipe: json.loads((folder / f"{recipe}-held-3-1" / "config.json").read_text())
        for recipe in ("ratings", "half-votes-half-ratings", "votes-one-judge")
    }
    assert len(scales["ratings"]["rating_thresholds"]) == 9
    assert scales["ratings"]["rating_noise"] == 1
    assert scales["ratings"]["rating_effect"] != 1
    assert scales["half-votes-half-ratings"]["rating_noise"] != 1
    assert not scales["votes-one-judge"].get("rating_thresholds")
    control = json.loads((folder / "ratings-held-no-effect-3-1" / "config.json").read_text())
    assert control["rating_effect"] is None
    for figure in ("recipes", "ranges", "curve"):
        assert (folder / f"{figure}.png").stat().st_size > 1000


def test_scale_chooses_its_remedy_on_other_worlds_than_it_reports_on(project):
    small = dict(worlds="5,7", tuned_on="4", pairs=600, n_test=60, epochs=1)
    kinds = "spread of response,spread of prompt"
    project.run("studies/scale", check=False, kinds=kinds, **small)
    results = project.results("scale")
    tried = pd.DataFrame(results["tried"])
    assert set(tried.world) == {4} and set(tried.kind) == set(kinds.split(","))
    gaps = tried.groupby("model").gap.mean().drop("as before")
    assert gaps[results["chosen"]] <= gaps.min() + 1
    for kind, models in results["results"].items():
        assert set(models["as before"]) == {"gap", "order", "scale", "slope"} and kind in kinds
        assert set(models["four scalars"]) == {"gap"}
        assert all(len(v) == 2 and min(v) > 0 for m in models.values() for v in [m["gap"]])
    half, slightly_wrong = results["nats"]["spread of response, world 5"]
    assert 0 < slightly_wrong < half
    assert min(results["best"]["spread of response"]) > 1
    again = pd.DataFrame(results["learnt_again"])
    assert len(again) == 4 and (again[["second", "before", "corrected"]] > 0).all(axis=None)
    assert np.allclose(again.corrected, again.before / again.second)
    findings = json.loads((project.folder / "runs/scale/findings.json").read_text())
    assert set(findings["within"]) | {"four scalars"} == set(results["results"][kind])


@pytest.fixture(scope="module")
def throughput(project):
    small = dict(n_layer=1, n_embd=32, n_head=2, vocab_size=400, max_length=128, batch_size=4)
    project.run("studies/throughput", check=False, n_pairs=64, rounds=2, curve_steps=6, **small)
    return project.results("throughput")


def test_sharing_a_prompt_is_the_same_training(throughput):
    assert throughput["largest_difference"] < 1e-6 and throughput["curve_difference"] < 1e-6


def test_sorting_and_sharing_each_save_tokens(throughput):
    tokens = throughput["tokens"]
    assert tokens["needed"] <= tokens["shared"] < tokens["sorted"] < tokens["trl"]
    assert {row["kind"] for row in throughput["rates"]} == {"trl", "sorted", "shared", "bare"}
    assert len(throughput["rates"]) == 4 * 2


def test_an_interval_holds_its_ratio(throughput):
    rates = pd.DataFrame(throughput["rates"]).set_index(["kind", "round"]).rate
    for other, ratio in throughput["ratio"]["float32"].items():
        assert np.isclose((rates["shared"] / rates[other]).mean(), ratio["value"])
        assert ratio["low"] <= ratio["value"] <= ratio["high"]


def test_how_large_the_data_may_be(project):
    project.run("studies/size", check=False, sizes="150,300")
    findings = json.loads((project.folder / "runs" / "size" / "findings.json").read_text())
    assert set(findings["seconds"]) == {"150", "300"} and findings["pairs"] == 300
