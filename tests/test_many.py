"Groups of responses, trained by their comparisons and ratings."

# ruff: noqa: F401, F811

import contextlib
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_model import backbone, refusal, tokenizer
from test_training import FAST
from transformers import AutoModelForSequenceClassification

from qr_rlhf.data import encode_dialogues, sequence_ends
from qr_rlhf.judgements import measure
from qr_rlhf.large import keep_adapter, trainable_model
from qr_rlhf.losses import OBJECTIVES
from qr_rlhf.many import SCALE_FILE, read_scale
from qr_rlhf.model import load_reward_model
from qr_rlhf.resume import train_to
from qr_rlhf.training import PairTrainer, score_pairs, training_arguments

ASK = "\n\nHuman: My bread is {}.\n\nAssistant:"
VOTES = dict(first=[0, 2, 1], second=[1, 0, 3], share=[1.0, 0.75, 1.0])
STARS = dict(rated=[0, 3, 3, 1], rating=[4, 0, 2, 3])
TWICE = dict(rated=[0, 0, 3, 3, 1], rating=[4, 3, 0, 2, 3])  # of two responses
ONCE = dict(rated=[0, 3, 1], rating=[4, 2, 3])
MANY = 51  # groups of which each has two responses with two ratings
NO_VOTES, NO_STARS = dict(first=[], second=[], share=[]), dict(rated=[], rating=[])


@pytest.fixture
def groups(tokenizer):
    "Makes a table of groups of four responses."

    def make(judged, n=12):
        ends, rows = sequence_ends(tokenizer), []
        for i in range(n):
            texts = [" Try it." * (1 + (i + k) % 3) for k in range(4)]
            dialogue = ASK.format("flat " * (i % 4)), texts
            (found,) = encode_dialogues(tokenizer, ends, [dialogue], 64)
            rows.append(dict(zip(("prompt_ids", "response_ids"), found, strict=True)) | judged)
        return Dataset.from_list(rows)

    return make


@pytest.fixture
def make(backbone, tokenizer):
    "Makes a trainer on groups, or on pairs."

    def make(folder, train, valid=None, name="paper", model=None, shared=None, **kwargs):
        objective, n = OBJECTIVES[name]
        family = getattr(objective, "family", None)
        n = 10 if family == "normal" else n
        model = model or load_reward_model(backbone, tokenizer, n, dropout=0.0, family=family)
        args = training_arguments(folder, 6, 3 if valid else 0, **kwargs)
        data = dict(train_dataset=train, eval_dataset=valid, processing_class=tokenizer)
        return PairTrainer(model, args, objective=objective, shared=shared, **data)

    return partial(make, **FAST | dict(warmup_steps=0))


def as_pairs(table):
    rows = []
    for row in table:
        for first, second, share in zip(row["first"], row["second"], row["share"], strict=True):
            chosen, rejected = row["response_ids"][first], row["response_ids"][second]
            sides = dict(chosen_ids=chosen, rejected_ids=rejected, share=share)
            rows.append(dict(prompt_ids=row["prompt_ids"]) | sides)
    return Dataset.from_list(rows)


def loss_and_gradients(trainer):
    model, rows = trainer.model.eval(), list(trainer.train_dataset)
    model.zero_grad()
    loss = trainer.compute_loss(model, trainer.data_collator(rows))
    loss.backward()
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["scalar", "paper", "distributional", "free", "purm"])
def test_groups_cost_and_teach_what_their_pairs_do(make, groups, tmp_path, name, shared):
    table = groups(VOTES | NO_STARS, n=3)
    found, slope = loss_and_gradients(make(tmp_path, table, name=name, shared=shared))
    expected, slopes = loss_and_gradients(make(tmp_path, as_pairs(table), name=name))
    assert torch.isclose(found, expected, atol=1e-6)
    assert (slope - slopes).abs().max() < 1e-4 * slopes.abs().max()


def test_votes_and_ratings_count_alike(make, groups, tmp_path):
    "The mean over all judgements: of three votes and four ratings a row."
    losses = {}
    for which, judged in dict(v=VOTES | NO_STARS, r=NO_VOTES | STARS, b=VOTES | STARS).items():
        trainer = make(tmp_path, groups(judged))
        losses[which] = loss_and_gradients(trainer)[0]
    assert torch.isclose(losses["b"], (3 * losses["v"] + 4 * losses["r"]) / 7)
    own = [row | dict(rated=[2], rating=[1]) for row in groups(NO_VOTES | STARS, 1)]
    uneven = [*groups(NO_VOTES | STARS, 1), *own]  # five ratings in two rows
    trainer = make(tmp_path, Dataset.from_list(uneven))
    model, batch = trainer.model.eval(), trainer.data_collator
    parts = [trainer.compute_loss(model, batch([row])) for row in uneven]
    assert torch.isclose(
        trainer.compute_loss(model, batch(uneven)), (4 * parts[0] + parts[1]) / 5
    )


