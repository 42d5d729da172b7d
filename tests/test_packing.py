"A packed row gives what separate sequences give: for every kind of model that takes it."

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from qr_rlhf.packing import (
    collate_shared,
    reading_at,
    separate_outputs,
    shared_mask,
    shared_quantiles,
    shares_prompt,
)

SIZE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
DECODER = dict(SIZE, num_key_value_heads=1, max_position_embeddings=128)
KINDS = {
    "gpt2": dict(n_embd=32, n_layer=2, n_head=2, n_positions=128),
    "llama": DECODER,
    "qwen2": DECODER,
    "mistral": dict(DECODER, sliding_window=4096),
    "gemma": dict(DECODER, head_dim=16),
    "gemma2": dict(DECODER, head_dim=16, sliding_window=4096),
}


def tiny(kind, sizes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=99, num_labels=10, pad_token_id=0, **sizes)
    return AutoModelForSequenceClassification.from_config(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("prompt", [[5, 6, 7, 8], []], ids=["prompt", "no_prompt"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_gives_what_separate_sequences_give(kind, prompt):
    model = tiny(kind, KINDS[kind])
    assert shares_prompt(model, 0, longest=64)
    rows = [(prompt, [[9, 10, 11, 1], [12, 1]]), ([13], [[14, 1], [15, 16, 1]])]
    packed = shared_quantiles(model, collate_shared(rows, 0))
    separate = separate_outputs(model, rows, 0).unflatten(0, (2, 2))
    assert (packed - separate).abs().max() < 2e-6


def test_gradients_are_the_same():
    model = tiny("gpt2", KINDS["gpt2"])
    rows = [([5, 6, 7, 8], [[9, 10, 11, 1], [12, 1]]), ([13], [[14, 1], [15, 16, 1]])]

    def gradients(outputs):
        model.zero_grad()
        weights = torch.linspace(-1, 1, outputs.numel()).view_as(outputs)
        (weights * outputs).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    packed = gradients(shared_quantiles(model, collate_shared(rows, 0)))
    separate = gradients(separate_outputs(model, rows, 0).unflatten(0, (2, 2)))
    assert (packed - separate).abs().max() < 1e-5 * separate.abs().max()


def test_windows_and_encoders_are_found_out():
    narrow = tiny("mistral", dict(DECODER, sliding_window=16))
    assert not shares_prompt(narrow, 0, longest=64)
    assert shares_prompt(narrow, 0, longest=9)  # shorter than the window
    assert not shares_prompt(tiny("bert", SIZE), 0, longest=64)


def test_each_response_sees_its_own_sequence_and_no_more():
    prompt, responses = [5, 6, 7], [[8, 9, 1], [10, 1]]
    batch = collate_shared([(prompt, responses), ([2], [[3, 1], [4, 1]])], 0)
    mask = shared_mask(batch["segments"])[:, 0]
    for k, response in enumerate(responses):
        seen = mask[0, batch["ends"][0, k]] == 0
        assert batch["input_ids"][0, seen].tolist() == prompt + response
        assert batch["position_ids"][0, seen].tolist() == list(range(len(prompt + response)))
    assert (mask.diagonal(dim1=1, dim2=2) == 0).all()  # each token sees at least itself
    assert (batch["input_ids"].gather(1, batch["ends"]) == 1).all()
    assert collate_shared([([], [[7], [8, 9]])], 0)["position_ids"].tolist() == [[0, 0, 1]]


def test_a_model_is_left_as_it_was():
    model = tiny("gpt2", KINDS["gpt2"]).train()
    assert shares_prompt(model, 0, longest=64) and model.training
    ids = torch.tensor([[5, 6, 7, 1]])
    with pytest.raises(ZeroDivisionError), reading_at(model, torch.tensor([[1, 3]])):
        assert model(ids).logits.shape == (1, 20)
        raise ZeroDivisionError
    assert model(ids).logits.shape == (1, 10)
