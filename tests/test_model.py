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
from transformers.activations import NewGELUActivation

from qr_rlhf.backbones import fuse_activations
from qr_rlhf.data import encode_pairs
from qr_rlhf.judgements import as_dialogues
from qr_rlhf.losses import OBJECTIVES
from qr_rlhf.model import (
    RewardDistribution,
    cvar_weights,
    interpolate_quantile,
    load_reward_model,
    load_tokenizer,
    normal_quantiles,
    read_link,
    read_quantiles,
    score,
    tiny_gpt2,
    to_scalar,
    train_tokenizer,
)
from qr_rlhf.training import score_pairs, training_arguments, warm_up_trainer

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


def written_out(model):
    "The activations of a model that `transformers` computes in eight operations."
    return [layer for layer in model.modules() if isinstance(layer, NewGELUActivation)]


def gradients(model, batch):
    model.zero_grad()
    model(**batch).logits.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_a_fused_activation_changes_nothing_but_time(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert len(written_out(stock)) == 2 and not written_out(model)
    assert stock.config.activation_function == model.config.activation_function == "gelu_new"
    assert (model(**batch).logits - stock(**batch).logits).abs().max() < 1e-6
    ours, theirs = gradients(model, batch), gradients(stock, batch)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_other_activations_are_left_alone():
    sizes = dict(vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    llama = LlamaModel(LlamaConfig(num_attention_heads=2, **sizes))
    before = str(llama)
    assert str(fuse_activations(llama)) == before


@pytest.mark.parametrize("way", ["warm-up", "scoring"])
def test_a_trainer_fuses_the_models_it_is_given(way, backbone, tokenizer, tmp_path):
    row = dict(prompt=PROMPT, chosen=ANSWERS[0], rejected=ANSWERS[1])
    pairs, _ = encode_pairs(Dataset.from_list([row]), tokenizer, 64)
    if way == "warm-up":
        args = training_arguments(tmp_path, 1)
        dialogues = as_dialogues(pairs)
        trained = warm_up_trainer(backbone, tokenizer, dialogues, args, dialogues).model
    else:
        load_reward_model(backbone, tokenizer, n=10).save_pretrained(tmp_path)
        trained = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        score_pairs(trained, tokenizer, pairs, disable_tqdm=True)
    assert not written_out(trained)


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


def test_a_trained_model_knows_its_outputs(backbone, tokenizer, tmp_path):
    for family in ("normal", "free", None):
        load_reward_model(backbone, tokenizer, 10, family=family).save_pretrained(tmp_path)
        config = load_reward_model(tmp_path, tokenizer).config
        assert len(config.quantile_levels) == 10 and config.quantile_family == family
        for other in (dict(n=1), dict(family="free" if family == "normal" else "normal")):
            told = refusal(load_reward_model, tmp_path, tokenizer, **other)
            own = f"is a reward model with n=10 and family={family!r}"
            assert f"{own}; leave n and family out" in told


def test_a_head_of_another_library_is_known_too(backbone, tokenizer, tmp_path):
    load = AutoModelForSequenceClassification.from_pretrained
    load(backbone, num_labels=3).save_pretrained(tmp_path)
    assert load_reward_model(tmp_path, tokenizer).config.num_labels == 3
    assert "leave n and family out" in refusal(load_reward_model, tmp_path, tokenizer, 10)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (dict(), "has no head yet; say how many quantiles it gets, such as n=10."),
        (dict(n=0), "n: 0 was given"),
        (dict(n=10, family="gauss"), "family: 'gauss' is unknown; choose normal, free"),
        (dict(n=10, max_length=65), "is more than the model's 64 positions; give at most 64."),
    ],
)
def test_heads_that_cannot_be_are_refused(head, words, backbone, tokenizer):
    assert words in refusal(load_reward_model, backbone, tokenizer, **head)


def test_relative_folders_count_from_the_working_folder(
    backbone, tokenizer, tmp_path, monkeypatch
):
    (tmp_path / "settings.ini").touch()  # what the project once took for its own root
    (tmp_path / "here").mkdir()
    for seed, folder in enumerate((tmp_path, tmp_path / "here")):
        load_reward_model(backbone, tokenizer, 10, seed).save_pretrained(folder / "rm")
        tokenizer.save_pretrained(folder / "rm")
    monkeypatch.chdir(tmp_path / "here")
    found = load_reward_model("rm", load_tokenizer("rm")).score.weight
    above = load_reward_model(tmp_path / "rm", tokenizer).score.weight
    assert torch.equal(found, load_reward_model(backbone, tokenizer, 10, 1).score.weight)
    assert not torch.equal(found, above)


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


def test_the_chance_of_being_preferred_follows_the_models_link():
    better, worse = torch.tensor([1.0, 1.0]), torch.tensor([-2.0, 2.0])
    chances = {}
    for link in ("mean", "distributional"):
        first, second = RewardDistribution(better, link), RewardDistribution(worse, link)
        chances[link] = first.prob_beats(second)
        assert torch.isclose(chances[link] + second.prob_beats(first), torch.tensor(1.0))
        assert first.rearranged().link == link
    sigma = torch.sigmoid(torch.tensor([1.0, 3.0, -1.0]))
    assert torch.isclose(chances["mean"], sigma[0])
    assert torch.isclose(chances["distributional"], sigma[1:].mean())
    told = refusal(RewardDistribution(better).prob_beats, RewardDistribution(worse))
    assert "prob_beats needs the model's" in told
    assert "trained with dpl_normal or dpl_categorical has none: compare means" in told
    assert {name for name, (of, _) in OBJECTIVES.items() if of.link is None} == {
        "dpl_normal",
        "dpl_categorical",
    }


def test_a_checkpoint_without_a_link_has_that_of_its_family(backbone, tokenizer):
    links = dict(normal="distributional", free="distributional")
    for family in ("normal", "free", None):
        model = load_reward_model(backbone, tokenizer, 10, family=family)
        assert read_link(model.config) == links.get(family, "mean")
        assert read_link(to_scalar(model).config) == "mean"


def test_crossing_outputs_are_read_by_level_as_an_export_reads_them():
    crossed = RewardDistribution(torch.tensor([0.0, 2.0, 1.0, 3.0]))
    assert crossed.cvar(0.5) == 1.0 and crossed.rearranged().cvar(0.5) == 0.5
    assert crossed.quantile(0.375) == 2.0 and crossed.rearranged().quantile(0.375) == 1.0


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
    assert "only the mean can be folded" in refusal(to_scalar, normal, cvar_weights(2, 0.5))


def test_score_refuses_what_does_not_fit(tokenizer, model):
    assert "response 1 has" in refusal(score, model, tokenizer, PROMPT, [" Yes.", " 9" * 200])
    told = refusal(score, model, tokenizer, PROMPT, ANSWERS, max_length=65)
    assert "is more than the model's 64 positions" in told


def test_score_keeps_to_the_length_of_training(backbone, tokenizer, model, tmp_path):
    trained = load_reward_model(backbone, tokenizer, 10, max_length=24)
    trained.save_pretrained(tmp_path)
    trained = load_reward_model(tmp_path, tokenizer)
    long = "\n\nHuman: My bread is flat.\n\nAssistant: No." + PROMPT
    cut = score(model, tokenizer, long, [" No."], max_length=24)
    assert torch.equal(score(trained, tokenizer, long, [" No."]), cut)
    assert not torch.allclose(score(model, tokenizer, long, [" No."]), cut)


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
