"What a trainer takes from its model, what it refuses, and who may train in a folder."

# ruff: noqa: F401, F811

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from test_model import backbone, refusal, tokenizer
from transformers import TrainingArguments

from qr_rlhf import resume
from qr_rlhf.data import encode_pairs
from qr_rlhf.losses import (
    PURM,
    CategoricalDPL,
    DistributionalObjective,
    NormalDPL,
    PaperObjective,
)
from qr_rlhf.model import load_reward_model, read_link, score
from qr_rlhf.resume import hold, train_to
from qr_rlhf.runs import open_run
from qr_rlhf.training import PairTrainer, score_pairs, training_arguments

ASK = "\n\nHuman: My bread is flat.\n\nAssistant:"
ONCE = dict(eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
FAST = ONCE | dict(disable_tqdm=True, per_device_train_batch_size=4, learning_rate=1e-2)


@pytest.fixture
def pairs(tokenizer):
    rows = [dict(prompt=ASK, chosen=f" {i} loaves.", rejected=" No.") for i in range(8)]
    return encode_pairs(Dataset.from_list(rows), tokenizer, 64)[0]


@pytest.fixture
def make(backbone, tokenizer, pairs, tmp_path):
    "Makes a trainer of a model with a head, on an objective."

    def make(objective=None, steps=3, folder=tmp_path / "work", arguments=None, **head):
        model = load_reward_model(backbone, tokenizer, **head)
        args = arguments or training_arguments(folder, steps, **FAST | dict(warmup_steps=0))
        data = dict(train_dataset=pairs, processing_class=tokenizer)
        return PairTrainer(model, args, objective=objective, **data)

    return make


@pytest.mark.parametrize(
    ("head", "objective"),
    [
        (dict(n=1), PaperObjective(target="none")),
        (dict(n=10), PaperObjective()),
        (dict(n=5, family="normal"), DistributionalObjective(n=5)),
        (dict(n=10, family="free"), DistributionalObjective(family="free")),
    ],
)
def test_the_model_decides_what_it_learns_where_nothing_is_said(make, head, objective):
    assert make(**head).objective == objective


@pytest.mark.parametrize(
    ("objective", "head"),
    [
        (DistributionalObjective(), dict(n=2)),
        (DistributionalObjective(), dict(n=10)),
        (DistributionalObjective(), dict(n=5, family="normal")),
        (DistributionalObjective(family="free"), dict(n=10)),
        (PaperObjective(), dict(n=10, family="normal")),
        (PaperObjective(), dict(n=10, family="free")),
        (PURM(), dict(n=2)),
        (CategoricalDPL(), dict(n=10)),
    ],
    ids=str,
)
def test_a_model_that_is_read_otherwise_is_not_trained(make, objective, head):
    assert "reads outputs otherwise than the model" in refusal(make, objective, **head)


@pytest.mark.parametrize(
    ("objective", "head", "link"),
    [
        (None, dict(n=1), "mean"),
        (PaperObjective(link="distributional"), dict(n=10), "distributional"),
        (None, dict(n=10, family="normal"), "distributional"),
        (DistributionalObjective(link="mean"), dict(n=10, family="normal"), "mean"),
        (PURM(), dict(n=10, family="normal"), "distributional"),
        (NormalDPL(), dict(n=10, family="normal"), None),
    ],
    ids=str,
)
def test_a_checkpoint_says_all_that_is_needed(
    make,
    tokenizer,
    pairs,
    tmp_path,
    objective,
    head,
    link,
):
    "Number, family, link and length: nothing is given again, and nothing changes."
    trainer = make(objective, max_length=48, **head)
    trainer.train()
    trainer.save_model(str(tmp_path / "rm"))
    again = load_reward_model(tmp_path / "rm", tokenizer)
    config = again.config
    assert (config.reward_max_length, read_link(config)) == (48, link)
    assert config.quantile_family == head.get("family")
    trained = score(trainer.model, tokenizer, ASK, [" 3 loaves.", " No."])
    assert trained.shape == (2, head["n"])
    assert torch.equal(score(again, tokenizer, ASK, [" 3 loaves.", " No."]), trained)
    in_pairs = score_pairs(again, tokenizer, pairs.select([3]), disable_tqdm=True)[0]
    assert (torch.from_numpy(in_pairs) - trained).abs().max() < 1e-5
    kept = {name: getattr(config, name) for name in ("quantile_levels", "quantile_link")}
    assert kept == {name: getattr(again.config, name) for name in kept}


def test_an_old_checkpoint_is_what_it_was(make, tokenizer, tmp_path):
    "Without a link and a length in its configuration."
    model = make(n=10).model
    expected = score(model, tokenizer, ASK, [" 3 loaves."])
    for name in ("quantile_link", "reward_max_length"):
        model.config.__dict__.pop(name, None)
    model.save_pretrained(tmp_path / "old")
    assert "quantile_link" not in (tmp_path / "old" / "config.json").read_text()
    for n in (10, None):
        old = load_reward_model(tmp_path / "old", tokenizer, n)
        assert torch.equal(score(old, tokenizer, ASK, [" 3 loaves."]), expected)
        assert read_link(old.config) == "mean"


def test_steps_are_the_steps_that_are_trained(make, tmp_path):
    trainer = make(n=1, steps=5)  # two steps an epoch
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 5
    told = refusal(training_arguments, tmp_path, 5, num_train_epochs=2)
    assert "steps says how long to train" in told


@pytest.mark.parametrize("warm_up", [0, 2, 3, 500])
def test_a_warm_up_as_long_as_the_training_is_said(make, tmp_path, capsys, warm_up):
    make(n=1, arguments=training_arguments(tmp_path, 3, warmup_steps=warm_up, **FAST)).train()
    said = "warmup_steps: all 3 steps of this training are warm-up"
    assert (said in capsys.readouterr().out) == (warm_up >= 3)


def test_pairs_beyond_the_positions_are_refused(make, tokenizer, pairs):
    trainer = make(n=1)
    long = pairs.map(lambda row: dict(prompt_ids=row["prompt_ids"] * 40))
    for train, valid in ((long, None), (pairs, long)):
        data = dict(train_dataset=train, eval_dataset=valid, processing_class=tokenizer)
        told = refusal(PairTrainer, trainer.model, trainer.args, **data)
        assert re.search(r"max_length: \d+ is more than the model's 64 positions", told)


def test_processes_that_would_train_alone_are_stopped(make, tmp_path, monkeypatch):
    alone = TrainingArguments(str(tmp_path / "alone"), report_to="none")
    assert alone.world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = refusal(make, n=1, arguments=alone)
    assert "processes: 2 were started, but each would train alone" in told


def test_two_trainings_do_not_share_a_folder(make, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "PATIENCE", 0.1)
    with hold(tmp_path / "rm.working"):
        told = refusal(train_to, tmp_path / "rm", lambda work: make(n=1, folder=work))
        assert "rm.working: another process is working here" in told
        monkeypatch.setenv("RANK", "1")  # the first process holds the folder for all
        with hold(tmp_path / "rm.working"):
            pass
    monkeypatch.undo()
    assert train_to(tmp_path / "rm", lambda work: make(n=1, folder=work))
    assert [path.name for path in tmp_path.glob("rm*")] == ["rm"]


SECOND = """
import os, sys
from qr_rlhf.runs import open_run

os.environ["RANK"] = "1"
lock = open_run(sys.argv[1], dict(any=2))  # which the first process would refuse
lock.release(force=True)
print("done")
del os.environ["RANK"]
open_run(sys.argv[1], dict(any=1))
"""


def test_a_second_process_neither_fails_nor_lets_go_of_a_run(tmp_path):
    lock = open_run(tmp_path / "run", dict(any=1))
    begun = tmp_path / "run" / ".figure.123.png"
    begun.touch()  # the first process is writing
    command = [sys.executable, "-c", SECOND, str(tmp_path / "run")]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.stdout == "done\n" and begun.exists()
    assert "run: another process is working here" in found.stderr  # the first still holds it
    assert json.loads((tmp_path / "run" / "settings.json").read_text()) == dict(any=1)
    lock.release()


def test_the_scalar_model_learns_bradley_terry_alone(make):
    trainer = make(n=1)
    batch = trainer.data_collator(list(trainer.train_dataset)[:4])
    model = trainer.model.eval()
    loss, outputs = trainer.compute_loss(model, copy.copy(batch), return_outputs=True)
    by_hand = torch.nn.functional.softplus(outputs[:, 1, 0] - outputs[:, 0, 0]).mean()
    assert torch.isclose(loss, by_hand)


def test_weights_of_a_loss_that_is_not_finite_are_not_saved(make, tmp_path):
    "Losses are read when something is logged or saved, whichever comes first."
    often = FAST | dict(save_strategy="steps", save_steps=1, logging_steps=10, warmup_steps=0)
    args = training_arguments(tmp_path / "inf", 3, **often)
    trainer = make(PaperObjective(weight=float("inf")), arguments=args, n=10)
    with pytest.raises(FloatingPointError, match="the loss is inf at step 0"):
        trainer.train()
    assert not list((tmp_path / "inf").glob("checkpoint-*"))
