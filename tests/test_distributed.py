"Two processes learn what one does: the same loss curve at the same global batch, and equal weights on both."

import json, os, subprocess, sys

import numpy as np
from conftest import ROOT

from qr_rlhf.data import encode_pairs, load_pairs
from qr_rlhf.model import tiny_gpt2, train_tokenizer
from qr_rlhf.synthetic import World


def test_two_processes_train_as_one(tmp_path):
    pairs, _ = load_pairs(World(), "helpful", "train", n=160)
    tokenizer = train_tokenizer([r["prompt"] + r["chosen"] for r in pairs], 400)
    tokenizer.save_pretrained(tmp_path / "backbone")
    tiny_gpt2(tokenizer, max_length=256, n_layer=2, n_embd=32, n_head=2, seed=0).save_pretrained(
        tmp_path / "backbone"
    )
    encode_pairs(pairs, tokenizer, 256)[0].save_to_disk(str(tmp_path / "train"))
    script, env = (
        [str(ROOT / "tests" / "distributed.py"), str(tmp_path)],
        {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    for start in (
        [sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    ):
        done = subprocess.run([*start, *script], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"curve{n}.json").read_text()) for n in (1, 2))
    assert one["shared"] and two["shared"] and two["ranks"] == 2 and two["equal"]
    assert len(one["losses"]) == len(two["losses"]) == 20 and one["losses"][-1] != one["losses"][0]
    assert np.abs(np.array(one["losses"]) - np.array(two["losses"])).max() < 1e-4
