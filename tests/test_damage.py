"""Files that are damaged or odd, and odd text: nothing is lost in silence, nothing fails in a
library's depths.

`EXAMPLES=5000 pytest -o addopts= tests/test_damage.py --hypothesis-seed 1` tries other ones.
"""

import copy
import gzip
import io
import json
import os
import re
from functools import cache

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, disable_progress_bars
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_formats import CHATML, SIDES
from tokenizers.normalizers import NFC
from tokenizers.processors import TemplateProcessing

from qr_rlhf.data import encode_pairs, load_pairs, sequence_ends
from qr_rlhf.export import ending_tokenizer
from qr_rlhf.formats import InputError, text_to_messages
from qr_rlhf.model import train_tokenizer
from qr_rlhf.sources import ENDINGS

disable_progress_bars()


def examples(
    n: int,  # in continuous integration, where they are always the same
):
    asked = os.environ.get("EXAMPLES")
    how = dict(derandomize=not asked, deadline=None, database=None)
    return settings(max_examples=int(asked or n), **how)


# odd values, and rows with one in some place

ODD = ["", " ", "\n", "\r\n", "\x00", "\x85", "\u2028", "\ufeff", "\u200d", "𝔘", "e\u0301", "ﬁ"]
ODD += ["\n\nHuman:", "\n\nAssistant: Hm.", "Human: Hm?", "user", "<|endoftext|>", "<|im_end|>"]
words = st.lists(st.sampled_from(ODD) | st.text(max_size=6), max_size=4).map("".join)
broken = st.characters(categories=["Cs"])  # half a surrogate pair
plain = st.none() | st.booleans() | st.integers() | st.floats() | words | broken
names = st.sampled_from("role content text type tool_calls chosen prompt share".split()) | words


def nested(values):
    return st.lists(values, max_size=3) | st.dictionaries(names, values, max_size=3)


values = st.recursive(plain, nested, max_leaves=6)

QUESTIONS = ["Why?", "Hm?", "How so?", "What now?", "Is it hot?"]  # the first is to evaluate on
REPLIES = dict(chosen="Try fresh yeast.", rejected="Buy some bread.")
AS_CHAT = {side: [dict(role="assistant", content=text)] for side, text in REPLIES.items()}


def in_shapes(question):
    "A pair in each of the shapes that are read."
    opening = f"\n\nHuman: {question}\n\nAssistant: "
    asked = [dict(role="user", content=question)]
    return [
        {side: opening + text for side, text in REPLIES.items()},
        dict(prompt=question, **REPLIES),
        dict(prompt=asked, **AS_CHAT),
        {side: asked + reply for side, reply in AS_CHAT.items()},
        dict(prompt=asked, share=0.9, **AS_CHAT),
    ]


@st.composite
def good_rows(draw):
    "Rows of one shape."
    n, shape = draw(st.integers(1, 5)), draw(st.integers(0, 4))
    return [copy.deepcopy(in_shapes(question)[shape]) for question in QUESTIONS[:n]]


def places(holder):
    "Each list or dictionary within another, with each of its keys."
    within = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in list(within):
        yield holder, key
        if isinstance(value, dict | list):
            yield from places(value)


@st.composite
def damaged_rows(draw):
    "Rows in which some value is gone, or another one stands in its place."
    rows = draw(good_rows())
    for _ in range(draw(st.integers(0, 3))):
        holder, key = draw(st.sampled_from(list(places(rows))))
        if holder is not rows and draw(st.booleans()):
            del holder[key]
        else:
            is_text = isinstance(holder[key], str)
            holder[key] = draw(words | values if is_text else values)
    return rows


# files


def column(values):
    "Values as Parquet can hold them: of those that differ in type, their JSON."
    try:
        found = pa.array(values)
        pq.write_table(pa.table(dict(found=found)), io.BytesIO())
        return found
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return pa.array(map(json.dumps, values))


def in_parquet(rows, **options):
    rows = [row if isinstance(row, dict) else dict(chosen=row) for row in rows]
    names = {name for row in rows for name in row if name.isprintable()}
    columns = {name: column([row.get(name) for row in rows]) for name in sorted(names)}
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


def in_bytes(rows, ending):
    "A file of rows, as the ending says."
    if ending == ".parquet":
        return in_parquet(rows)
    in_lines = ".jsonl" in ending
    text = "\n".join(map(json.dumps, rows)) if in_lines else json.dumps(rows)
    return gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode()


def count_rows(data, ending):
    "How many rows a file holds that can be read."
    if ending == ".parquet":
        return pq.read_metadata(io.BytesIO(data)).num_rows
    data = gzip.decompress(data) if ending.endswith(".gz") else data
    is_array = data.decode("utf-8-sig").lstrip().startswith("[")
    return len(json.loads(data)) if is_array else data.removesuffix(b"\n").count(b"\n") + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damage")


def check_loading(path, data, place):
    """Write a file and load it.

    Each of its rows becomes a pair or is counted as dropped. Or else one sentence names the
    file, and the place."""
    path.write_bytes(data)
    for split in ("train", "test"):
        try:
            pairs, dropped = load_pairs(path, "mine", split)
        except InputError as error:
            said = str(error)
            assert len(said.splitlines()) == 1 and said.endswith(".") and path.name in said
            assert re.search(place, said), said
        else:
            rows = count_rows(data, "".join(path.suffixes))
            assert len(pairs) + sum(dropped.values()) == rows
            assert {"prompt", "chosen", "rejected"} <= set(pairs.column_names)


