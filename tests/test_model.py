"What reward models refuse, and in which words; what their settings do."

import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaModel

from qr_rlhf.data import encode_pairs
from qr_rlhf.model import (
    RewardDistribution,
    cvar_weights,
    load_reward_model,
    load_tokenizer,
    score,
    tiny_gpt2,
    to_scalar,
    train_tokenizer,
)
from qr_rlhf.training import score_pairs

PROMPT = "\n\nHuman: My bread is flat.\n\nAssistant:"
ANSWERS = [" Try fresh yeast.", " Buy some bread.", " Let it rise for an hour.", " No."]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = train_tokenizer([PROMPT + answer for answer in ANSWERS], vocab_size=300)
    tokenizer.save_pretrained(folder)
    tiny_gpt2(tokenizer, 64, n_layer=2, n_embd=32, n_head=2, seed=0).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(backbone):
    return load_tokenizer(backbone)


@pytest.fixture
def model(backbone, tokenizer):
    return load_reward_model(backbone, tokenizer, n=10).eval()


def refusal(function, *args, **kwargs):
    "The sentence with which `function` refuses its arguments."
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_head_is_drawn_from_its_seed(backbone, tokenizer, model):
    same = load_reward_model(backbone, tokenizer, n=10, seed=0)
    other = load_reward_model(backbone, tokenizer, n=10, seed=1)
    assert torch.equal(same.score.weight, model.score.weight)
    assert not torch.equal(other.score.weight, model.score.weight)
    assert model.score.bias is None and model.score.weight.shape == (10, 32)


def test_dropout_is_the_backbones_own_or_what_is_asked_for(backbone, tokenizer, model, tmp_path):
    example = dict(input_ids=torch.arange(8)[None], attention_mask=torch.ones(1, 8))
    dropping = load_reward_model(backbone, tokenizer, n=10, dropout=0.5).train()
    model.train()
    assert torch.equal(model(**example).logits, model(**example).logits)
    assert not torch.equal(dropping(**example).logits, dropping(**example).logits)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    LlamaModel(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path)
    load_reward_model(tmp_path, tokenizer, 10, dropout=0)
    assert "no dropout layers" in refusal(load_reward_model, tmp_path, tokenizer, 10, dropout=0.5)


def test_what_cannot_be_had_is_said_within_seconds(tokenizer, tmp_path):
    start = time.time()
    message = refusal(load_reward_model, "nobody/no-such-model", tokenizer, 1)
    assert "can't be had from the Hub" in message and time.time() - start < 20
    assert "can't be loaded" in refusal(load_tokenizer, tmp_path)


def test_a_tokenizer_has_a_padding_token_of_its_own(backbone, tmp_path):
    tokenizer = load_tokenizer(backbone)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_trained_model_is_not_loaded_with_other_outputs(backbone, tokenizer, tmp_path):
    for family in ("free", None):
        load_reward_model(backbone, tokenizer, 10, family=family).save_pretrained(tmp_path)
        assert "give n=10" in refusal(load_reward_model, tmp_path, tokenizer, 1)


def test_distributions_refuse_what_they_cannot_read():
    distribution = RewardDistribution(torch.arange(10.0))
    assert "outside the 10 predicted levels" in refusal(distribution.quantile, 0.01)
    assert "alpha" in refusal(distribution.cvar, 0)


def test_weights_fit_the_outputs(backbone, tokenizer, model):
    assert "give 10" in refusal(to_scalar, model, [1, 2])
    normal = load_reward_model(backbone, tokenizer, 10, family="normal")
    assert "leave weights out" in refusal(to_scalar, normal, cvar_weights(2, 0.5))


def test_score_refuses_what_does_not_fit(tokenizer, model):
    assert "response 1 has" in refusal(score, model, tokenizer, PROMPT, [" Yes.", " 9" * 200])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert "give messages" in refusal(score, model, tokenizer, "Name a number.", ["I say 7."])


def test_score_and_score_pairs_agree(tokenizer, model):
    found = score(model, tokenizer, PROMPT, ANSWERS)
    pair = dict(prompt=PROMPT, chosen=ANSWERS[1], rejected=ANSWERS[2])
    encoded, _ = encode_pairs(Dataset.from_list([pair]), tokenizer, 64)
    by_pairs = score_pairs(model, tokenizer, encoded, disable_tqdm=True)[0]
    assert np.abs(by_pairs - found[[1, 2]].numpy()).max() < 1e-5
