"The package as somebody imports it: trained, loaded, scored, evaluated, exported."

import inspect
import json
import os
import re
import subprocess
import sys

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from test_model import refusal
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)

import qr_rlhf
from qr_rlhf import PairTrainer, RewardDistribution, load, load_pairs, load_reward_model, train
from qr_rlhf.backbones import load_tokenizer, tiny_gpt2, train_tokenizer
from qr_rlhf.data import encode_pairs
from qr_rlhf.packing import FOUND
from qr_rlhf.resume import find_damage

TRAIN = """
from qr_rlhf import train

names = "Ann Bo Cy Di Ed Flo Gus".split()
numbers = [(high, low) for high in range(10) for low in range(high)]
pairs = [dict(prompt=f"Name a number, {name}.", chosen=f"{high}", rejected=f"{low}")
         for name in names for high, low in numbers]
model = train("backbone", pairs, "rewards", epochs=2, learning_rate=3e-3, batch_size=16)
rewards = model.score("Name a number, Hal.", ["9", "1"])
print(rewards.quantiles.tolist(), float(rewards[0].prob_beats(rewards[1])))
model.export("cautious", "cvar 0.2")
"""
LOAD = """
from qr_rlhf import load

model = load("rewards")
print(model.score("Name a number, Hal.", ["9", "1"]).quantiles.tolist())
"""
PAIRS = [
    dict(prompt=f"Name a number, {name}.", chosen=f"{high}", rejected=f"{low}")
    for name in ("Ann", "Bo", "Cy", "Di")
    for high, low in ((9, 1), (7, 2), (5, 3))
]
ASKED = "Name a number, Hal."
QUICK = dict(disable_tqdm=True, learning_rate=1e-3, save_strategy="no")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder outside the repository, with a tiny backbone."
    folder = tmp_path_factory.mktemp("somewhere")
    texts = [row["prompt"] + row["chosen"] for row in PAIRS]
    tokenizer = train_tokenizer([*texts, *map(str, range(10)), "Human: Assistant:"], 300)
    tokenizer.save_pretrained(folder / "backbone")
    gpt2 = tiny_gpt2(tokenizer, 64, n_layer=1, n_embd=32, n_head=2, seed=0)
    gpt2.save_pretrained(folder / "backbone")
    return folder


def run(code, folder, *options):
    "Run Python in a folder; what it prints."
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(place):
    "What twelve lines leave, run outside the repository."
    assert len(TRAIN.strip().splitlines()) <= 12 and len(LOAD.strip().splitlines()) <= 5
    return run(TRAIN, place)


def test_twelve_lines_train_score_and_export(trained, place):
    quantiles, beats = re.fullmatch(
        r"(\[\[.*\]\]) (\S+)", trained.stdout.splitlines()[-1]
    ).groups()
    good, bad = torch.tensor(json.loads(quantiles))
    assert good.shape == (10,) and good.mean() > bad.mean() and float(beats) > 0.5
    assert "eval_accuracy" in trained.stdout and "100%" in trained.stderr
    assert "LOAD REPORT" not in trained.stdout + trained.stderr
    tokenizer = AutoTokenizer.from_pretrained(place / "cautious")
    stock = AutoModelForSequenceClassification.from_pretrained(place / "cautious")
    text = f"\n\nHuman: {ASKED}\n\nAssistant: 9"
    with torch.no_grad():
        reward = stock(**tokenizer(text, return_tensors="pt")).logits.item()
    assert abs(reward - good[:2].mean()) < 1e-5


def test_five_lines_load_and_score(trained, place):
    again = json.loads(run(LOAD, place).stdout.splitlines()[-1])
    first = json.loads(trained.stdout.splitlines()[-1].rpartition(" ")[0])
    assert again == first