PLACE = r"(line|item|row) \d: |at character \d|of \d+ rows in |file has no rows"


@examples(400)
@given(rows=damaged_rows(), ending=st.sampled_from(ENDINGS))
@example(rows=[[], {}], ending=".json")
def test_a_row_is_read_or_counted_or_named(folder, rows, ending):
    check_loading(folder / f"rows{ending}", in_bytes(rows, ending), PLACE)


# bytes


@st.composite
def damaged_files(draw):
    "The bytes of a file of which a part is changed, gone, doubled, or all that is left."
    ending = draw(st.sampled_from(ENDINGS))
    rows = draw(good_rows())
    if ending == ".parquet":
        how = dict(compression=draw(st.sampled_from(["none", "snappy", "zstd"])))
        how |= dict(use_dictionary=draw(st.booleans()))
        data = in_parquet(rows, **how)
    else:
        data = in_bytes(rows, ending)
    pieces = data.splitlines(keepends=True) if draw(st.booleans()) else [data]
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(pieces) - 1))
        pieces[i : i + 1] = draw(damage(pieces[i]))
    return ending, b"".join(pieces)


@st.composite
def damage(draw, data):
    start = draw(st.integers(0, len(data)))
    end = min(len(data), start + draw(st.sampled_from([1, 2, 8, 100, len(data)])))
    before, part, after = data[:start], data[start:end], data[end:]
    other = st.binary(min_size=len(part), max_size=len(part))
    ways = dict(
        changed=st.builds(lambda new: [before, new, after], other),
        gone=st.just([before, after]),
        doubled=st.just([before, part, part, after]),
        left=st.just([part]),
    )
    return draw(ways[draw(st.sampled_from(list(ways)))])


ANYWHERE = "."


@examples(400)
@given(file=damaged_files())
@example(file=(".json", b"[]"))
def test_a_damaged_file_is_read_or_named(folder, file):
    ending, data = file
    check_loading(folder / f"file{ending}", data, ANYWHERE)


in_json = values.map(json.dumps).map(str.encode)


@examples(100)
@given(data=st.binary(max_size=80) | in_json, ending=st.sampled_from(ENDINGS))
def test_anything_at_all_is_read_or_named(folder, data, ending):
    packed = gzip.compress(data) if ending.endswith(".gz") else data
    check_loading(folder / f"any{ending}", packed, ANYWHERE)


# tokens


@cache
def tokenizers():
    "One that only ends texts, one with a chat template, one that normalises and begins texts."
    plain = train_tokenizer(in_shapes("Why?")[0].values(), 300)
    chat, begins = copy.deepcopy(plain), copy.deepcopy(plain)
    special = dict(eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"])
    chat.add_special_tokens(special)
    chat.chat_template = CHATML
    begins.add_special_tokens(dict(bos_token="<s>"))
    start = [("<s>", begins.bos_token_id)]
    backend = begins.backend_tokenizer
    backend.normalizer = NFC()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=start)
    return dict(plain=plain, chat=chat, begins=begins)


kinds = st.sampled_from(["plain", "chat", "begins"])


@st.composite
def dialogues(draw):
    "A prompt of one to three turns, and two replies."
    asked = words.map(" {}".format)
    turns = draw(st.lists(asked, min_size=1, max_size=3))
    markers = ["\n\nHuman:", "\n\nAssistant:", "\n\nHuman:"][-len(turns) :]
    text = "".join(m + turn for m, turn in zip(markers, turns, strict=True))
    return dict(prompt=text + "\n\nAssistant:", chosen=draw(asked), rejected=draw(asked))


def as_one_text(tokenizer, row, side):
    "What the model is to read of one side of a pair."
    text = row["prompt"] + row[side]
    if not tokenizer.chat_template:
        return text
    return tokenizer.apply_chat_template(text_to_messages(text), tokenize=False)


@examples(80)
@given(kind=kinds, rows=st.lists(dialogues(), min_size=1, max_size=3))
def test_ids_of_the_parts_are_those_of_the_whole(kind, rows):
    tokenizer = tokenizers()[kind]
    before, after = sequence_ends(tokenizer)
    encoded, dropped = encode_pairs(Dataset.from_list(rows), tokenizer, 10_000)
    assert len(encoded) + sum(dropped.values()) == len(rows)
    for row in encoded:
        for side in SIDES:
            text = as_one_text(tokenizer, row, side)
            whole = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert row["prompt_ids"] + row[f"{side}_ids"] == before + whole + after


@examples(80)
@given(kind=kinds, rows=st.lists(dialogues(), min_size=1, max_size=3), limit=st.integers(4, 60))
def test_a_pair_fits_or_is_counted(kind, rows, limit):
    try:
        encoded, dropped = encode_pairs(Dataset.from_list(rows), tokenizers()[kind], limit)
    except InputError as error:
        assert str(error).startswith("max_length: none of") and str(error).endswith(".")
    else:
        assert len(encoded) + sum(dropped.values()) == len(rows)
        for row in encoded:
            longest = max(len(row[f"{side}_ids"]) for side in SIDES)
            assert len(row["prompt_ids"]) + longest <= limit


@examples(100)
@given(kind=kinds, text=words)
def test_an_exported_tokenizer_ends_any_text(kind, text):
    tokenizer = tokenizers()[kind]
    assume(text and not any(token in text for token in tokenizer.all_special_tokens))
    before, after = sequence_ends(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ending(kind)(text)["input_ids"] == before + ids + after


@cache
def ending(kind):
    return ending_tokenizer(tokenizers()[kind])
