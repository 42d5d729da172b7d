"What can be read from distributions; what reward models do with their settings, and refuse."

import copy
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
)

from qr_rlhf.data import encode_pairs
from qr_rlhf.model import (
    RewardDistribution,
    cvar_weights,
    interpolate_quantile,
    load_reward_model,
    load_tokenizer,
    normal_quantiles,
    read_quantiles,
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


@pytest.fixture
def batch(tokenizer):
    texts = [PROMPT + answer + tokenizer.eos_token for answer in ANSWERS]
    return tokenizer(texts, padding=True, return_tensors="pt")


def outputs_alone(model, batch, i):
    n = int(batch["attention_mask"][i].sum())
    return model(**{name: values[i : i + 1, :n] for name, values in batch.items()}).logits


@torch.no_grad()
def test_a_reward_does_not_depend_on_the_rest_of_the_batch(model, batch):
    together = model(**batch).logits
    alone = torch.cat([outputs_alone(model, batch, i) for i in range(len(ANSWERS))])
    assert (together - alone).abs().max() < 1e-6 and together.std() > 1e-3


@torch.no_grad()
def test_an_encoder_works_the_same_way(tokenizer, batch, tmp_path):
    sizes = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=64)
    sizes |= dict(num_attention_heads=2)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    bert = load_reward_model(tmp_path, tokenizer, n=10).eval()
    outputs = bert(**batch).logits
    assert outputs.shape == (len(ANSWERS), 10)
    assert (outputs_alone(bert, batch, 0) - outputs[:1]).abs().max() < 1e-6
    assert (to_scalar(bert)(**batch).logits[:, 0] - outputs.mean(-1)).abs().max() < 1e-6
    by_score = score(bert, tokenizer, PROMPT, ANSWERS)  # with a sequence for each response
    assert (by_score - outputs).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["normal", "free"])
def test_a_checkpoint_keeps_its_family(family, backbone, tokenizer, batch, tmp_path):
    load_reward_model(backbone, tokenizer, 10, family=family).save_pretrained(tmp_path)
    model = load_reward_model(tmp_path, tokenizer, 10).eval()
    outputs = model(**batch).logits
    expected = normal_quantiles(outputs, 10) if family == "normal" else outputs.sort(-1).values
    assert model.config.quantile_family == family
    assert torch.equal(read_quantiles(outputs, model.config), expected)
    mean = to_scalar(model)(**batch).logits[:, 0]
    assert (mean - expected.mean(-1)).abs().max() < 1e-5


@torch.no_grad()
def test_a_folded_model_is_read_by_the_stock_class(model, batch, tmp_path):
    outputs = model(**batch).logits
    assert torch.equal(read_quantiles(outputs, model.config), outputs)
    to_scalar(model, cvar_weights(10, 0.2)).save_pretrained(tmp_path)
    tails = AutoModelForSequenceClassification.from_pretrained(tmp_path)(**batch).logits
    assert tails.shape == (len(ANSWERS), 1)
    assert (tails[:, 0] - RewardDistribution(outputs).cvar(0.2)).abs().max() < 1e-6
    assert model.config.num_labels == 10  # the original is what it was


def test_a_head_is_drawn_from_its_seed(backbone, tokenizer, model):
    same = load_reward_model(backbone, tokenizer, n=10, seed=0)
    other = load_reward_model(backbone, tokenizer, n=10, seed=1)
    assert torch.equal(same.score.weight, model.score.weight)
    assert not torch.equal(other.score.weight, model.score.weight)
    assert model.score.bias is None and model.score.weight.shape == (10, 32)


def test_dropout_is_the_backbones_or_what_is_asked_for(backbone, tokenizer, model, tmp_path):
    example = dict(input_ids=torch.arange(8)[None], attention_mask=torch.ones(1, 8))
    dropping = load_reward_model(backbone, tokenizer, n=10, dropout=0.5).train()
    model.train()
    assert torch.equal(model(**example).logits, model(**example).logits)
    assert not torch.equal(dropping(**example).logits, dropping(**example).logits)
    sizes = dict(hidden_size=32, num_hidden_layers=1, intermediate_size=64)
    sizes |= dict(num_attention_heads=2)
    LlamaModel(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path)
    load_reward_model(tmp_path, tokenizer, 10, dropout=0)
    told = refusal(load_reward_model, tmp_path, tokenizer, 10, dropout=0.5)
    assert "no dropout layers" in told


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