def test_the_package_is_imported_at_once_and_shows_what_a_person_needs(tmp_path):
    code = """
import sys, time
start = time.perf_counter()
import qr_rlhf
print(time.perf_counter() - start, "torch" in sys.modules, *dir(qr_rlhf))
"""
    seconds, torch_too, *names = run(code, tmp_path).stdout.split()
    assert float(seconds) < 0.1 and torch_too == "False"
    assert {"train", "load", "RewardModel", "PairTrainer", "load_pairs"} <= set(names)
    assert len(names) <= 16
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        qr_rlhf.trian  # noqa: B018


@pytest.mark.parametrize("name", [n for n in dir(qr_rlhf) if n != "__version__"])
def test_help_explains_each_parameter(name):
    thing = getattr(qr_rlhf, name)
    things = [thing]
    if name == "RewardModel":
        things += [thing.score, thing.score_many, thing.evaluate, thing.export, thing.save]
    for each in things:
        said = inspect.getdoc(each)
        for parameter in set(inspect.signature(each).parameters) - {"self"}:
            assert re.search(rf"^    (\*\*)?{parameter}: ", said, re.M), f"{each}: {parameter}"


@pytest.fixture
def model(trained, place):
    return load(place / "rewards", device="cpu")


class Counted:
    "Counts a model's forward passes."

    def __init__(self, model):
        self.calls = 0
        model.register_forward_hook(self)

    def __call__(self, *args):
        self.calls += 1


def test_whether_prompts_are_shared_is_found_out_once(model):
    count = Counted(model.model)
    model.score(ASKED, ["9", "1"])
    assert count.calls == 3  # two to find out
    for replies in (["9", "1"], ["8"], ["Long " * 8, "5", "7"]):
        model.score(ASKED, replies)
    assert count.calls == 6
    model.score_many([ASKED, "Why?"] * 20, [["9", "1"], ["8"]] * 20, row_tokens=4096)
    assert count.calls == 7


@pytest.mark.parametrize("row_tokens", [8, 64, 1024])
def test_many_prompts_give_what_single_ones_give(model, row_tokens):
    prompts = [
        ASKED,
        [dict(role="user", content="Why?")],
        "\n\nHuman: How?\n\nAssistant:",
        "Hm?",
    ]
    replies = [["9", "1", "Long " * 9], ["8"], [" 5", " 6"], ["So so so.", "No."]]
    together = model.score_many(prompts, replies, row_tokens=row_tokens)
    for prompt, answers, found in zip(prompts, replies, together, strict=True):
        alone = model.score(prompt, answers)
        assert len(found) == len(answers) and found.link == alone.link == "mean"
        assert (found.quantiles - alone.quantiles).abs().max() < 1e-5


def test_many_prompts_for_a_model_that_cannot_share_them(model):
    prompts, replies = [ASKED, "Why?"], [["9", "1", "Long " * 9], ["8"]]
    shared = model.score_many(prompts, replies)
    how = model.model.dtype, model.model.config._attn_implementation
    FOUND[model.model] = {how: (1, False)}
    for one, other in zip(shared, model.score_many(prompts, replies), strict=True):
        assert (one.quantiles - other.quantiles).abs().max() < 1e-5


def test_a_request_that_cannot_be_read_is_named(model):
    told = refusal(model.score_many, ["Why?", "Why?"], [["So."], "So."])
    assert told.startswith("request 1: responses: 'So.' is no list of replies")
    assert "two lists of the same length" in refusal(model.score_many, ["Why?"], [])
    assert refusal(model.score, "Why?", []).startswith("responses: the list is empty")


def test_distributions_are_counted_and_picked():
    rewards = RewardDistribution([[0, 1, 2], [3, 4, 5], [1, 1, 1]], "mean")
    assert len(rewards) == 3 and rewards.mean().tolist() == [1, 4, 1]
    assert rewards[1].prob_beats(rewards[0]) > 0.9 and rewards[0].mean() == 1
    assert (
        rewards[[True, False, True]].mean().tolist() == rewards[::2].mean().tolist() == [1, 1]
    )
    assert [one.mean().item() for one in rewards] == [1, 4, 1]
    by_array = RewardDistribution(rewards.quantiles.numpy().astype("float64"))
    assert torch.allclose(by_array.cvar(0.5), rewards.cvar(0.5).double())
    for wrong in (lambda: len(rewards[0]), lambda: rewards[0][0], lambda: rewards[0, 1]):
        with pytest.raises(TypeError, match="a single distribution has no length"):
            wrong()


