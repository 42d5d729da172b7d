"""What tests hold on the CPU, on a GPU.

GPU=1 pytest tests/test_gpu.py
"""

# ruff: noqa: F401, F811

import pytest
import torch
from test_library import PAIRS, place
from test_packing import KINDS, tiny
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from qr_rlhf import load, train
from qr_rlhf.losses import OBJECTIVES
from qr_rlhf.packing import (
    collate_shared,
    packed_outputs,
    separate_outputs,
    shared_quantiles,
    shares_prompt,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and GPU=1")
QUICK = dict(disable_tqdm=True, learning_rate=1e-3, epochs=4)
ASKED = "Name a number, Hal."
ROWS = [([5, 6, 7, 8], [[9, 10, 11, 1], [12, 1]]), ([13], [[14, 1], [15, 16, 1]])]
RATED = [
    dict(prompt=f"Name a number, {name}.", responses=["9", "5", "1"], ratings=[[5, 4], 3, [1]])
    for name in ("Ann", "Bo", "Cy", "Di")
]
PRECISIONS = {"float32": 1e-4, "bfloat16": 0.05}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_and_scores_as_on_the_cpu(place, objective, precision):
    folder = place / f"{objective}-{precision}"
    model = train(place / "backbone", PAIRS, folder, objective, precision=precision, **QUICK)
    assert model.model.device.type == "cuda" and model.model.dtype == torch.float32
    there, here = model, load(folder, device="cpu")
    scores = [m.score(ASKED, ["9", "5", "1"]).quantiles for m in (there, here)]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)
    assert there.evaluate(PAIRS) == pytest.approx(here.evaluate(PAIRS), rel=1e-3, abs=1e-3)
    assert here.model.device.type == "cpu"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ratings_and_rankings_train(place, precision):
    folder = place / f"rated-{precision}"
    rankings = [dict(prompt="Name a number.", responses=["9", "5", "1"], ranking=[0, 1, 2])]
    how = dict(objective="distributional", precision=precision, validation=None)
    model = train(place / "backbone", RATED + rankings, folder, **how, **QUICK)
    assert model.score(ASKED, ["9", "1"]).quantiles.isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lora_trains_and_is_loaded(place, precision):
    folder = place / f"lora-{precision}"
    how = dict(precision=precision, lora_rank=4)
    model = train(place / "backbone", PAIRS, folder, **how, **QUICK)
    scores = [m.score(ASKED, ["9", "1"]).quantiles for m in (model, load(folder, "cpu"))]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_prompt_gives_what_separate_sequences_give(kind, precision):
    model = tiny(kind, KINDS[kind]).to("cuda", getattr(torch, precision))
    assert shares_prompt(model, 0, longest=64)
    batch = {name: values.to("cuda") for name, values in collate_shared(ROWS, 0).items()}
    packed = shared_quantiles(model, batch).float()
    separate = separate_outputs(model, ROWS, 0).unflatten(0, (2, 2)).float()
    assert (packed - separate).abs().max() < PRECISIONS[precision] * separate.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_of_any_length_are_right_where_heads_share_a_key(precision):
    "PyTorch's fused attention is wrong for 33, 65, ... tokens with a mask (pytorch#191937)."
    exact = tiny("llama", KINDS["llama"])
    model = tiny("llama", KINDS["llama"]).to("cuda", getattr(torch, precision))
    for longer in range(64):
        rows = [([5, 6, 7, 8] * 5, [[9, 10, 11, 1] * 2, [12] * longer + [1]])]
        here, there = (packed_outputs(m, rows, 0).float().cpu() for m in (exact, model))
        assert (here - there).abs().max() < PRECISIONS[precision] * here.abs().max()


def test_gradients_of_a_shared_prompt_are_the_same():
    model = tiny("gpt2", KINDS["gpt2"]).cuda()

    def gradients(outputs):
        model.zero_grad()
        weights = torch.linspace(-1, 1, outputs.numel(), device="cuda").view_as(outputs)
        (weights * outputs).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    batch = {name: values.cuda() for name, values in collate_shared(ROWS, 0).items()}
    packed = gradients(shared_quantiles(model, batch))
    separate = gradients(separate_outputs(model, ROWS, 0).unflatten(0, (2, 2)))
    assert (packed - separate).abs().max() < 1e-5 * separate.abs().max()


class Stop(TrainerCallback):
    "Ends the training after some steps, as a person would."

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def weights(model):
    return {name: values.cpu() for name, values in model.model.state_dict().items()}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_interrupted_training_ends_as_an_uninterrupted_one(place, precision):
    how = dict(precision=precision, batch_size=4, evaluations=4, **QUICK)
    given = place / "backbone", PAIRS
    through = train(*given, place / f"through-{precision}", **how)
    with pytest.raises(KeyboardInterrupt):
        train(*given, place / f"stopped-{precision}", callbacks=[Stop()], **how)
    went_on = train(*given, place / f"stopped-{precision}", **how)
    torch.testing.assert_close(weights(went_on), weights(through), atol=0, rtol=0)


def test_many_prompts_are_scored_alike_in_any_batch(place):
    folder = place / "many"
    model = train(place / "backbone", PAIRS, folder, **QUICK)
    prompts = [f"Name a number, {name}." for name in ("Ann", "Bo", "Cy", "Di")] * 8
    responses = [[str(i % 10), str(i % 7), "5"] for i in range(32)]
    together = model.score_many(prompts, responses)
    one_by_one = [model.score(p, r) for p, r in zip(prompts, responses, strict=True)]
    for many, one in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(many.quantiles, one.quantiles, atol=1e-4, rtol=1e-4)


def test_a_compiled_training_ends_where_a_plain_one_does(place):
    how = dict(batch_size=4, **QUICK)
    plain = train(place / "backbone", PAIRS, place / "plain", **how)
    counters.clear()
    compiled = train(place / "backbone", PAIRS, place / "compiled", torch_compile=True, **how)
    assert counters["stats"]["unique_graphs"] > 0
    scores = [m.score(ASKED, ["9", "1"]).quantiles for m in (plain, compiled)]
    torch.testing.assert_close(*scores, atol=1e-2, rtol=1e-2)
