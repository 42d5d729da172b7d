"What the README says of TRL: an exported model in an unmodified script, with our rewards."

import re

import torch
import trl
from conftest import ROOT
from qr_rlhf.model import (
    RewardDistribution,
    load_reward_model,
    load_tokenizer,
    score,
    tiny_gpt2,
    train_tokenizer,
)
from qr_rlhf.synthetic import World


def test_readme_exports_a_reward_model_that_trl_scores_as_we_do(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "harmless"
    tokenizer = train_tokenizer(
        [row["chosen"] for row in World().rows("harmless", "train", 200)], 600
    )
    for folder in (run / "warm_up", run / "quantile" / "seed0"):
        tokenizer.save_pretrained(folder)
    tiny_gpt2(tokenizer, 128, 2, 32, 4, seed=0).save_pretrained(run / "warm_up")
    load_reward_model(run / "warm_up", load_tokenizer(run / "warm_up"), 10).save_pretrained(
        run / "quantile" / "seed0"
    )

    export, script = [
        block
        for block in re.findall(
            r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
        )
        if "runs/cautious" in block
    ]
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
        ours = torch.cat(
            [
                RewardDistribution(score(model, tokenizer, p, [c])).cvar(0.2)
                for p, c in zip(prompts, completions)
            ]
        )
        assert rewards.std() > 0 and (rewards - ours).abs().max() < 1e-5