def test_evaluate_is_what_one_computes_by_hand(model, tmp_path):
    found = model.evaluate(PAIRS)
    scored = model.score_many(
        [p["prompt"] for p in PAIRS], [[p["chosen"], p["rejected"]] for p in PAIRS]
    )
    margins = torch.stack([rewards.mean()[0] - rewards.mean()[1] for rewards in scored])
    assert found["pairs"] == 12 and abs(found["margin"] - margins.mean()) < 1e-5
    assert found["accuracy"] == (margins > 0).float().mean()
    assert abs(found["nll"] - torch.nn.functional.softplus(-margins).mean()) < 1e-5
    assert 0 <= found["ece"] <= 1
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    assert model.evaluate(tmp_path / "pairs.jsonl") == found
    model.save(tmp_path / "copy")
    assert load(tmp_path / "copy").evaluate(PAIRS) == found


ROWS = [*PAIRS, dict(prompt="Why?", chosen="So.", rejected="So.")]


def split_of(rows):
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize(
    "make",
    [list, tuple, iter, pd.DataFrame, split_of, lambda rows: dict(train=split_of(rows))],
    ids=["list", "tuple", "iterator", "frame", "dataset", "splits"],
)
def test_rows_in_memory_are_a_source_like_any_other(make, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for split in ("train", "test"):
        by_file, dropped = load_pairs(tmp_path / "pairs.jsonl", split=split)
        table, gone = load_pairs(make(ROWS), split=split)
        assert table.to_list() == by_file.to_list() and gone == dropped
    whole, gone = load_pairs(make(ROWS), hold_out=False)
    assert len(whole) == 12 and gone == dict(equal=1)
    assert load_pairs(whole, hold_out=False)[0].to_list() == whole.to_list()


def test_splits_in_memory_are_chosen_as_those_of_a_folder():
    tables = datasets.DatasetDict(train=split_of(PAIRS), test=split_of(PAIRS[:2]))
    assert [len(load_pairs(tables, split=s)[0]) for s in ("train", "test")] == [12, 2]
    named = dict(first=PAIRS, second=PAIRS[:2], third=PAIRS)
    assert "name two of them" in refusal(load_pairs, named)
    assert len(load_pairs(named, split="test", splits=["first", "second"])[0]) == 2


def test_a_table_has_messages_votes_and_missing_values():
    chat = dict(
        prompt=[dict(role="user", content="Why?")],
        chosen=[dict(role="assistant", content="So.")],
        rejected=[dict(role="assistant", content="No.")],
        share=0.8,
    )
    for table in (pd.DataFrame([chat]), split_of([chat])):
        (pair,) = load_pairs(table, hold_out=False)[0]
        assert pair["chosen"] == " So." and pair["share"] == 0.8
    frame = pd.DataFrame([chat])
    for name in ("prompt", "chosen", "rejected"):
        frame[name] = frame[name].map(np.array)  # as pandas reads lists from Parquet
    assert load_pairs(frame, hold_out=False)[0].to_list() == [pair]
    whole = dict(chosen="\n\nHuman: Why?\n\nAssistant: So.")
    whole |= dict(rejected="\n\nHuman: Why?\n\nAssistant: No.")
    frame = pd.DataFrame([PAIRS[0], whole])  # the second has no prompt
    assert len(load_pairs(frame, hold_out=False)[0]) == 2
    told = refusal(load_pairs, pd.DataFrame([*PAIRS, dict(chosen="a", rejected=None)]))
    assert told == "row 13: the field 'rejected' is null; leave this row out."


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*PAIRS, dict(PAIRS[0], chosen=3)], "row 13: the field 'chosen' is of type int"),
        ([dict(prompt="a", rejected="b")], "row 1: the field 'chosen' is missing"),
        (["a"], "row 1: this is of type str"),
        ([], "of 0 rows in data no pair is left"),
        (7, "int is no source of pairs"),
    ],
)
def test_rows_that_cannot_be_read_are_one_sentence(rows, words):
    assert words in refusal(load_pairs, rows, hold_out=False)


