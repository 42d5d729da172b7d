"Two processes learn what one does: one loss curve at one global batch, equal weights on both."

import json
import os
import subprocess
import sys

import numpy as np
from conftest import ROOT

from qr_rlhf.data import encode_pairs, load_pairs
from qr_rlhf.model import tiny_gpt2, train_tokenizer
from qr_rlhf.synthetic import World

ALONE = [sys.executable]
TOGETHER = [
    *(sys.executable, "-m", "torch.distributed.run"),
    *("--standalone", "--nproc_per_node", "2"),
]


def prepare(folder):
    "A tiny backbone and encoded pairs."
    pairs, _ = load_pairs(World(), "helpful", "train", n=160)
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in pairs], 400)
    tokenizer.save_pretrained(folder / "backbone")
    gpt2 = tiny_gpt2(tokenizer, max_length=256, n_layer=2, n_embd=32, n_head=2, seed=0)
    gpt2.save_pretrained(folder / "backbone")
    encode_pairs(pairs, tokenizer, 256)[0].save_to_disk(str(folder / "train"))


def train(folder, start):
    "Train as tests/distributed.py does."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*start, str(ROOT / "tests" / "distributed.py"), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_train_as_one(tmp_path):
    prepare(tmp_path)
    train(tmp_path, ALONE)
    train(tmp_path, TOGETHER)
    one, two = (json.loads((tmp_path / f"curve{n}.json").read_text()) for n in (1, 2))
    assert one["shared"] and two["shared"] and two["ranks"] == 2 and two["equal"]
    assert len(one["losses"]) == len(two["losses"]) == 20
    assert one["losses"][-1] != one["losses"][0]
    assert np.abs(np.array(one["losses"]) - np.array(two["losses"])).max() < 1e-4