def test_readings_by_hand():
    agreed = RewardDistribution(torch.linspace(-0.18, 0.18, 10))
    divided = RewardDistribution(
        torch.tensor([-1.2, -1.1, -1.0, -0.9, -0.8, 0.8, 0.9, 1.0, 1.1, 1.2])
    )
    assert divided.quantile(0.05) == divided.quantiles[0]
    assert torch.isclose(divided.quantile(0.95), divided.quantiles[9])
    assert torch.isclose(divided.quantile(0.1), torch.tensor(-1.15))
    assert torch.isclose(agreed.quantile(0.3), torch.tensor(-0.08))
    assert torch.isclose(divided.cvar(0.2), torch.tensor(-1.15))
    assert torch.isclose(divided.cvar(1.0), divided.mean(), atol=1e-6)
    assert np.allclose(cvar_weights(10, 0.25), [0.4, 0.4, 0.2] + [0] * 7)
    both = agreed.prob_beats(divided) + divided.prob_beats(agreed)
    assert torch.isclose(both, torch.tensor(1.0))


def test_crossing_and_rearrangement():
    rows = RewardDistribution(torch.tensor([[0.0, 2.0, 1.0, 3.0], [0.0, 1.0, 2.0, 3.0]]))
    assert torch.allclose(rows.crossing_rate(), torch.tensor([1 / 3, 0.0]))
    assert rows.rearranged().crossing_rate().sum() == 0
    assert torch.allclose(rows.rearranged().mean(), rows.mean())
    one = RewardDistribution(torch.tensor([[3.0]]))
    assert one.quantile(0.5) == 3 and one.crossing_rate() == 0


def test_interpolation_goes_on_beyond_the_last_level():
    assert interpolate_quantile(np.array([0.0, 1.0]), 0.9) == 0.9 * 2 - 0.5
    assert interpolate_quantile(np.array([[7.0]]), 0.9) == 7


def test_normal_quantiles_are_symmetric():
    up, down = normal_quantiles(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 10)
    assert torch.allclose(up, -down.flip(-1), atol=1e-6)


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


def test_score_in_parts_and_by_messages(tokenizer, model):
    found = score(model, tokenizer, PROMPT, ANSWERS)
    parts = score(model, tokenizer, PROMPT, ANSWERS, row_tokens=12)
    assert (parts - found).abs().max() < 1e-5
    asked = [dict(role="user", content="My bread is flat.")]
    replies = [answer.strip() for answer in ANSWERS]
    assert torch.equal(score(model, tokenizer, asked, replies), found)
    replies = [[dict(role="assistant", content=reply)] for reply in replies]
    assert torch.equal(score(model, tokenizer, asked, replies), found)


def test_score_follows_the_chat_template(tokenizer, model):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    asked = [dict(role="user", content="My bread is flat.")]
    dialogue = [*asked, dict(role="assistant", content="No.")]
    as_written = chat.apply_chat_template(dialogue, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**as_written).logits
    assert (score(model, chat, asked, ["No."]) - outputs).abs().max() < 1e-5
    in_text = score(model, tokenizer, PROMPT, [" No."])
    assert (outputs - in_text).abs().max() > 1e-3


def test_score_and_score_pairs_agree(tokenizer, model):
    found = score(model, tokenizer, PROMPT, ANSWERS)
    pair = dict(prompt=PROMPT, chosen=ANSWERS[1], rejected=ANSWERS[2])
    encoded, _ = encode_pairs(Dataset.from_list([pair]), tokenizer, 64)
    by_pairs = score_pairs(model, tokenizer, encoded, disable_tqdm=True)[0]
    assert np.abs(by_pairs - found[[1, 2]].numpy()).max() < 1e-5