def test_a_single_pair_tells_of_the_part_that_is_held_out():
    lost = "train" if "no pair" in str(attempt("train")) else "test"
    told = attempt(lost)
    assert "a fifth of the openings is held out as test" in told and "give more pairs" in told


def attempt(split):
    try:
        return str(load_pairs(PAIRS[:1], split=split))
    except ValueError as error:
        return str(error)


class Seen(TrainerCallback):
    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def test_the_trainer_takes_what_transformers_takes(place, tmp_path):
    tokenizer, seen = load_tokenizer(place / "backbone"), Seen()
    encoded, _ = encode_pairs(load_pairs(PAIRS, hold_out=False)[0], tokenizer, 64)
    model = load_reward_model(place / "backbone", tokenizer, n=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = PairTrainer(
        model,
        TrainingArguments(
            str(tmp_path),
            num_train_epochs=2,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=encoded,
        eval_dataset=encoded,
        processing_class=tokenizer,
        callbacks=[seen],
        compute_metrics=lambda found: dict(shape=list(found.predictions.shape)),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
    )
    before = model.score.weight.clone()
    trainer.train()
    assert seen.steps == trainer.state.global_step == 4
    assert torch.equal(model.score.weight, before)  # the optimiser is ours, and stands still
    assert trainer.evaluate()["eval_shape"] == [12, 2, 10]


def test_training_is_taken_up_and_another_one_refused(place, tmp_path, capsys):
    how = dict(validation=None, max_steps=2, **QUICK)
    first = train(place / "backbone", PAIRS, tmp_path / "rm", **how)
    again = train(place / "backbone", PAIRS, tmp_path / "rm", **how)
    assert "rm: taken up, it was finished already" in capsys.readouterr().out
    assert torch.equal(first.model.score.weight, again.model.score.weight)
    shown = how | dict(disable_tqdm=False, logging_steps=1, run_name="a", save_total_limit=2)
    train(place / "backbone", PAIRS, tmp_path / "rm", **shown)
    assert "rm: taken up, it was finished already" in capsys.readouterr().out
    told = refusal(train, place / "backbone", PAIRS, tmp_path / "rm", **how, weight_decay=0.1)
    assert "weight_decay was None and is now '0.1'" in told
    told = refusal(train, place / "backbone", PAIRS[:9], tmp_path / "rm", **how)
    assert "holds another training (data_hash was" in told
    told = refusal(train, place / "backbone", PAIRS, tmp_path / "rm", "scalar", **how)
    assert "objective was" in told and "n was 10 and is now 1" in told
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    told = refusal(train, place / "backbone", PAIRS, tmp_path / "mine", **how)
    assert "mine holds something else" in told


def test_a_finished_training_is_not_written_over(place, trained):
    model = load(place / "rewards", device="cpu")
    told = refusal(model.export, place / "rewards", "cvar 0.2")
    assert "rewards holds a finished training; give another folder." in told
    assert refusal(model.save, place / "rewards") == told
    assert find_damage(place / "rewards") == ""


def test_a_damaged_training_is_kept_aside_and_made_again(place, tmp_path, capsys):
    how = dict(validation=None, max_steps=2, **QUICK)
    first = train(place / "backbone", PAIRS, tmp_path / "rm", **how)
    (tmp_path / "rm" / "training.json").write_text("{")
    again = train(place / "backbone", PAIRS, tmp_path / "rm", **how)
    assert "training.json is damaged; kept as rm.damaged" in capsys.readouterr().out
    assert torch.equal(first.model.score.weight, again.model.score.weight)


@pytest.mark.parametrize(
    ("objective", "family", "outputs"),
    [("scalar", None, 1), ("distributional", "normal", 2), ("free", "free", 10)],
)
def test_objectives_have_names(place, tmp_path, objective, family, outputs):
    (tmp_path / "rm").mkdir()  # an empty folder is as good as none
    rm = train(
        place / "backbone",
        PAIRS,
        tmp_path / "rm",
        objective,
        validation=PAIRS[:2],
        evaluations=1,
        max_steps=1,
        disable_tqdm=True,
    )
    config = rm.model.config
    assert (config.quantile_family, config.num_labels) == (family, outputs)
    assert rm.evaluate(PAIRS)["pairs"] == 12 and config.reward_max_length == 64


def test_what_cannot_be_trained_is_said(place, trained, tmp_path):
    told = refusal(train, place / "backbone", PAIRS[:3], tmp_path / "rm")
    assert "have one prompt" in told and "train without validation" in told
    told = refusal(train, place / "backbone", PAIRS, tmp_path / "rm", validation=2)
    assert "validation: 2 is no share of the prompts" in told
    told = refusal(train, place / "backbone", PAIRS, tmp_path / "rm", "quantile")
    assert "objective: 'quantile' is unknown; choose one of scalar, paper" in told
    told = refusal(train, place / "rewards", PAIRS, tmp_path / "rm", "scalar")
    assert "is a reward model with n=10 and family=None" in told and "without a head" in told
    assert "is a language model and no reward model" in refusal(load, place / "backbone")
    assert not (tmp_path / "rm").exists()


def test_a_head_of_another_size_is_said_in_our_words(place, tmp_path):
    tokenizer = load_tokenizer(place / "backbone")
    sizes = dict(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=len(tokenizer))
    stock = GPT2ForSequenceClassification(GPT2Config(num_labels=3, **sizes))
    stock.save_pretrained(tmp_path)
    assert "leave n and family out" in refusal(load_reward_model, tmp_path, tokenizer, 10)
    config = json.loads((tmp_path / "config.json").read_text()) | dict(architectures=None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = refusal(load_reward_model, tmp_path, tokenizer, 10)
    assert "holds score.weight of shape (3, 32), and not (10, 32); leave n out" in told


def test_weights_that_a_reward_model_lacks_are_no_secret(trained, place, tmp_path):
    tokenizer = load_tokenizer(place / "backbone")
    config = AutoModelForSequenceClassification.from_pretrained(place / "rewards").config
    backbone = place / "backbone" / "model.safetensors"
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(backbone.read_bytes())
    told = refusal(load_reward_model, tmp_path, tokenizer)
    assert "is a reward model, but lacks score.weight" in told


def test_an_adapter_that_peft_made_alone_is_loaded(place, tmp_path):
    peft = pytest.importorskip("peft")
    tokenizer = load_tokenizer(place / "backbone")
    load_base = AutoModelForSequenceClassification.from_pretrained
    base = load_base(place / "backbone", num_labels=4, pad_token_id=tokenizer.pad_token_id)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    ids = tokenizer(f"\n\nHuman: {ASKED}\n\nAssistant: 9", return_tensors="pt").input_ids
    end = torch.tensor([[tokenizer.eos_token_id]])
    with torch.no_grad():
        expected = model(torch.cat([ids, end], dim=1)).logits
    found = load(tmp_path, device="cpu").score(ASKED, ["9"]).quantiles
    assert found.shape == (1, 4) and (found - expected).abs().max() < 1e-5
    told = refusal(load, tmp_path, dtype=torch.bfloat16)
    assert "dtype: an adapter is loaded without; leave it out." in told
    base = load_base(place / "backbone", num_labels=4)
    bare = peft.get_peft_model(base, peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=2))
    bare.save_pretrained(tmp_path / "bare")
    assert "is an adapter without a head" in refusal(load, tmp_path / "bare")
