"Rows with several responses, votes, rankings and ratings: read, counted, trained on."

import json
import re

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from test_damage import QUESTIONS, examples, places, values, words
from test_formats import reply, write
from test_model import refusal
from transformers import AutoConfig

from qr_rlhf import load, train
from qr_rlhf.analysis import evaluate, half_samples
from qr_rlhf.backbones import load_tokenizer, tiny_gpt2, train_tokenizer
from qr_rlhf.data import data_hash, encode_pairs, load_pairs, parse_pair, split_validation
from qr_rlhf.figures import training_figure
from qr_rlhf.formats import InputError
from qr_rlhf.groups import COLUMNS, KINDS, read_group
from qr_rlhf.judgements import (
    advise,
    as_pairs,
    check_evaluation,
    count_groups,
    decided_pairs,
    find_values,
    nearest,
    number_parts,
    number_ratings,
)
from qr_rlhf.pipeline import length_null
from qr_rlhf.synthetic import World, truth
from qr_rlhf.training import rewards_table

datasets.disable_progress_bars()
ASK = dict(prompt="My bread is flat.")
THREE = ASK | dict(responses=["Try fresh yeast.", "Fold it.", "Hm."])
RATED = ASK | dict(response="Fold it.", rating=4)
PAIR = ASK | dict(chosen="Try fresh yeast.", rejected="Hm.")
PROMPT = "\n\nHuman: My bread is flat.\n\nAssistant:"


def group(row):
    return read_group(row, "line 7")


def read(rows, **kwargs):
    return load_pairs(rows, groups=True, hold_out=False, **kwargs)


