"Two processes learn what one does: one loss curve at one global batch, equal weights on both."

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT
from datasets import Dataset

from qr_rlhf.data import encode_pairs, load_pairs
from qr_rlhf.model import tiny_gpt2, train_tokenizer
from qr_rlhf.synthetic import World


def prepare(folder):
    "A tiny backbone, encoded pairs, and the same as groups in which both are rated."
    pairs, _ = load_pairs(World(), "helpful", "train", n=160)
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in pairs], 400)
    tokenizer.save_pretrained(folder / "backbone")
    gpt2 = tiny_gpt2(tokenizer, max_length=256, n_layer=2, n_embd=32, n_head=2, seed=0)
    gpt2.save_pretrained(folder / "backbone")
    encoded = encode_pairs(pairs, tokenizer, 256)[0]
    encoded.save_to_disk(str(folder / "pairs"))
    Dataset.from_list([rated(row, i) for i, row in enumerate(encoded)]).save_to_disk(
        str(folder / "groups")
    )


def rated(row, i):
    "A pair as a group: every second row has a comparison, the others two ratings."
    ids = dict(
        prompt_ids=row["prompt_ids"], response_ids=[row["chosen_ids"], row["rejected_ids"]]
    )
    if i % 2:
        return ids | dict(first=[0, 0], second=[1, 1], share=[1.0, 1.0], rated=[], rating=[])
    return ids | dict(first=[], second=[], share=[], rated=[0, 1], rating=[2 + i % 3, i % 4])


def train(project, folder, processes):
    "Train as tests/distributed.py does, in processes that torchrun would start like this."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)

    def run(rank):
        own = dict(RANK=str(rank), LOCAL_RANK=str(rank)) | both if processes > 1 else {}
        return project.forks.run(["-m", "distributed", str(folder)], ROOT / "tests", **own)

    project.forks.begin(ROOT)
    with ThreadPoolExecutor(processes) as threads:
        for done in threads.map(run, range(processes)):
            assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def trained(project, tmp_path_factory):
    "The folder in which one process trained, and then two."
    folder = tmp_path_factory.mktemp("trained")
    prepare(folder)
    train(project, folder, 1)
    train(project, folder, 2)
    return folder


@pytest.mark.parametrize("table", ["pairs", "groups"])
def test_two_processes_train_as_one(trained, table):
    one, two = (json.loads((trained / f"{table}{n}.json").read_text()) for n in (1, 2))
    assert one["shared"] and two["shared"] and two["ranks"] == 2 and two["equal"]
    assert len(one["losses"]) == len(two["losses"]) == 20
    assert one["losses"][-1] != one["losses"][0]
    assert np.abs(np.array(one["losses"]) - np.array(two["losses"])).max() < 1e-4