def test_an_evaluation_does_not_hang_on_its_batches(make, groups, tmp_path):
    rows = [*groups(VOTES | STARS, 5), *groups(VOTES | dict(rated=[1], rating=[2]), 4)]
    valid, found = Dataset.from_list(rows), []
    for size in (1, 4):
        trainer = make(tmp_path, groups(STARS | VOTES), valid, per_device_eval_batch_size=size)
        found.append(trainer.evaluate())
    for name in ("eval_loss", "eval_accuracy", "eval_margin"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-5)
    whole = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(rows))
    assert found[0]["eval_loss"] == pytest.approx(whole.item(), abs=1e-5)
    pairs = make(tmp_path, as_pairs(valid), as_pairs(valid)).evaluate()
    assert found[0]["eval_accuracy"] == pytest.approx(pairs["eval_accuracy"])
    assert "eval_accuracy" not in trainer.evaluate(groups(NO_VOTES | STARS))


def test_every_vote_counts_in_the_log_in_evaluation_and_afterwards(make, groups, tmp_path):
    votes = dict(first=[0, 1, 2, 2], second=[1, 2, 3, 0], share=[0.9, 0.25, 0.5, 1.0])
    table = groups(NO_STARS | votes, 8)
    for data in (table, as_pairs(table)):
        still = dict(learning_rate=0.0, lr_scheduler_type="constant", logging_steps=1)
        batches = dict(per_device_train_batch_size=len(data), per_device_eval_batch_size=5)
        trainer = make(tmp_path, data, data, **still | batches)
        trainer.train()
        logged = trainer.state.log_history[0]
        evaluated = trainer.evaluate()
        quantiles = score_pairs(trainer.model, trainer.processing_class, as_pairs(table))
        after = measure(quantiles, "mean", as_pairs(table)["share"][:])
        right = (quantiles.mean(-1)[:, 0] > quantiles.mean(-1)[:, 1]).reshape(-1, 4)
        by_hand = np.where(right, votes["share"], 1 - np.array(votes["share"])).mean()
        assert not np.isclose(by_hand, right.mean(), atol=0.01)  # votes and pairs differ
        for found in (logged["accuracy"], evaluated["eval_accuracy"], after["accuracy"]):
            assert found == pytest.approx(by_hand, abs=1e-5)
        assert logged["margin"] == pytest.approx(after["margin"], abs=1e-5)
        assert evaluated["eval_margin"] == pytest.approx(after["margin"], abs=1e-5)
        assert evaluated["eval_loss"] > after["nll"]  # the paper's objective regresses, too


@pytest.mark.parametrize(
    "judged",
    [NO_VOTES | STARS, VOTES | STARS, NO_VOTES | TWICE],
    ids=["alone", "votes", "twice"],
)
def test_a_finished_checkpoint_is_stock_and_knows_its_scale(make, groups, tmp_path, judged):
    table = groups(judged, MANY)
    trainer = make(tmp_path, table, table)
    before = trainer.scale.thresholds().detach()
    trainer.train()
    assert not hasattr(trainer.model, "rating_scale")
    trainer.save_model(str(tmp_path / "rm"))
    stock = AutoModelForSequenceClassification
    model, info = stock.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert not (tmp_path / "rm" / SCALE_FILE).exists()
    scale = read_scale(model.config)
    assert torch.allclose(scale.thresholds(), trainer.scale.thresholds(), atol=1e-6)
    assert (scale.thresholds() - before).abs().min() > 1e-4  # each was learnt
    assert (model.config.rating_noise == 1) == (judged["first"] == [])
    effect = model.config.rating_effect
    assert effect is None if judged["rated"] == STARS["rated"] else abs(effect - 1) > 0.01
    again = make(tmp_path, None, table, model=model)  # and an evaluation reads it
    assert again.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])


class Stopped(Exception):
    pass


