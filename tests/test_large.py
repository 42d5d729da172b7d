"A reward model as an adapter, on somebody's LoRA-tuned Llama, in one process and in several; its model card."

import json, os, subprocess, sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard
from test_run import write_folder
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from qr_rlhf.large import load_adapter
from qr_rlhf.model import load_tokenizer, train_tokenizer
from qr_rlhf.synthetic import World

peft = pytest.importorskip("peft")
TRAINING = dict(
    profile="paper",
    workload="helpful",
    data="mine",
    max_length=200,
    seeds=0,
    evaluations=2,
    warmup_steps=2,
)


@pytest.fixture(scope="module")
def llama(project):
    "What a new user has: pairs of their own, and a LoRA-tuned Llama whose base is another folder."
    write_folder(
        project.folder / "mine", "helpful", 154, 24
    )  # 144 to train on: whole batches, for one process and for two
    tokenizer = train_tokenizer([r["chosen"] for r in World().rows("helpful", "train", 50)], 400)
    for folder in ("llama", "tuned"):
        tokenizer.save_pretrained(project.folder / folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(project.folder / "llama")
    tuned = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(project.folder / "llama"),
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False),
    )
    tuned.save_pretrained(project.folder / "tuned")
    config = project.folder / "tuned" / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | dict(base_model_name_or_path="llama"))
    )
    return project


def test_a_lora_tuned_llama_becomes_a_reward_model(llama, monkeypatch):
    settings = TRAINING | dict(
        name="lora",
        backbone="tuned",
        lora_rank=4,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        batch_size=16,
    )
    done = llama.papermill("run", "runs/lora.ipynb", **settings)
    assert done.returncode == 0, done.stderr
    run, rewards = (
        llama.folder / "runs" / "lora",
        pd.read_parquet(llama.folder / "runs" / "lora" / "rewards.parquet"),
    )
    folder = run / "quantile" / "seed0"
    assert (
        json.loads((folder / "adapter" / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        == "runs/lora/backbone"
    )
    assert (run / "backbone" / "model.safetensors").exists() and not list(run.rglob("*.bin"))
    monkeypatch.chdir(llama.folder)
    row, tokenizer = (
        World(seed=1).rows("helpful", "test", 1)[0],
        AutoTokenizer.from_pretrained(folder),
    )
    for model in (
        AutoModelForSequenceClassification.from_pretrained(folder),
        load_adapter(folder / "adapter", load_tokenizer(folder)),
    ):
        with torch.no_grad():
            quantiles = model(
                **tokenizer(row["chosen"] + tokenizer.eos_token, return_tensors="pt")
            ).logits[0]
        assert (
            np.abs(
                quantiles.numpy()
                - rewards[
                    (rewards.model == "quantile") & (rewards.pair == 0) & (rewards.side == "chosen")
                ].reward.to_numpy()
            ).max()
            < 1e-5
        )
    results = llama.results("lora")
    card = ModelCard.load(folder / "README.md")
    assert {r.metric_type: r.metric_value for r in card.data.eval_results}["accuracy"] == round(
        results["models"]["quantile"]["per_seed"][0]["accuracy"], 4
    ) and card.data.library_name == "transformers"
    assert (
        "LoRA of rank 4" in card.text
        and card.text.count("[") > 3
        and "`runs/lora/backbone`" in (folder / "adapter" / "README.md").read_text()
    )
    (folder / "README.md").unlink()
    again = llama.papermill("run", "runs/lora.ipynb", **settings)
    assert again.returncode == 0 and (folder / "README.md").exists(), again.stderr


def launched(llama, name, start, **settings):
    "Train a run's models by `launch`; their losses."
    options = [
        str(x)
        for k, v in (
            TRAINING | dict(name=name, backbone="llama", learning_rate=3e-4) | settings
        ).items()
        for x in (f"--{k}", v)
    ]
    done = subprocess.run(
        [*start, *options],
        cwd=llama.folder,
        env=llama.env | dict(PATH=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return np.array(
        [
            row[k]
            for row in json.loads(
                (llama.folder / "runs" / name / "quantile" / "seed0" / "log.json").read_text()
            )
            for k in ("loss", "eval_loss")
            if k in row
        ]
    )


@pytest.mark.parametrize("sharded", [False, True], ids=["data parallel", "FSDP2"])
def test_two_processes_launched_with_the_given_configuration_train_as_one(llama, sharded):
    if not (llama.folder / "runs" / "one").exists():
        llama.losses = launched(
            llama, "one", [sys.executable, "-m", "qr_rlhf.runs"], batch_size=16
        )
    target = (
        [str(ROOT / "tests" / "fsdp_on_cpu.py"), "qr_rlhf.runs"]
        if sharded
        else ["-m", "qr_rlhf.runs"]
    )
    losses = launched(
        llama,
        f"two{sharded}",
        [
            "accelerate",
            "launch",
            "--config_file",
            str(ROOT / "nbs" / "fsdp.yaml"),
            "--num_processes",
            "2",
            *target,
        ],
        batch_size=8,
    )
    assert (
        len(losses) == len(llama.losses) >= 4
        and losses[0] - losses[-1] > 0.01
        and np.abs(losses - llama.losses).max() < 1e-4
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        llama.folder / "runs" / f"two{sharded}" / "quantile" / "seed0"
    )
    assert model.config.num_labels == 10 and model.dtype == torch.float32
