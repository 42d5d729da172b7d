"Large tables hold what small ones do, and are found again only where nothing changed."

import gzip
import json
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import datasets
import psutil
import pytest

from qr_rlhf import files, size
from qr_rlhf.backbones import sequence_ends, train_tokenizer
from qr_rlhf.data import (
    count_shared_prompts,
    data_hash,
    encode_dialogues,
    encode_pairs,
    load_pairs,
    split_validation,
)
from qr_rlhf.judgements import load_parts
from qr_rlhf.packing import row_lengths

ASK = "\n\nHuman: {}\n\nAssistant:"
ROWS = [
    dict(
        chosen=ASK.format(f"Why {i}?") + " So." * (1 + i % 9),
        rejected=ASK.format(f"Why {i}?") + " No.",
    )
    for i in range(60)
]
ROWS[7] |= dict(rejected=ROWS[7]["chosen"])


@pytest.fixture
def folder(monkeypatch, tmp_path):
    "Every table of more than five rows is a large one."
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(size, "IN_MEMORY", 5)
    return tmp_path / "cache" / "qr_rlhf"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([], 258)


def write(path):
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    return path


def test_a_large_table_holds_what_a_small_one_does(folder, tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "pairs.jsonl.gz")
    large, dropped = load_pairs(path, groups=True)
    encoded, lost = encode_pairs(large, tokenizer, 34)
    assert large.cache_files and encoded.cache_files and dropped["equal"] == 1
    parts = split_validation(large)

    monkeypatch.setattr(size, "IN_MEMORY", 1000)
    small, gone = load_pairs(path, groups=True)
    by_hand, too = encode_pairs(small, tokenizer, 34)
    assert not small.cache_files and not by_hand.cache_files
    assert large.to_list() == small.to_list() and dropped == gone
    assert large.features == small.features and data_hash(large) == data_hash(small)
    assert encoded.to_list() == by_hand.to_list() and lost == too and lost["too_long"]
    assert [p.to_list() for p in parts] == [p.to_list() for p in split_validation(small)]
    assert count_shared_prompts(large, small) == len(small)
    for shared, together in ((True, sum), (False, max)):
        rows = [[len(row[f"{side}_ids"]) for side in ("chosen", "rejected")] for row in encoded]
        found = [
            len(r["prompt_ids"]) + together(of) for r, of in zip(encoded, rows, strict=True)
        ]
        assert row_lengths(encoded, shared).tolist() == found


def test_ids_are_taken_up_where_nothing_changed(folder, tmp_path, tokenizer, capsys):
    large, _ = load_pairs(write(tmp_path / "pairs.jsonl.gz"))
    first, lost = encode_pairs(large, tokenizer, 34)
    assert "taken from the cache" not in capsys.readouterr().out
    again, same = encode_pairs(large, tokenizer, 34)
    assert "taken from the cache" in capsys.readouterr().out
    assert again.to_list() == first.to_list() and same == lost

    encode_pairs(large, tokenizer, 35)
    encode_pairs(large, train_tokenizer(["ab ab"], 259), 34)
    encode_pairs(large.select(range(1, len(large))), tokenizer, 34)
    assert "taken from the cache" not in capsys.readouterr().out
    for file in folder.glob("*.json"):  # as if it had been killed before it was done
        file.unlink()
    assert encode_pairs(large, tokenizer, 34)[0].to_list() == first.to_list()
    assert "taken from the cache" not in capsys.readouterr().out


def test_a_fault_leaves_nothing_behind(folder):
    def rows():
        yield from ({"n": i} for i in range(3000))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        size.make_table(rows())
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("space", [" ", ""])
def test_a_prompt_is_tokenised_once(tokenizer, monkeypatch, space):
    "Where responses begin with a space, and where letters may merge at the seam."
    given, tokenise = [], size.token_ids

    def counting(tokenizer, texts):
        given.extend(texts)
        return tokenise(tokenizer, texts)

    ends, words = sequence_ends(tokenizer), " ".join(f"why{i}" for i in range(100))
    prompt = ASK.format(words)
    monkeypatch.setattr(size, "token_ids", counting)
    asked = [(prompt, [f"{space}So {i}." for i in range(16)])]
    ((ids, responses),) = encode_dialogues(tokenizer, ends, asked, 1000)
    assert 0.8 * len(prompt) < len("".join(given)) < 2 * len(prompt)
    whole = prompt + f"{space}So 15." + tokenizer.eos_token
    assert tokenizer.decode(ids + responses[15]) == whole


def test_processes_do_what_one_does(folder, tmp_path, tokenizer, monkeypatch):
    "Parts come back in their order; both parts of a large file are read at once."
    monkeypatch.setattr(files, "cores", lambda: 2)
    monkeypatch.setattr(files, "LARGE", 0)
    rows = [
        dict(prompt=f"Why {i}?", chosen=" So." * (1 + i % 9), rejected=" No.")
        for i in range(5500)
    ]
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    none = dict.fromkeys(("workload", "n_train", "n_eval", "subsets", "splits"))
    train, test, _ = load_parts(path, SimpleNamespace(**none))
    encoded, lost = encode_pairs(train, tokenizer, 34)
    monkeypatch.setattr(files, "cores", lambda: 1)
    for table, alone in zip(
        (train, test), load_parts(path, SimpleNamespace(**none)), strict=False
    ):
        assert table.to_list() == alone.to_list()
    again, too = encode_pairs(train.select(range(1, len(train))), tokenizer, 34)
    assert encoded.to_list()[1:] == again.to_list() and lost == too and lost["too_long"]


def test_a_killed_process_is_an_error(monkeypatch):
    monkeypatch.setattr(files, "cores", lambda: 2)
    with pytest.raises(BrokenProcessPool):
        list(files.in_processes(lambda part: os._exit(1), [1, 2], large=True))


def test_no_process_outlives_the_one_that_began_it():
    script = """
import os, time
from qr_rlhf import files

def work(part):
    os.write(1, b"%d\\n" % os.getpid())  # at once: print may write the end of line later
    time.sleep(60)

files.cores = lambda: 2
list(files.in_processes(work, [1, 2], large=True))
"""
    begun = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    workers = [psutil.Process(int(begun.stdout.readline())) for _ in range(2)]
    begun.kill()
    begun.wait()
    assert psutil.wait_procs(workers, timeout=10)[1] == []


def test_a_row_without_a_column_is_an_error(folder):
    with pytest.raises(KeyError):
        size.make_table([dict(n=1), {}])
