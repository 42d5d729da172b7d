"A reward model as an adapter on a LoRA-tuned Llama, in one process and in several; its card."

import json
import os
import subprocess
import sys

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
LORA = TRAINING | dict(
    name="lora",
    backbone="tuned",
    lora_rank=4,
    learning_rate=1e-2,
    gradient_checkpointing=True,
    batch_size=16,
)


def tiny_llama(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
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
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def llama(project):
    "What a new user has: pairs of their own, and a LoRA-tuned Llama whose base is elsewhere."
    # 144 pairs to train on: whole batches, for one process and for two
    write_folder(project.folder / "mine", "helpful", train=154, test=24)
    texts = [row["chosen"] for row in World().rows("helpful", "train", 50)]
    tokenizer = train_tokenizer(texts, 400)
    for folder in ("llama", "tuned"):
        tokenizer.save_pretrained(project.folder / folder)
    tiny_llama(tokenizer).save_pretrained(project.folder / "llama")
    base = LlamaForCausalLM.from_pretrained(project.folder / "llama")
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    peft.get_peft_model(base, adapter).save_pretrained(project.folder / "tuned")
    config = project.folder / "tuned" / "adapter_config.json"
    settings = json.loads(config.read_text()) | dict(base_model_name_or_path="llama")
    config.write_text(json.dumps(settings))
    return project


@pytest.fixture(scope="module")
def lora(llama):
    "The folder of a finished run with an adapter on that Llama."
    done = llama.papermill("run", "runs/lora.ipynb", **LORA)
    assert done.returncode == 0, done.stderr
    return llama.folder / "runs" / "lora"


def test_a_lora_tuned_llama_is_merged_once_and_named_by_its_path(lora):
    adapter = lora / "quantile" / "seed0" / "adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "runs/lora/backbone"
    assert (lora / "backbone" / "model.safetensors").exists()
    assert not list(lora.rglob("*.bin"))


def test_merged_and_adapter_give_the_rewards_of_the_run(lora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the adapter finds its base from its own place
    folder = lora / "quantile" / "seed0"
    rewards = pd.read_parquet(lora / "rewards.parquet")
    of_row = (rewards.model == "quantile") & (rewards.pair == 0) & (rewards.side == "chosen")
    row, tokenizer = World(seed=1).rows("helpful", "test", 1)[0], load_tokenizer(folder)
    stock = AutoTokenizer.from_pretrained(folder)
    tokens = stock(row["chosen"] + stock.eos_token, return_tensors="pt")
    for model in (
        AutoModelForSequenceClassification.from_pretrained(folder),
        load_adapter(folder / "adapter", tokenizer),
    ):
        with torch.no_grad():
            quantiles = model(**tokens).logits[0].numpy()
        assert np.abs(quantiles - rewards[of_row].reward.to_numpy()).max() < 1e-5
        assert (model.config.quantile_link, model.config.reward_max_length) == ("mean", 200)


def test_the_card_says_what_was_trained_and_is_written_again(lora, llama):
    folder = lora / "quantile" / "seed0"
    card = ModelCard.load(folder / "README.md")
    accuracy = llama.results("lora")["models"]["quantile"]["per_seed"][0]["accuracy"]
    measured = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert measured["accuracy"] == round(accuracy, 4)
    assert card.data.library_name == "transformers"
    assert "LoRA of rank 4" in card.text and card.text.count("[") > 3
    assert "`runs/lora/backbone`" in (folder / "adapter" / "README.md").read_text()
    (folder / "README.md").unlink()
    again = llama.papermill("run", "runs/lora.ipynb", **LORA)
    assert again.returncode == 0 and (folder / "README.md").exists(), again.stderr


def launched(llama, name, start, **settings):
    "Train a run's models by `launch`; their losses."
    settings = TRAINING | dict(name=name, backbone="llama", learning_rate=3e-4) | settings
    options = [str(x) for k, v in settings.items() for x in (f"--{k}", v)]
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    done = subprocess.run(
        [*start, *options],
        cwd=llama.folder,
        env=llama.env | dict(PATH=path),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((trained(llama, name) / "log.json").read_text())
    return np.array([row[k] for row in log for k in ("loss", "eval_loss") if k in row])


def trained(llama, name):
    "The folder of a run's quantile model."
    return llama.folder / "runs" / name / "quantile" / "seed0"


@pytest.fixture(scope="module")
def one_process(llama):
    "The losses of one process."
    return launched(llama, "one", [sys.executable, "-m", "qr_rlhf.runs"], batch_size=16)


@pytest.mark.parametrize("sharded", [False, True], ids=["data parallel", "FSDP2"])
def test_two_processes_launched_by_accelerate_train_as_one(llama, one_process, sharded):
    fsdp_on_cpu = [str(ROOT / "tests" / "fsdp_on_cpu.py"), "qr_rlhf.runs"]
    start = [
        *("accelerate", "launch", "--config_file", str(ROOT / "nbs" / "fsdp.yaml")),
        *("--num_processes", "2"),
        *(fsdp_on_cpu if sharded else ["-m", "qr_rlhf.runs"]),
    ]
    losses = launched(llama, f"two{sharded}", start, batch_size=8)
    assert len(losses) == len(one_process) >= 4
    assert losses[0] - losses[-1] > 0.01
    assert np.abs(losses - one_process).max() < 1e-4
    folder = trained(llama, f"two{sharded}")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 10 and model.dtype == torch.float32
