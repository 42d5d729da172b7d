"The studies on people and on ranges at a tiny setting: what they write and what they refuse."

import ast
import gzip
import json
import shutil
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, error

from qr_rlhf.formats import InputError
from qr_rlhf.sources import root_path

TINY = dict(
    splits=2,
    dims=8,
    vocab_size=300,
    epochs=1,
    learning_rates=0.01,
    weight_decays=2,
    draws=2,
    check=False,
)
WORDS = (
    "bottle water plastic cheap clean habit tax school law people because however never".split()
)


def write_votes(path, debates=8, arguments=8):
    "Pairs of all arguments of each debate, with five votes each, in the layout of UKPConvArg1."
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        for debate in range(debates):
            texts = [" ".join(rng.choice(WORDS, rng.integers(5, 30))) for _ in range(arguments)]
            for i in range(arguments):
                for k in range(i):
                    votes = rng.choice(["a1", "a2", "equal"], 5, p=[0.5, 0.3, 0.2])
                    file.write(json.dumps(ukp_line(debate, texts[i], texts[k], votes)) + "\n")


def ukp_line(debate, first, second, votes):
    return dict(
        title=f"Debate {debate}",
        stance="yes",
        topic=f"debate_{debate}_yes",
        arg1=first,
        arg2=second,
        votes=[dict(value=str(vote)) for vote in votes],
    )


READERS = (
    "read_ukp read_counts text read_line why_useless load_votes find_file read_lines".split()
)


@pytest.fixture(scope="module")
def load_votes():
    "The function of the notebook, with the functions that it calls."
    known = dict(json=json, gzip=gzip, Counter=Counter, pd=pd, root_path=root_path)
    known |= dict(InputError=InputError)
    for cell in json.loads((ROOT / "nbs" / "studies" / "people.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "%config" not in source:
            tree = ast.parse(source)
            tree.body = [node for node in tree.body if getattr(node, "name", None) in READERS]
            exec(compile(tree, "people.ipynb", "exec"), known)
    return known["load_votes"]


PLAIN = dict(prompt="Tea: Yes", topic="Tea", first="Hot.", second="It is warm.")
PLAIN |= dict(votes_first=2, votes_second=1, votes_equal=1)
UKP = dict(title="Tea", stance="Yes", topic="tea_yes", arg1="Hot.", arg2="It is warm.")
UKP |= dict(votes=[dict(value=value) for value in ("a1", "a1", "equal", "a2")])


def test_both_layouts_say_the_same(load_votes, tmp_path):
    (tmp_path / "votes.jsonl").write_text(json.dumps(PLAIN) + "\n" + json.dumps(UKP))
    pairs, dropped = load_votes(tmp_path)
    same = pairs.drop(columns="topic")
    assert same.iloc[0].equals(same.iloc[1]) and dropped == {}
    assert list(pairs.loc[0, ["v1", "v2", "equal"]]) == [2, 1, 1]
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt") as file:
        file.write(json.dumps(PLAIN))
    assert len(load_votes(tmp_path / "packed.jsonl.gz")[0]) == 1
    with pytest.raises(ValueError, match="holds 2 files"):
        load_votes(tmp_path)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: not a line of JSON in UTF-8"),
        ("[]", "line 2: this is no JSON object"),
        (json.dumps(dict(prompt="a")), "neither 'arg1'"),
        (json.dumps(PLAIN | dict(votes_first=-1)), "votes_first, votes_second and votes_equal"),
        (json.dumps(PLAIN | dict(first=None)), "line 2: the field 'first' is missing"),
        (json.dumps(PLAIN | dict(second=3)), "line 2: the field 'second' is no string"),
        (json.dumps(UKP | dict(votes=3)), "the field 'votes' is no list"),
        (json.dumps(UKP | dict(votes=[dict(value="b")])), "line 2: the vote 'b' is none of"),
    ],
)
def test_bad_lines_are_named(load_votes, tmp_path, line, message):
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps(PLAIN) + "\n" + line)
    with pytest.raises(ValueError, match=message):
        load_votes(path)


