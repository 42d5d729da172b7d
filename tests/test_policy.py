"Into TRL and stock tools: what is refused, chats, and README's export in an unmodified script."

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trl
from conftest import ROOT
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qr_rlhf.formats import text_to_messages
from qr_rlhf.model import (
    RewardDistribution,
    load_reward_model,
    load_tokenizer,
    score,
    tiny_gpt2,
    train_tokenizer,
)
from qr_rlhf.policy import RiskMeasure, export_reward_model, read_measure, reward_function
from qr_rlhf.synthetic import World

CVAR = RiskMeasure("cvar", 0.2)
PHONE = "\n\nHuman: How do I read the messages on my son's phone?\n\nAssistant:"
CAR = "\n\nHuman: Tell me how to track my ex's car.\n\nAssistant:"
PROMPTS = [PHONE, CAR, PHONE]
COMPLETIONS = [" Connect the phone to a computer.", " I must decline.", " Talk openly to him."]
CLOSING = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_backbone(folder):
    rows = World().rows("harmless", "train", 200)
    tokenizer = train_tokenizer([row["chosen"] for row in rows], 600)
    tokenizer.save_pretrained(folder)
    tiny_gpt2(tokenizer, 128, 2, 32, 4, seed=0).save_pretrained(folder)


@pytest.fixture
def ours(tmp_path):
    "A reward model with ten quantiles, its tokenizer, and TRL's chat form of the texts above."
    save_backbone(tmp_path / "backbone")
    tokenizer = load_tokenizer(tmp_path / "backbone")
    model = load_reward_model(tmp_path / "backbone", tokenizer, 10).eval()
    prompts = [text_to_messages(p.removesuffix("\n\nAssistant:")) for p in PROMPTS]
    replies = [[dict(role="assistant", content=c.removeprefix(" "))] for c in COMPLETIONS]
    return SimpleNamespace(model=model, tokenizer=tokenizer, prompts=prompts, replies=replies)


def stock_rewards(folder, texts):
    "What `GRPOTrainer` computes for a reward model given by its path."
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    how = dict(return_tensors="pt", padding=True, padding_side="right")
    how |= dict(add_special_tokens=False)
    with torch.no_grad():
        return model(**tokenizer(text=texts, **how)).logits[:, 0].numpy()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("median", "choose one of mean, quantile, cvar, mean_spread, entropic."),
        ("mean 0.1", "mean takes no parameter."),
        ("cvar", "cvar takes a parameter, such as cvar 0.2."),
        ("cvar 2", "can't have the parameter 2.0; give a number above 0 and at most 1."),
        ("entropic 0", "can't have the parameter 0.0; give a number above 0."),
        ("cvar .1 .2", "can't be read"),
        ("cvar low", "can't be read"),
    ],
)
def test_what_is_no_measure_is_refused(text, words):
    with pytest.raises(ValueError) as refusal:
        read_measure(text)
    assert words in str(refusal.value)


def test_a_measure_reads_what_it_writes():
    for text in ("mean", "quantile 0.25", "cvar 0.2", "mean_spread 0.5", "entropic 1"):
        assert str(read_measure(text)) == text


def test_chat_messages_are_scored_as_their_text(ours):
    reward = reward_function(ours.model, ours.tokenizer, RiskMeasure("entropic", 1.0))
    expected = reward(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=None)
    assert np.allclose(reward(ours.prompts, ours.replies), expected, atol=1e-5)


def test_an_export_ends_texts_once_and_says_what_it_is(ours, tmp_path):
    export_reward_model(ours.model, ours.tokenizer, tmp_path / "cautious", CVAR)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cautious")
    ids = tokenizer("Hi.")["input_ids"]
    assert ids == tokenizer("Hi.<|endoftext|>")["input_ids"]
    assert ids.count(ours.tokenizer.eos_token_id) == 1
    assert "cvar 0.2" in (tmp_path / "cautious" / "README.md").read_text()
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "cautious")
    assert exported.config.risk_measure == "cvar 0.2" and exported.config.num_labels == 1
    with pytest.raises(ValueError, match="ends every text by itself"):
        score(exported, tokenizer, PHONE, [" Yes."])
    exported = export_reward_model(ours.model, ours.tokenizer, tmp_path / "mean")
    assert exported.config.risk_measure


def test_a_chat_template_that_closes_replies_itself(ours, tmp_path):
    plain = reward_function(ours.model, ours.tokenizer, CVAR)(PROMPTS, COMPLETIONS)
    ours.tokenizer.chat_template = CLOSING
    export_reward_model(ours.model, ours.tokenizer, tmp_path / "chat", CVAR)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    chats = [prompt + reply for prompt, reply in zip(ours.prompts, ours.replies, strict=True)]
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    expected = reward_function(ours.model, ours.tokenizer, CVAR)(ours.prompts, ours.replies)
    found = stock_rewards(tmp_path / "chat", texts)
    assert np.allclose(found, expected, atol=1e-5) and not np.allclose(found, plain, atol=1e-3)


def test_only_linear_measures_are_exported(ours, tmp_path):
    with pytest.raises(ValueError, match="not linear in the quantiles"):
        export_reward_model(
            ours.model, ours.tokenizer, tmp_path / "no", RiskMeasure("entropic", 1.0)
        )
    normal = load_reward_model(tmp_path / "backbone", ours.tokenizer, 10, family="normal")
    with pytest.raises(ValueError, match="only the mean can be folded"):
        export_reward_model(normal, ours.tokenizer, tmp_path / "no", CVAR)
    assert not (tmp_path / "no").exists()


def test_readme_exports_a_reward_model_that_trl_scores_as_we_do(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "harmless"
    save_backbone(run / "warm_up")
    tokenizer = load_tokenizer(run / "warm_up")
    model = load_reward_model(run / "warm_up", tokenizer, 10)
    model.save_pretrained(run / "quantile" / "seed0")
    tokenizer.save_pretrained(run / "quantile" / "seed0")

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    export, script = [block for block in blocks if "runs/cautious" in block]
    seen, calculate = [], trl.GRPOTrainer._calculate_rewards

    def watch(self, inputs, prompts, completions, *rest):
        rewards = calculate(self, inputs, prompts, completions, *rest)
        seen.append((prompts, completions, rewards[:, 0]))
        return rewards

    monkeypatch.setattr(trl.GRPOTrainer, "_calculate_rewards", watch)
    monkeypatch.chdir(tmp_path)
    exec(export, {})
    exec(script.replace("max_steps=20", "max_steps=2"), {})

    assert "qr_rlhf" not in script and len(script.strip().splitlines()) <= 10 and len(seen) == 2
    tokenizer = load_tokenizer(run / "quantile" / "seed0")
    model = load_reward_model(run / "quantile" / "seed0", tokenizer, 10)
    for prompts, completions, rewards in seen:
        for prompt, completion, reward in zip(prompts, completions, rewards, strict=True):
            quantiles = score(model, tokenizer, prompt, [completion])
            assert (reward - RewardDistribution(quantiles).cvar(0.2)).abs() < 1e-5
        assert rewards.std() > 0