def stopping(trainer, step):
    "A trainer that is killed while it writes a checkpoint."

    def stop(output_dir):
        if trainer.state.global_step == step:
            raise Stopped

    save = trainer._save_rng_state
    trainer._save_rng_state = lambda output_dir: (stop(output_dir), save(output_dir))
    return trainer


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_a_killed_training_goes_on_to_the_same_scale(
    make,
    groups,
    backbone,
    tokenizer,
    tmp_path,
    adapter,
):
    table, finish = groups(VOTES | TWICE, MANY), []
    saves = dict(save_strategy="steps", eval_strategy="steps", load_best_model_at_end=True)
    if adapter:
        pytest.importorskip("peft")
        finish = [keep_adapter]

    def trainer(folder):
        model = trainable_model(backbone, tokenizer, 10, lora_rank=4) if adapter else None
        return make(folder, table, table, model=model, **saves)

    train_to(tmp_path / "whole", trainer, *finish)
    with contextlib.suppress(Stopped):
        train_to(tmp_path / "killed", lambda folder: stopping(trainer(folder), 4), *finish)
    assert (tmp_path / "killed.working" / "checkpoint-2" / SCALE_FILE).exists()
    train_to(tmp_path / "killed", trainer, *finish)
    models = [
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        for name in ("whole", "killed")
    ]
    whole, killed = (model.config for model in models)
    assert whole.rating_thresholds == killed.rating_thresholds
    assert whole.rating_noise == killed.rating_noise != 1
    assert whole.rating_effect == killed.rating_effect != 1
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in models]
    assert torch.equal(*weights)


def test_thresholds_are_learnt_at_the_learning_rate_of_a_large_model(make, groups, tmp_path):
    trainer = make(tmp_path, groups(NO_VOTES | STARS), learning_rate=1e-7)
    before = trainer.scale.thresholds().detach()
    trainer.train()
    assert (trainer.scale.thresholds() - before).abs().max() > 0.01


def test_a_response_effect_is_learnt_from_repeated_ratings_only(make, groups, tmp_path, capsys):
    trainer = make(tmp_path, groups(NO_VOTES | TWICE, MANY))
    assert "102 of 153 rated responses have several ratings" in capsys.readouterr().out
    trainer.train()
    trainer.save_model(str(tmp_path / "rm"))
    effect = trainer.scale.log_effect.exp().item()
    for few in (groups(NO_VOTES | ONCE, 200), groups(NO_VOTES | TWICE, 49)):
        assert make(tmp_path, few).scale.log_effect is None
    for judged in (ONCE, TWICE):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
        again = make(tmp_path, groups(NO_VOTES | judged, MANY), model=model)
        again.train()
        kept = again.scale.log_effect.exp().item()
        assert (kept == pytest.approx(effect)) == (judged is ONCE)


@pytest.mark.parametrize("shared", [True, False])
def test_repeated_ratings_cost_the_same_in_any_batch(make, groups, tmp_path, shared):
    table = groups(NO_VOTES | TWICE, MANY)
    trainer = make(tmp_path, table, table, shared=shared)
    model, batch = trainer.model.eval(), trainer.data_collator
    whole = trainer.compute_loss(model, batch(list(table)))
    parts = [trainer.compute_loss(model, batch([row])) for row in table]
    assert torch.isclose(whole, torch.stack(parts).mean(), atol=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole.item(), abs=1e-5)


def test_a_training_is_not_resumed_with_another_scale(make, groups, tmp_path):
    saves = dict(save_strategy="steps", eval_strategy="no")

    def trainer(judged, n):
        return lambda folder: make(folder, groups(NO_VOTES | judged, n), **saves)

    def killed(folder):
        return stopping(trainer(TWICE, MANY)(folder), 4)

    with contextlib.suppress(Stopped):
        train_to(tmp_path / "rm", killed)
    checkpoint = next((tmp_path / "rm.working").glob("checkpoint-*"))
    other = trainer(ONCE, MANY)(tmp_path / "other")
    assert "begun with a response effect" in refusal(other.load_scale, str(checkpoint))


def test_what_a_scale_cannot_read_is_refused(make, groups, tmp_path):
    pairs, stars = as_pairs(groups(VOTES | NO_STARS)), groups(NO_VOTES | STARS)
    trainer = make(tmp_path, pairs, stars)
    assert "the model was never trained on any" in refusal(trainer.evaluate)
    trained = make(tmp_path, groups(NO_VOTES | dict(rated=[0, 1], rating=[0, 1])))
    trained.save_model(str(tmp_path / "rm"))
    stock = AutoModelForSequenceClassification
    model = stock.from_pretrained(tmp_path / "rm")
    told = refusal(make, tmp_path, stars, model=model)
    assert "4 was found, but the categories here are the whole numbers from 0 to 1" in told


def test_rows_beyond_the_positions_are_refused(make, groups, tmp_path):
    long = groups(VOTES | NO_STARS).map(lambda row: dict(prompt_ids=row["prompt_ids"] * 9))
    assert "more than the model's 64 positions" in refusal(make, tmp_path, long)
