"Large tables hold what small ones do, and are found again only where nothing changed."

import gzip
import json

import datasets
import pytest

from qr_rlhf import size
from qr_rlhf.backbones import sequence_ends, train_tokenizer
from qr_rlhf.data import (
    count_shared_prompts,
    data_hash,
    encode_dialogues,
    encode_pairs,
    load_pairs,
    split_validation,
)
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
    assert "taken up" not in capsys.readouterr().out
    again, same = encode_pairs(large, tokenizer, 34)
    assert "taken up" in capsys.readouterr().out
    assert again.to_list() == first.to_list() and same == lost

    encode_pairs(large, tokenizer, 35)
    encode_pairs(large, train_tokenizer(["ab ab"], 259), 34)
    encode_pairs(large.select(range(1, len(large))), tokenizer, 34)
    assert "taken up" not in capsys.readouterr().out
    for file in folder.glob("*.json"):  # as if it had been killed before it was done
        file.unlink()
    assert encode_pairs(large, tokenizer, 34)[0].to_list() == first.to_list()
    assert "taken up" not in capsys.readouterr().out


def test_a_fault_leaves_nothing_behind(folder):
    def rows():
        yield from ({"n": i} for i in range(3000))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        size.make_table(rows())
    assert list(folder.iterdir()) == []


def test_a_prompt_is_tokenised_once(tokenizer, monkeypatch):
    given, call = [], type(tokenizer).__call__

    def counting(self, text, **options):
        given.extend(text)
        return call(self, text, **options)

    ends, prompt = sequence_ends(tokenizer), ASK.format("Why is it so? " * 50)
    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    asked = [(prompt, [f" So {i}." for i in range(16)])]
    ((ids, responses),) = encode_dialogues(tokenizer, ends, asked, 1000)
    assert len("".join(given)) < 2 * len(prompt)
    assert tokenizer.decode(ids + responses[15]) == prompt + " So 15." + tokenizer.eos_token