def mixed_rows(votes, ratings, seed=0):
    "Rows about the embedded world: half of the votes on pairs, half on three responses; stars."
    world, rng = World(seed), np.random.default_rng(seed)
    pairs = [parse_pair(*row.values()) for row in world.rows("harmless", "train", votes)]
    rows = []
    for pair in pairs[: votes // 2]:
        rows.append(dict(pair))
    for pair in pairs[votes // 2 :]:
        responses = [pair["rejected"], pair["chosen"], " I don't know about that."]
        rows.append(dict(prompt=pair["prompt"], responses=responses, votes=[[1, 0]]))
    for pair in rng.permutation(pairs)[:ratings]:
        reward = truth(pair["prompt"], pair["chosen"]).sample(1, rng)[0]
        stars = 1 + int(np.searchsorted([-2, -0.5, 1, 2.5], reward))
        rated = dict(prompt=pair["prompt"], response=pair["chosen"], rating=stars)
        rows.append(rated | dict(rater=f"person {rng.integers(20)}"))
    return [rows[i] for i in rng.permutation(len(rows))]


# kinds of rows


def test_each_kind_of_row_becomes_the_same_columns():
    found = group(PAIR | dict(share=0.3, chosen_rating=5, rejected_rating=[1, 2]))
    assert found["prompt"] == PROMPT and found["responses"] == [" Try fresh yeast.", " Hm."]
    assert (found["first"], found["second"], found["share"]) == ([0], [1], [0.3])
    assert (found["rated"], found["rating"]) == ([0, 1, 1], [5, 1, 2])
    scored = group(PAIR | dict(share=0.3, score_chosen=5, score_rejected=[1, 2]))
    assert scored == found

    found = group(RATED | dict(rating=[4, None, 1.5], rater=["Ann", "Bo", "Cy"]))
    assert found["prompt"] == PROMPT and found["responses"] == [" Fold it."]
    assert (found["rated"], found["rating"], found["first"]) == ([0, 0], [4, 1.5], [])
    assert found["rater"] == ["Ann", "Bo", "Cy"]
    trl = ASK | dict(completion="Fold it.", rating=4)
    assert group(trl) == group(RATED)

    found = group(THREE | dict(votes=[[2, 0], [2, 0], [0, 1, 0.7]], ratings=[None, 3, [1, 2]]))
    assert (found["first"], found["second"]) == ([2, 2, 0], [0, 0, 1])
    assert found["share"] == [1, 1, 0.7]
    assert (found["rated"], found["rating"]) == ([1, 2, 2], [3, 1, 2])


def test_ultrafeedback_loads_as_it_is():
    scores = dict(helpful=2.5, honest=8.0, evasive=None)
    completions = [
        dict(model="m", response=f"I am {name}.", overall_score=score, annotations={})
        for name, score in scores.items()
    ]
    row = dict(source="evol", instruction="Who?", models=["m"], completions=completions)
    (found,) = read([row])[0]
    assert found["prompt"] == "\n\nHuman: Who?\n\nAssistant:"
    assert found["responses"][1] == " I am honest."
    assert (found["rated"], found["rating"], found["first"]) == ([0, 1], [2.5, 8], [])
    unscored = row | dict(completions=completions[2:])
    assert read([row, unscored])[1] == dict(nothing_said=1)
    assert "'completions[0]' is null" in refusal(
        read, [row | dict(completions=[dict(response=None)])]
    )


def test_a_ranking_becomes_its_pairs_and_a_tie_shares_the_votes():
    found = group(THREE | dict(ranking=[2, 1, 2]))
    pairs = list(zip(found["first"], found["second"], found["share"], strict=True))
    assert pairs == [(1, 0, 1), (0, 2, 0.5), (1, 2, 1)]
    found = group(THREE | dict(ranking=[3, None, 1]))
    assert (found["first"], found["second"], found["share"]) == ([2], [0], [1])
    both = group(THREE | dict(ranking=[1, 2, 3], votes=[[2, 0]]))
    assert both["first"] == [2, 0, 0, 1]


def test_responses_are_read_as_those_of_pairs_are():
    chat = dict(prompt=[dict(role="user", content="Why?")], responses=[reply("A"), reply("B")])
    text = dict(prompt="Why?", responses=["A", "B"])
    said = dict(votes=[[0, 1]])
    assert group(chat | said) == group(text | said)
    wholes = dict(
        responses=["\n\nHuman: Why?\n\nAssistant: A", "\n\nHuman: Why?\n\nAssistant: B"]
    )
    assert group(wholes | said) == group(text | said)
    whole = dict(response=wholes["responses"][0], rating=1)
    assert group(whole) == group(dict(prompt="Why?", response="A", rating=1))

    lost = [
        text | said | dict(responses=["A", "A "]),
        text | said | dict(responses=["A", " "]),
        text | said | dict(responses=["A", "B\n\nHuman: Thanks.\n\nAssistant: Good?"]),
        text | dict(responses=["A", "B"], votes=[], ratings=[None, []]),
        chat | said | dict(responses=[reply("A"), [dict(role="assistant", content=None)]]),
        dict(prompt="Why?", response=" ", rating=3),
    ]
    _, dropped = read([text | said, *lost])
    assert dropped == dict(equal=1, empty=2, turn_marker=1, nothing_said=1, not_text=1)


def test_comparisons_of_equal_responses_are_left_out_and_counted():
    rows = [
        ASK | dict(responses=["A", "A ", "B"], ranking=[1, 2, 3]),
        ASK | dict(responses=["A", "A", "B"], votes=[[0, 1]]),
        ASK | dict(responses=["A", "A", "B"], votes=[[0, 1]], ratings=[1, 2, 3]),
    ]
    table, dropped = read(rows)
    assert dropped == dict(equal_comparison=3, equal=1)
    assert table["first"][:] == [[0, 1], []] and table["rated"][:] == [[], [0, 1, 2]]


def test_ratings_of_equal_responses_stay_and_only_their_comparison_goes():
    alike = PAIR | dict(rejected=PAIR["chosen"])
    rows = [
        alike,
        alike | dict(chosen_rating=4, rejected_rating=[2, 3]),
        ASK | dict(responses=["A", "A "], votes=[[0, 1]], ratings=[1, 2]),
        ASK | dict(responses=["A", "A"], votes=[[0, 1]]),
        ASK | dict(responses=["", ""], ratings=[1, 2]),
    ]
    table, dropped = read(rows)
    assert dropped == dict(equal=2, equal_comparison=2, empty=1)
    assert table["rating"][:] == [[4, 2, 3], [1, 2]] and table["first"][:] == [[], []]
    assert table["prompt"][:] == [PROMPT] * 2
    assert table["responses"][:] == [[" Try fresh yeast."] * 2, [" A", " A "]]


def test_a_share_stands_in_every_pair_of_a_source_or_in_none():
    voted = PAIR | dict(share=0.7)
    table, _ = read([RATED, voted, THREE | dict(votes=[[0, 1]]), voted])
    assert table["share"][:] == [[], [0.7], [1], [0.7]]
    for lacks in (PAIR, PAIR | dict(share=None)):
        told = refusal(read, [RATED, voted, lacks])
        assert "row 3: the field 'share' is missing, though earlier pairs have it" in told
    assert "'share' is here, though earlier pairs lack it" in refusal(
        read, [PAIR, RATED, voted]
    )
    frame = pd.DataFrame([RATED, voted, PAIR])
    assert "give it in every pair or in none" in refusal(read, frame)
    assert read(pd.DataFrame([RATED, voted, voted]))[0]["share"][:] == [[], [0.7], [0.7]]


def test_a_table_of_groups_is_a_source(tmp_path):
    table, _ = read(mixed_rows(12, 6))
    table.to_parquet(tmp_path / "table.parquet")
    encoded = number_ratings(table)[0].add_column("prompt_ids", [[1]] * len(table))
    for source in (table, table.to_list(), table.to_pandas(), tmp_path / "table.parquet"):
        again, dropped = read(source)
        assert again.to_list() == table.to_list() and not dropped
    again, _ = read(encoded)
    assert again.remove_columns("rating").to_list() == table.remove_columns("rating").to_list()
    (first,) = table.select([0]).to_list()
    fault = "this has the columns of a table of groups, but"
    for wrong in (dict(share=[]), dict(rated=[0]), dict(rated=["a"], rating=[1])):
        assert f"row 1: {fault}" in refusal(read, [first | wrong])
    vote = dict(first=[0], second=[0], share=[1.0])
    assert "votes[0] is [0, 0, 1.0]; it must be" in refusal(read, [first | vote])
    assert "'prompt' is of type NoneType" in refusal(read, [first | dict(prompt=None)])
    none = dict(first=[], second=[], share=[], rated=[], rating=[])
    assert read([first, first | none])[1] == dict(nothing_said=1)


# errors

WRONG = [
    (RATED | dict(rating=None), "the field 'rating' is missing or null"),
    (ASK | dict(completion="Hm."), "a single response needs one: a number, or a list"),
    (RATED | dict(rating="good"), "'rating' is 'good'; it must be a number, or a list"),
    (RATED | dict(rating=True), "'rating' is True; it must be a number"),
    (RATED | dict(rating=[1, float("inf")]), "'rating' is inf; it must be a number"),
    (RATED | dict(rating=[1, 2], rater=["Ann"]), "'rater' must have one name for each rating"),
    (RATED | dict(completion="Hm."), "'response' and 'completion' are two names for the same"),
    (RATED | dict(response=3), "the field 'response' is of type int"),
    (dict(response="Hm.", rating=1), "there is no prompt; give a field 'prompt'"),
    (THREE, "nobody compared or rated these responses; give 'votes', 'ranking' or"),
    (ASK | dict(responses=["A"], ratings=[1]), "it must be a list of 2 or more"),
    (ASK | dict(responses="A", ratings=[1]), "is 'A'; it must be a list of 2 or more"),
    (THREE | dict(ratings=[1, 2]), "'ratings' is [1, 2]; it must be a list of 3"),
    (THREE | dict(ratings=[1, "b", 2]), "ratings[1] is 'b'; it must be a number"),
    (THREE | dict(ranking=[1, 2]), "'ranking' is [1, 2]; it must be a list of 3"),
    (THREE | dict(ranking=[1, 2, [3]]), "ranking[2] is [3]; it must be a number."),
    (THREE | dict(votes=3), "'votes' is 3; it must be a list"),
    (THREE | dict(votes=[[0, 1], [0, 3]]), "votes[1] is [0, 3]; it must be [preferred, other]"),
    (THREE | dict(votes=[[1, 1]]), "two different places in 'responses', from 0 to 2"),
    (THREE | dict(votes=[dict(first=0)]), "votes[0] is {'first': 0}; it must be"),
    (THREE | dict(votes=[[0, 1, 7]]), "the share of votes for the first, from 0 to 1"),
    (THREE | dict(votes=[[0.5, 1]]), "votes[0] is [0.5, 1]; it must be"),
    (THREE | dict(responses=["A", 3], votes=[]), "the field 'responses[1]' is of type int"),
    (THREE | dict(responses=["A", None], votes=[]), "the field 'responses[1]' is null"),
    (
        ASK | dict(responses=["A", reply("B")], votes=[]),
        "of 'responses[0]' and 'responses[1]' one is a string and the other a list",
    ),
    (PAIR | dict(rating=3), "'rating' stands beside a pair and doesn't say what it rates"),
    (PAIR | dict(ratings=[3, 2]), "name it 'chosen_rating' or 'rejected_rating'"),
    (PAIR | dict(chosen_rating="b"), "the field 'chosen_rating' is 'b'; it must be a number"),
    (PAIR | dict(score_chosen=1, chosen_rating=1), "are two names for the same thing"),
    (dict(chosen="A", chosen_rating=1), "the field 'rejected' is missing"),
    (PAIR | dict(share=2, chosen_rating=1), "'share' is 2; it must be a number from 0 to 1"),
    (ASK | dict(completions=["A"]), "completions[0] is 'A'; it must be an object with"),
    (ASK | dict(completions=[dict(response="A", overall_score="N/A")]), "is 'N/A'; it must be"),
    (ASK | dict(answer="A", rating=1), "this is no row we know; give 'chosen' and 'rejected'"),
    (3, "this is of type int"),
]


@pytest.mark.parametrize(("row", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_is_wrong_is_said_with_its_place_and_a_remedy(row, words, tmp_path):
    path = write(tmp_path / "mine.jsonl", [RATED, row])
    said = refusal(load_pairs, path, groups=True, hold_out=False)
    assert said.startswith(f"{path}, line 2") and words in said and said.endswith(".")
    assert ";" in said or "but should be" in said


def in_shapes(question):
    "A group in each of the shapes that are read."
    ask, chat = dict(prompt=question), [reply("Try fresh yeast."), reply("Fold it.")]
    replies = ["Try fresh yeast.", "Fold it."]
    return [
        dict(ask, chosen="Fold it.", rejected="Hm.", share=0.9, chosen_rating=5),
        dict(ask, response="Fold it.", rating=[4, None], rater=["Ann", "Bo"]),
        dict(ask, responses=chat, votes=[[0, 1], [1, 0, 0.3]], rater="Ann"),
        dict(ask, responses=replies, ranking=[1, 2], ratings=[3, [2, 1]]),
        dict(instruction=question, completions=[dict(response="So.", overall_score=2.5)]),
    ]


@st.composite
def damaged_groups(draw):
    "Rows of one shape, in which some value is gone, or another one stands in its place."
    n, shape = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    rows = [in_shapes(question)[shape] for question in QUESTIONS[:n]]
    for _ in range(draw(st.integers(0, 3))):
        holder, key = draw(st.sampled_from(list(places(rows))))
        if holder is not rows and draw(st.booleans()):
            del holder[key]
        else:
            holder[key] = draw(words | values)
    return rows


@examples(200)
@given(rows=damaged_groups())
def test_a_row_of_any_kind_is_read_or_counted_or_named(rows):
    try:
        table, dropped = read(rows)
    except InputError as error:
        said = str(error)
        assert len(said.splitlines()) == 1 and said.endswith(".")
        assert re.search(r"^row \d: |of \d+ rows in data", said), said
    else:
        dropped.pop("equal_comparison", None)
        assert len(table) + sum(dropped.values()) == len(rows)


# sources


def test_every_source_gives_the_same_table(tmp_path):
    rows = mixed_rows(40, 20)
    wanted, dropped = read(rows)
    assert not dropped and len(wanted) == 60
    sources = [
        write(tmp_path / f"mine{ending}", rows) for ending in (".jsonl", ".json.gz", ".parquet")
    ]
    sources += [
        pd.DataFrame(rows),
        Dataset.from_parquet(str(sources[2])),
        pd.read_parquet(sources[2]),
    ]
    for source in sources:
        assert read(source)[0].to_list() == wanted.to_list()
    parts = {split: load_pairs(rows, split=split, groups=True) for split in ("train", "test")}
    (train_part, gone), (test_part, _) = parts.values()
    assert len(train_part) + len(test_part) == 60 and gone == dict(other_part=len(test_part))
    assert not set(train_part["prompt"]) & set(test_part["prompt"])
    first, left = read(rows, n=7)
    assert first.to_list() == wanted.select(range(7)).to_list() and left == dict(over_limit=53)
    kept, valid = split_validation(train_part)
    assert not set(kept["prompt"]) & set(valid["prompt"])


def test_plain_pairs_are_read_as_ever():
    rows = World().rows("helpful", "train", 40)
    voted = [row | dict(share=0.7) for row in rows]
    for source in (rows, voted):
        pairs, dropped = load_pairs(source)
        table, gone = load_pairs(source, groups=True)
        assert table.column_names == pairs.column_names and gone == dropped
        assert table.to_list() == pairs.to_list() and data_hash(table) == data_hash(pairs)
    fingerprints = data_hash(load_pairs(rows)[0]), data_hash(load_pairs(voted)[0])
    assert fingerprints == ("781c2f137cc4e316", "ed179a0f453c2832")
    scored = [dict(row, score_chosen=3) for row in rows]
    assert load_pairs(scored)[0].to_list() == load_pairs(rows)[0].to_list()
    told = "line 7: the field 'chosen' is missing"
    assert told.removeprefix("line 7: ") in refusal(load_pairs, [RATED])
    assert set(KINDS) < set(COLUMNS)


def test_data_hash_knows_votes_and_ratings():
    rows = [THREE | dict(votes=[[0, 1]], ratings=[1, 2, 3])]
    changes = [dict(votes=[[1, 0]]), dict(votes=[[0, 1, 0.9]]), dict(ratings=[1, 2, 4]), {}]
    hashes = [data_hash(read([rows[0] | change])[0]) for change in changes]
    assert len(set(hashes)) == 4 and hashes[-1] == data_hash(read(rows)[0])


# judgements


def test_few_numbers_are_categories_and_many_are_binned():
    assert find_values(np.array([5, 1, 5, 3])) == [1, 3, 5]
    assert nearest([1, 2, 2.1, 4, 4.5, 99, -3], [1, 3, 5]) == [0, 0, 1, 1, 2, 2, 0]
    many = np.random.default_rng(0).lognormal(size=1000)
    values = find_values(many)
    assert len(values) == 10 and set(values) <= set(many.tolist())
    assert np.bincount(nearest(many.tolist(), values), minlength=10).min() > 40
    assert len(find_values(np.array([0] * 95 + list(range(1, 12))))) < 10
    for same in (np.ones(3), np.array([7.0] * 1000 + list(range(11)))):
        assert "all ratings are" in refusal(find_values, same)


def test_test_data_use_the_categories_of_the_training_data():
    rows = [RATED | dict(rating=[1, 3, 5]), RATED | dict(rating=[])]
    trained, values = number_ratings(read(rows[:1])[0])
    other = read([RATED | dict(rating=[0, 3.9, 4.1, 80])])[0]
    numbered, same = number_ratings(other, values)
    assert values == same == [1, 3, 5] and trained["rating"][:] == [[0, 1, 2]]
    assert numbered["rating"][:] == [[0, 1, 2, 2]]
    assert all(isinstance(rating, int) for rating in numbered["rating"][0])
    plain = load_pairs([PAIR], hold_out=False)[0]
    assert number_ratings(plain) == (plain, [])
    votes, _ = read([THREE | dict(votes=[[0, 1]])])
    assert number_parts(votes, None) == (votes, None, [])
    _, valid, found = number_parts(
        votes, read([THREE | dict(ranking=[1, 2, 3], ratings=[1, 2, 3])])[0]
    )
    assert found == [] and len(valid) == 3 and "chosen" in valid.column_names
    assert number_parts(read(rows[:1])[0], plain)[1] is plain


def test_pairs_of_groups_have_the_votes_and_a_run_takes_the_preferred_side():
    rows = [
        THREE | dict(votes=[[1, 0, 0.2], [1, 2, 0.5], [2, 1]], ratings=[1, 2, 3]),
        RATED,
    ]
    every = as_pairs(read(rows)[0])
    assert every["share"][:] == [0.2, 0.5, 1] and every["chosen"][0] == " Fold it."
    pairs, left_out = decided_pairs(every)
    assert [(p["chosen"], p["rejected"], p["share"]) for p in pairs] == [
        (" Try fresh yeast.", " Fold it.", 0.8),
        (" Hm.", " Fold it.", 1),
    ]
    assert pairs[0]["prompt"] == PROMPT and left_out == dict(no_majority=1)
    plain = load_pairs([PAIR], hold_out=False)[0]
    assert as_pairs(plain) is plain and decided_pairs(plain) == (plain, {})
    shared = load_pairs([PAIR | dict(share=0.25)], hold_out=False)[0]
    assert decided_pairs(shared)[0][0]["chosen"] == " Hm."


def test_a_hash_chooses_the_pairs_of_a_run():
    responses = [f"{i}." for i in range(6)]
    rows = [
        dict(prompt=f"Say {i}.", responses=responses, ranking=[*range(6)]) for i in range(20)
    ]
    pairs = as_pairs(read(rows)[0])
    kept, left_out = decided_pairs(pairs, 60)
    assert left_out == dict(pairs_over_limit=240) and len(set(kept["group"])) > 15
    assert kept["group"][:] == sorted(kept["group"])
    backwards, _ = decided_pairs(pairs.select(range(len(pairs))[::-1]), 60)
    assert backwards.to_list() == kept.to_list()[::-1]


def test_intervals_over_several_pairs_of_a_prompt_are_over_prompts():
    rng = np.random.default_rng(0)
    prompts = np.arange(60).repeat(6).tolist()
    right = rng.choice([-1.0, 1.0], 60).repeat(6)  # all six pairs of a prompt, or none
    sides = np.stack([right, np.zeros(360)], 1)[..., None]
    both = [rewards_table(sides, model, 0) for model in ("scalar", "quantile")]
    tables, widths = pd.concat(both), {}
    for name, drawn in dict(pairs=None, prompts=prompts).items():
        part = evaluate(tables, prompts=drawn)["models"]["scalar"]["intervals"]["accuracy"]
        null = length_null(tables, rng.random((360, 2)), drawn)["longer"]
        widths[name] = [part["high"] - part["low"], null["high"] - null["low"]]
    wider = np.divide(widths["prompts"], widths["pairs"])
    assert 2 < wider[0] < 3 and 0.7 < wider[1] < 1.4  # √6, and 1: lengths know no prompt
    few = Dataset.from_list([dict(prompt="Why?", group=i // 6) for i in range(66)])
    assert "11 prompts are left to evaluate on" in refusal(check_evaluation, few)
    samples = half_samples(prompts)
    assert (samples.reshape(201, 60, 6).any(2) == samples.reshape(201, 60, 6).all(2)).all()


def test_ratings_alone_order_responses_to_one_prompt():
    rows = [
        RATED | dict(rating=[1, 4]),
        ASK | dict(response="Hm.", rating=2),
        RATED | dict(rating=4),
        ASK | dict(response="Well.", rating=3),
        dict(prompt="Why?", response="So.", rating=5),
    ]
    pairs = as_pairs(read(rows)[0]).to_list()
    order = [(pair["chosen"], pair["rejected"]) for pair in pairs]
    assert order == [(" Fold it.", " Hm."), (" Well.", " Hm.")]  # 3, 2, 3
    said = refusal(as_pairs, read(rows[4:])[0])
    assert "nothing can be evaluated" in said and "rate several responses to one prompt" in said


def test_everything_is_counted():
    rows = [
        THREE | dict(ranking=[1, 2, 3], ratings=[1, None, [2, 3]], rater="Ann"),
        RATED | dict(rating=[1, 2], rater=["Ann", "Bo"]),
        dict(prompt="Why?", response="So.", rating=5),
    ]
    counts = dict(prompts=2, responses=5, comparisons=3, ratings=6, raters=2)
    assert count_groups(read(rows)[0]) == counts
    assert "-p objective distributional" in advise(read(rows)[0], "paper")
    assert not advise(read(rows)[0], "distributional")
    votes = read([THREE | dict(ranking=[1, 2, 3])])[0]
    assert not advise(votes, "paper")
    assert "spread is not learnt" in advise(votes, "distributional", "mean")
    assert not advise(votes, "distributional") and not advise(votes, "paper", "mean")
    assert not advise(read(rows)[0], "distributional", "mean")


# training


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    "A folder with a tiny GPT-2 and its tokenizer."
    folder = tmp_path_factory.mktemp("backbone")
    rows = World().rows("harmless", "train", 60)
    tokenizer = train_tokenizer([row["chosen"] for row in rows], 400)
    tokenizer.save_pretrained(folder)
    tiny_gpt2(tokenizer, 400, n_layer=1, n_embd=16, n_head=2, seed=0).save_pretrained(folder)
    return folder


def test_groups_as_token_ids_are_those_of_their_pairs(backbone):
    tokenizer = load_tokenizer(backbone)
    long = dict(prompt="long " * 400, responses=["A", "B " * 100], votes=[[0, 1]])
    table, _ = read(
        [
            *mixed_rows(6, 3),
            long,
            THREE | dict(responses=["C " * 400, "D", "E"], votes=[[0, 1]]),
        ]
    )
    encoded, dropped = encode_pairs(table, tokenizer, 400)
    assert dropped == dict(too_long=1) and set(table.column_names) < set(encoded.column_names)
    pairs, _ = encode_pairs(as_pairs(table.select(range(9))), tokenizer, 400)
    of_groups = {(*row["prompt_ids"], *ids) for row in encoded for ids in row["response_ids"]}
    for pair in pairs:
        for side in ("chosen_ids", "rejected_ids"):
            assert (*pair["prompt_ids"], *pair[side]) in of_groups
    longest = max(
        len(row["prompt_ids"]) + max(map(len, row["response_ids"])) for row in encoded
    )
    assert longest == 400


def test_the_library_trains_on_groups(backbone, tmp_path, capsys):
    rows = mixed_rows(60, 20)
    how = dict(max_steps=2, batch_size=4, evaluations=1, disable_tqdm=True)
    model = train(backbone, rows, tmp_path / "rm", "distributional", **how)
    told = "60 comparisons, 20 ratings, "
    assert told in capsys.readouterr().out
    config = AutoConfig.from_pretrained(tmp_path / "rm")
    assert config.rating_values == [1, 2, 3, 4, 5] and len(config.rating_thresholds) == 4
    assert model.evaluate(rows)["pairs"] == 60
    assert torch.isfinite(load(tmp_path / "rm").score("Why?", ["So."]).quantiles).all()
    train(backbone, rows, tmp_path / "rm", "distributional", **how)
    assert "rm: taken up, it was finished already" in capsys.readouterr().out
    table, _ = read(rows)
    train(backbone, table, tmp_path / "rm", "distributional", **how)
    assert "rm: taken up, it was finished already" in capsys.readouterr().out
    encoded, _ = encode_pairs(table, model.tokenizer, 400)
    assert model.evaluate(encoded) == model.evaluate(rows)


def test_rankings_without_ratings_are_enough(backbone, tmp_path):
    rows = [
        dict(prompt=f"Say {i}.", responses=["One.", "Two.", "Three."], ranking=[1, 2, 2])
        for i in range(30)
    ]
    how = dict(max_steps=2, batch_size=4, evaluations=1, disable_tqdm=True)
    model = train(backbone, rows, tmp_path / "rm", "scalar", **how)
    found = model.evaluate(rows)
    assert found["pairs"] == 90 and found["accuracy"] <= 75 / 90  # a tie is half a vote each
    pairs = [dict(prompt=f"Say {i}.", chosen="One.", rejected="Two.") for i in range(8)]
    validated = train(backbone, pairs, tmp_path / "other", validation=rows, **how)
    assert getattr(validated.model.config, "rating_values", None) is None


def test_thresholds_of_other_ratings_are_not_taken_over(backbone, tmp_path):
    how = dict(max_steps=2, batch_size=4, evaluations=1, disable_tqdm=True)
    stars = [row for row in mixed_rows(60, 30) if "rating" in row]
    liked = [row | dict(rating=int(row["rating"] > 3)) for row in stars]
    train(backbone, stars, tmp_path / "stars", "distributional", **how)
    model = train(tmp_path / "stars", liked, tmp_path / "two", "distributional", **how)
    assert model.model.config.rating_values == [0, 1]
    assert len(model.model.config.rating_thresholds) == 1


def test_ratings_alone_are_enough(backbone, tmp_path):
    rated = [row for row in mixed_rows(60, 30) if "rating" in row]
    how = dict(max_steps=2, batch_size=4, evaluations=1, disable_tqdm=True)
    model = train(backbone, rated, tmp_path / "rm", "scalar", **how)
    log = pd.DataFrame(json.loads((tmp_path / "rm" / "log.json").read_text()))
    assert log.eval_loss.notna().any() and "eval_accuracy" not in log
    training_figure(log.assign(model="scalar", seed=0), "ratings")
    with_rival = [rated[0], rated[0] | dict(response="So.", rating=rated[0]["rating"] + 1)]
    assert model.evaluate(with_rival)["pairs"] == 1
    assert "nothing can be evaluated" in refusal(model.evaluate, rated[:1])


def test_readmes_command_takes_votes_and_ratings(project, backbone, tmp_path):
    "Votes and ratings in one JSON file, and README's own-data command."
    path = write(tmp_path / "mixed.json", mixed_rows(160, 60))
    small = dict(epochs=1, batch_size=16, evaluations=2, warmup_steps=2, learning_rate=1e-3)
    how = dict(profile="paper", name="mixed", data=path, backbone=backbone, seeds=0)
    project.run("run", "runs/mixed.ipynb", max_length=400, **how, **small)
    results = project.results("mixed")
    counts = [results["groups"][part] for part in ("train", "valid")]
    assert (
        results["n_train"] + results["n_valid"] + results["dropped"]["train"]["other_part"]
        == 220
    )
    for kind, total in dict(comparisons=160, ratings=60).items():
        held_out = total - sum(part[kind] for part in counts)
        assert 0 < held_out < total / 2
        if kind == "comparisons":
            assert results["n_eval"] == held_out
    assert results["groups"]["rating_values"] == [1, 2, 3, 4, 5]
    folder = project.folder / "runs" / "mixed" / "quantile" / "seed0"
    assert len(AutoConfig.from_pretrained(folder).rating_thresholds) == 4
    card = (folder / "README.md").read_text()
    comparisons, ratings, raters = (
        counts[0][kind] for kind in ("comparisons", "ratings", "raters")
    )
    trained = f"groups ({comparisons} comparisons, {ratings} ratings, {raters} raters named"
    assert f"{trained} (values 1, 2, 3, 4, 5); " in card
    cells = json.loads((project.folder / "runs" / "mixed.ipynb").read_text())["cells"]
    shown = "".join(str(output) for cell in cells for output in cell.get("outputs", []))
    assert "ratings to train on" in shown and "-p objective distributional" in shown