def test_useless_pairs_are_counted(load_votes, tmp_path):
    useless = [
        PLAIN | dict(second="Hot. "),
        PLAIN | dict(first=" "),
        PLAIN | dict(votes_first=0, votes_second=0, votes_equal=0),
    ]
    path = tmp_path / "votes.jsonl"
    path.write_text("\n".join(map(json.dumps, [PLAIN, *useless])))
    pairs, dropped = load_votes(path)
    assert len(pairs) == 1
    assert dropped == {"both sides equal": 1, "empty": 1, "no votes": 1}
    path.write_text(json.dumps(useless[0]))
    with pytest.raises(ValueError, match="holds no pair with votes"):
        load_votes(path)
    with pytest.raises(ValueError, match="can't be read"):
        load_votes(tmp_path / "nothing.jsonl")


def test_people_study_asks_for_votes(project):
    assert "-p votes" in error(project.papermill("studies/people"))


def test_people_study_needs_debates(project):
    write_votes(project.folder / "few.jsonl", debates=3)
    refused = error(project.papermill("studies/people", votes="few.jsonl", **TINY))
    assert "there are 3 topics; at least 4 are needed" in refused


def test_people_study(project):
    write_votes(project.folder / "votes.jsonl")
    done = project.papermill("studies/people", votes="votes.jsonl", **TINY)
    assert done.returncode == 0, done.stderr
    results = project.results("people")
    assert results["pairs"] == 8 * 28 and results["debates"] == 8
    hands = results["test_debates"]
    assert len(hands) == 2 and all(len(hand) == 2 for hand in hands)
    assert not set(hands[0]) & set(hands[1])  # no debate is tested twice before all are once
    models = {"length", "scalar", "ensemble", "paper", "distributional", "free", "purm"}
    models |= {"dpl_normal", "dpl_categorical"}
    for source in ("single votes", "vote shares"):
        assert set(results["quality"][source]) == models
        for m in models:
            part = results["quality"][source][m]["log-loss"]
            assert 0.3 < part["value"] < 2 and part["low"] < part["value"] < part["high"]
            assert abs(results["disagreement"][source][m]["closeness"]["value"]) < 1
    for row in results["promises"]:
        assert 0 <= row["covered"] <= 1 and 0 <= row["undecided"] <= 1
    folder = project.folder / "runs" / "people"
    findings = json.loads((folder / "findings.json").read_text())
    found = "pairs splits margin length distributional paper better".split()
    assert set(findings) == set(found)
    for figure in ("calibration", "disagreement", "beyond", "promise"):
        assert (folder / f"{figure}.png").stat().st_size > 1000


def test_ranges_study(demo):
    small = dict(runs="harmless", alphas=0.2, n_resamples=20, n_splits=20, check=False)
    done = demo.papermill("studies/ranges", **small)
    assert done.returncode == 0, done.stderr
    results = demo.results("ranges")
    trained = demo.results("harmless")["models"]["quantile"]["accuracy"]
    mean = results["accuracy"]["harmless, quantile"]["accuracy of the mean"]
    assert abs(mean["value"] - trained) < 1e-4
    assert len(results["levels"]["harmless"]) == 11  # ten levels and CVaR
    best = results["best_level"]["harmless"]
    assert 0 < best["level"] < 1 and -1 < best["other half"]["value"] < 1
    kept = results["promises"]["harmless"]["80 %, kept, scalar model"]
    assert 0.7 < kept["value"] <= 1
    folder = demo.folder / "runs" / "ranges"
    findings = json.loads((folder / "findings.json").read_text())
    assert set(findings) == {"best_level", "disagree"}
    assert set(findings["disagree"]) == {"harmless"}
    for figure in ("levels", "fan", "certainty"):
        assert (folder / f"{figure}.png").stat().st_size > 1000


def test_ranges_study_refuses_other_texts(demo):
    runs = demo.folder / "runs"
    shutil.copytree(runs / "harmless", runs / "harmless-changed")
    settings = json.loads((runs / "harmless-changed" / "settings.json").read_text())
    changed = json.dumps(settings | dict(n_train=settings["n_train"] - 1))
    (runs / "harmless-changed" / "settings.json").write_text(changed)
    refused = error(demo.papermill("studies/ranges", runs="harmless-changed"))
    assert "not the ones that this run scored" in refused
    assert "papermill nbs/run.ipynb" in error(demo.papermill("studies/ranges", runs="missing"))
