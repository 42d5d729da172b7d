"Other people's files, formats, tokenizers: same words, same table, ids and rewards."

import gzip
import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import SMALL, error
from datasets import Dataset, DatasetDict, disable_progress_bars
from transformers import AutoModelForSequenceClassification

from qr_rlhf import sources
from qr_rlhf.data import data_hash, encode_pairs, load_pairs, split_validation
from qr_rlhf.formats import apply_template, read_row, text_to_messages
from qr_rlhf.model import load_reward_model, load_tokenizer, score, tiny_gpt2, train_tokenizer
from qr_rlhf.synthetic import World
from qr_rlhf.training import score_pairs

disable_progress_bars()
SIDES = ("chosen", "rejected")
ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
ASK = "\n\nHuman: My bread is flat.\n\nAssistant:"
PAIR = dict(chosen=ASK + " Try fresh yeast.", rejected=ASK + " Buy some bread.")
LINE = json.dumps(PAIR)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "[{{ m['content'] }}]{% endfor %}"
)


def message(role, content):
    return dict(role=role, content=content)


def reply(content):
    return [message("assistant", content)]


def in_chat(row):
    "A row of HH-RLHF's text as messages, the prompt given."
    chosen, rejected = (text_to_messages(row[side]) for side in SIDES)
    assert chosen[:-1] == rejected[:-1]
    return dict(prompt=chosen[:-1], chosen=chosen[-1:], rejected=rejected[-1:])


def in_strings(row):
    "A row of HH-RLHF's text as strings, the prompt given."
    marker = "\n\nAssistant: "
    replies = {side: row[side][row[side].rindex(marker) + len(marker) :] for side in SIDES}
    return dict(prompt=row["chosen"][: row["chosen"].rindex("\n\nAssistant:")], **replies)


def write(path, rows):
    "Write rows as the file's ending says."
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
        return path
    if ".json" in path.suffixes:
        text = json.dumps(rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def load(path):
    return [load_pairs(path, "mine", split) for split in ("train", "test")]


def refusal(function, *args, **kwargs):
    "The sentence with which a function refuses its arguments."
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def rows():
    return World().rows("helpful", "train", 60)


@pytest.fixture(scope="module")
def backbone(rows, tmp_path_factory):
    "A folder with a tiny GPT-2 and its tokenizer, which has no chat template."
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = train_tokenizer([row["chosen"] for row in rows], 400)
    tokenizer.save_pretrained(folder)
    model = tiny_gpt2(tokenizer, max_length=400, n_layer=2, n_embd=32, n_head=2, seed=0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_tokenizer(backbone):
    tokenizer = load_tokenizer(backbone)
    special = dict(eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"])
    tokenizer.add_special_tokens(special)
    tokenizer.chat_template = CHATML
    return tokenizer


def test_chat_and_string_files_give_the_same_table_and_rewards(rows, backbone, tmp_path):
    "Ten pairs in each of TRL's formats and every kind of file."
    ten = rows[:10]
    chats = [in_chat(row) for row in ten]
    formats = dict(
        strings_implicit=ten,
        chat=chats,
        strings=[in_strings(row) for row in ten],
        chat_implicit=[{s: chat["prompt"] + chat[s] for s in SIDES} for chat in chats],
    )
    files = [
        write(tmp_path / f"{name}{ending}", content)
        for name, content in formats.items()
        for ending in ENDINGS
    ]
    tables = [load(path) for path in files]
    first = tables[0]
    (train, _), (test, _) = first
    assert len(train) + len(test) == 10
    assert not set(train["prompt"]) & set(test["prompt"])
    for table in tables:
        for (pairs, dropped), (same, _) in zip(table, first, strict=True):
            assert pairs.to_list() == same.to_list()
            assert len(pairs) + sum(dropped.values()) == 10
    assert len({data_hash(*(pairs for pairs, _ in table)) for table in tables}) == 1

    tokenizer = load_tokenizer(backbone)
    model = load_reward_model(backbone, tokenizer, n=10)
    rewards = []
    for path in (files[0], files[5], files[-1]):
        encoded, _ = encode_pairs(load(path)[0][0], tokenizer, 400)
        found = score_pairs(model, tokenizer, encoded, disable_tqdm=True)
        rewards.append(torch.from_numpy(found))
    assert torch.equal(rewards[0], rewards[1])
    assert torch.equal(rewards[0], rewards[2])
    assert rewards[0].std() > 0


def test_a_folder_has_its_own_test_part(rows, tmp_path):
    write(tmp_path / "train.jsonl", rows[:20])
    write(tmp_path / "test.parquet", [in_chat(row) for row in rows[20:32]])
    (train, _), (test, dropped) = load(tmp_path)
    assert len(train) == 20 and len(test) == 12 and not dropped

    write(tmp_path / "validation.jsonl", rows[:20])
    (tmp_path / "test.parquet").unlink()
    said = "has train, validation, not both train and test; name two of them"
    assert said in refusal(load, tmp_path)
    assert len(load_pairs(tmp_path, "mine", "test", splits=["train", "validation"])[0]) == 20
    (train, gone), (test, _) = (
        load_pairs(tmp_path, "mine", split, splits=["train"]) for split in ("train", "test")
    )
    assert len(train) + len(test) == 20 and gone["other_part"] == len(test)


def test_ids_are_those_of_the_chat_template(rows, chat_tokenizer, tmp_path):
    """Prompt and response together are what `apply_chat_template` gives for the whole dialogue.

    So TRL tokenises it; with a system message, and whatever a reply starts with.
    """
    chats = [in_chat(row) for row in rows[:12]]
    chats[1]["prompt"] = [message("system", "You are brief.\n"), *chats[1]["prompt"]]
    for i, text in enumerate((" two\n\nlines ", "\n\nHm.", "naïve 北京", "")):
        chats[2 + i]["chosen"] = reply(text)
    path = write(tmp_path / "mine.json", chats)
    pairs, dropped = load_pairs(path, "mine", "train", splits=None)
    more, dropped_too = load_pairs(tmp_path / "mine.json", "mine", "test")
    assert dropped["empty"] == dropped_too["empty"] == 1

    ids = {}
    for table in (pairs, more):
        encoded, gone = encode_pairs(table, chat_tokenizer, 400)
        assert not gone
        for row in encoded:
            for side in SIDES:
                ids[tuple(row["prompt_ids"] + row[f"{side}_ids"])] = tuple(row["prompt_ids"])

    options = dict(tokenize=True, return_dict=False)
    template = chat_tokenizer.apply_chat_template
    expected = {}
    for chat in chats[:5] + chats[6:]:
        prompt = tuple(template(chat["prompt"], add_generation_prompt=True, **options))
        for side in SIDES:
            expected[tuple(template(chat["prompt"] + chat[side], **options))] = prompt
    assert set(ids) == set(expected) and len(ids) == 22
    # one pair's prompt ends a token earlier: its line break and the reply's are one token
    assert sum(ids[whole] == expected[whole] for whole in ids) >= 20

    start = "<|im_start|>system\nYou are brief.\n<|im_end|>\n"
    system = next(whole for whole in ids if chat_tokenizer.decode(whole).startswith(start))
    assert system[-2] == chat_tokenizer.eos_token_id
    assert chat_tokenizer.decode(system[-1:]) == "\n"


def test_rewards_by_chat_template_are_those_of_the_stock_class(
    rows, backbone, chat_tokenizer, tmp_path
):
    model = load_reward_model(backbone, chat_tokenizer, n=10)
    model.save_pretrained(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == CHATML

    chat = in_chat(rows[0])
    dialogue = chat["prompt"] + chat["chosen"]
    whole = tokenizer.apply_chat_template(dialogue, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        expected = stock(**whole).logits
    rewards = score(model, tokenizer, chat["prompt"], [chat["chosen"]])
    assert (rewards - expected).abs().max() < 1e-5

    voted = write(tmp_path / "one.jsonl", [row | dict(share=0.7) for row in rows[:10]])
    table, _ = load_pairs(voted, "mine", "train")
    encoded, _ = encode_pairs(table, tokenizer, 400)
    rewards = score_pairs(model, tokenizer, encoded, disable_tqdm=True)
    again = score(model, tokenizer, table[0]["prompt"], [table[0][side] for side in SIDES])
    assert (torch.from_numpy(rewards[0]) - again).abs().max() < 1e-5
    assert encoded[0]["share"] == 0.7


WHY = dict(prompt="Why?", chosen="Hm.", rejected="No.")
CHAT = dict(prompt="Why?", chosen=reply("Hm."), rejected=reply("No."))
MALFORMED = [
    (3, "this is of type int"),
    (dict(chosen="Hm."), "the field 'rejected' is missing; each row needs"),
    (WHY | dict(rejected=3), "'rejected' is of type int"),
    (WHY | dict(rejected=reply("No.")), "one is a string and the other a list"),
    (dict(chosen="Hm.", rejected="No."), "there is no prompt; give a field 'prompt'"),
    (CHAT | dict(chosen=[dict(role="assistant")]), "chosen, message 1 is no"),
    (dict(chosen=[{"from": "gpt", "value": "Hm."}], rejected=[]), "rename from and value"),
    (CHAT | dict(chosen=[message("bot", "Hm.")]), "has the role 'bot'"),
    (WHY | dict(share=1.5), "'share' is 1.5"),
    (WHY | dict(prompt=[message("user", 3)]), "prompt, message 1: the content is of type int"),
]


@pytest.mark.parametrize("row, said", MALFORMED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_malformed_row_is_named(row, said, rows, tmp_path):
    good = in_chat(rows[0])
    for name, where in {"mine.jsonl": "line 3: ", "mine.json": "item 3: "}.items():
        sentence = refusal(load, write(tmp_path / name, [good, good, row]))
        assert f"{name}, {where}" in sentence and said in sentence


def test_rows_that_are_in_no_format():
    assert "surrogate" in refusal(read_row, CHAT | dict(chosen=reply("\ud800")), "here")
    opened = WHY | dict(prompt="Human: Hm?\n\nAssistant:")
    assert "not with two line breaks" in refusal(read_row, opened, "here")
    spoken = CHAT | dict(prompt=[message("user", "Hm?"), message("assistant", "Well,")])
    assert "ends with words of the assistant" in refusal(read_row, spoken, "here")
    assert "'prompt' is of type int" in refusal(read_row, WHY | dict(prompt=3), "here")


def test_what_cannot_be_used_is_counted(rows, tmp_path):
    good = [in_chat(row) for row in rows]
    first = good[0]
    late_system = [*reply("Hm."), message("system", "Stop."), *reply("So.")]
    bad = [
        first | dict(chosen=[message("assistant", None) | dict(tool_calls=[dict(id=1)])]),
        first | dict(rejected=reply([dict(type="image")])),
        first | dict(chosen=first["rejected"]),
        first | dict(chosen=reply("He wrote:\n\nHuman: Hello.")),
        first | dict(chosen=[*reply("Hm."), message("user", "And?")]),
        first | dict(rejected=reply(" ")),
        dict(prompt="Another.") | {side: first["prompt"] + first[side] for side in SIDES},
        first | dict(chosen=late_system),
    ]
    reasons = """tool_use not_text equal turn_marker no_reply empty prompt_differs
        system_inside""".split()
    for pairs, dropped in load(write(tmp_path / "mine.jsonl", good + bad)):
        assert len(pairs) + sum(dropped.values()) == len(good) + len(bad)
        dropped.pop("other_part")
        assert dropped == dict.fromkeys(reasons, 1)


BROKEN = {
    "number.jsonl": (LINE + '\n{"chosen": 3, "rejected": "x"}\n', "line 2: the field 'chosen'"),
    "missing.jsonl": (LINE + '\n{"chosen": "\\n\\nHuman: x"}', "line 2: the field 'rejected'"),
    "cut.jsonl": (LINE + "\n" + LINE[:50], "line 2: not JSON"),
    "blank.jsonl": (LINE + "\n\n" + LINE, "line 2: not JSON"),
    "list.json": ("[1, 2]", "item 1: this is of type int"),
    "plain.jsonl": ('{"chosen": "hello", "rejected": "bye"}', "line 1: chosen has no turn"),
    "array.json": (f"[{LINE}, {LINE}", "array.json: not JSON"),
    "empty.jsonl": ("", "the file has no rows"),
    "none.json": ("[]", "the file has no rows"),
    "latin.jsonl": (LINE.encode() + '\n{"chosen": "é"}'.encode("latin-1"), "line 2: not UTF-8"),
    "short.jsonl.gz": (gzip.compress(LINE.encode())[:-9], "damaged"),
    "plain.jsonl.gz": (LINE, "damaged"),
    "half.jsonl": ('{"chosen": "\\n\\nHuman: \\ud800", "rejected": ""}', "surrogate"),
    "bad.parquet": (LINE, "can't be read (damaged"),
    "table.csv": ("chosen,rejected\nHm.,No.", "table.csv: only files in .jsonl, .json"),
    "deep.jsonl": ("[" * 100_000, "a number is too long or the nesting too deep"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(name, tmp_path):
    content, said = BROKEN[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    sentence = refusal(load, tmp_path / name)
    assert name in sentence and said in sentence


def test_what_cannot_be_found_is_named(tmp_path):
    rows = sources.read_file(tmp_path / "none.json")
    assert "can't be read" in refusal(list, rows)
    for source in ("./no-such-folder", "no-such-file.jsonl"):
        assert "there is no file or folder" in refusal(load, source)
    assert "neither a file nor a folder nor" in refusal(load, "what is this?")

    Dataset.from_list([PAIR]).save_to_disk(tmp_path / "saved")
    DatasetDict(train=Dataset.from_list([PAIR])).save_to_disk(tmp_path / "saved_too")
    for saved in ("saved", "saved_too"):
        said = "was written by save_to_disk of datasets, in Arrow's format"
        assert said in refusal(load, tmp_path / saved)

    own = tmp_path / "own"
    own.mkdir()
    assert "there is no file of pairs" in refusal(load, own)
    write(own / "train.jsonl", [PAIR])
    write(own / "test.jsonl", [PAIR])
    assert "leave subsets out" in refusal(load_pairs, own, "mine", "train", subsets=["a"])
    assert "name two of them" in refusal(load_pairs, own, "mine", "test", splits=["train", "b"])
    write(own / "test.json", [PAIR])
    assert "test.json, test.jsonl all claim" in refusal(load, own)
    for found, splits in (
        (["train", "validation"], None),
        (["train", "test"], ["train", "valid"]),
        (["a", "b", "c"], ["a", "b", "c"]),
    ):
        said = refusal(sources.choose_split, found, "train", splits, "mine")
        assert "name two of them" in said


def test_a_file_that_is_not_there_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "folder").mkdir(parents=True)
    assert not any(sources.hub_id(f"files/mine{ending}") for ending in ENDINGS)
    assert sources.hub_id("files/MINE.JSONL") is None and sources.hub_id("owner/folder") is None
    assert sources.hub_id("trl-lib/tldr-preference") == "trl-lib/tldr-preference"


def test_what_is_asked_for_must_be_there(tmp_path):
    "In HH-RLHF's layout."
    subset = tmp_path / "helpful-base"
    subset.mkdir()
    (subset / "train.jsonl").write_text(LINE)
    (subset / "test.jsonl").write_text(json.dumps(PAIR | dict(chosen=PAIR["rejected"])))
    known = "choose one of helpful, harmless"
    assert known in refusal(load_pairs, tmp_path, "helpfull", "train")
    assert known in refusal(load_pairs, World(), "helpfull", "train", 4)
    assert "choose one of train, test" in refusal(load_pairs, tmp_path, "helpful", "valid")
    assert "1 or more" in refusal(load_pairs, tmp_path, "helpful", "train", n=0)
    assert "no pair is left" in refusal(load_pairs, tmp_path, "helpful", "test")
    said = refusal(load_pairs, tmp_path, "helpful", "train", splits=["train"])
    assert "leave splits out" in said
    assert "there is no file train.jsonl" in refusal(load_pairs, tmp_path, "harmless", "train")
    assert "give more pairs" in refusal(
        split_validation, load_pairs(tmp_path, "helpful", "train")[0]
    )
    (subset / "train.jsonl.gz").write_bytes(gzip.compress(LINE.encode()))
    assert "both a plain and a gzip file" in refusal(load_pairs, tmp_path, "helpful", "train")


def test_votes_are_in_every_row_or_in_none(tmp_path):
    voted = PAIR | dict(share=0.9)
    said = refusal(load, write(tmp_path / "a.jsonl", [voted] * 100 + [PAIR]))
    assert "line 101: the field 'share' is missing, though earlier pairs have it" in said
    said = refusal(load, write(tmp_path / "b.jsonl", [PAIR, voted]))
    assert "the field 'share' is here, though earlier pairs lack it" in said


def test_templates_and_lengths_that_fit_no_pair(backbone):
    tokenizer = load_tokenizer(backbone)
    pairs = Dataset.from_list([dict(prompt=ASK, chosen=" Yes.", rejected=" No.")])
    assert "raise max_length" in refusal(encode_pairs, pairs, tokenizer, 2)

    tokenizer.chat_template = NO_SYSTEM
    assert "no turn" in refusal(apply_template, tokenizer, "Why?", [" Because."])
    said = "System role not supported"
    assert said in refusal(apply_template, tokenizer, "You bake." + ASK, [" Hm."])
    pairs = Dataset.from_list([dict(prompt="You bake." + ASK, chosen=" Yes.", rejected=" No.")])
    assert said in refusal(encode_pairs, pairs, tokenizer, 64)

    each = "{% for m in messages %}[{{ m }}]{% endfor %}"
    tokenizer.chat_template = "{{ messages | length }}" + each
    assert "can't be parted" in refusal(apply_template, tokenizer, ASK, [" Hm."])


def test_a_dataset_on_the_hub(rows, tmp_path, monkeypatch):
    """What the Hub would answer is made up here.

    There is a dataset with splits of its own names, and one in HH-RLHF's layout.
    """
    chats = [in_chat(row) for row in rows]
    tables = dict(train_prefs=chats[:20], test_prefs=chats[20:32], train_sft=chats[32:34])
    files = {"me/prefs": ["data/train_prefs.parquet"], "me/hh": ["helpful-base/train.jsonl.gz"]}

    class Answers:
        def dataset_info(self, repo, timeout):
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in files[repo]])

    def load_dataset(repo, config):
        return DatasetDict({name: Dataset.from_list(table) for name, table in tables.items()})

    def hub_file(repo, name):
        return write(tmp_path / name.replace("/", "-"), rows[:20])

    monkeypatch.setattr(sources, "HfApi", Answers)
    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "hub_file", hub_file)

    said = refusal(load_pairs, "me/prefs", "mine", "train")
    assert "'me/prefs' has train_prefs, test_prefs, train_sft, not both train and test" in said
    assert "; name two of them" in said and "-p splits train_prefs,test_prefs" in said

    names = ["train_prefs", "test_prefs"]
    train, test = (
        load_pairs("me/prefs", "mine", split, splits=names)[0] for split in ("train", "test")
    )
    assert len(train) == 20 and len(test) == 12
    (tmp_path / "hh").mkdir()
    write(tmp_path / "hh" / "train.jsonl", rows[:20])
    write(tmp_path / "hh" / "test.json", rows[20:32])
    (same_train, _), (same_test, _) = load(tmp_path / "hh")
    assert train.to_list() == same_train.to_list()
    assert test.to_list() == same_test.to_list()
    assert len(load_pairs("me/hh", "helpful", "train")[0]) == 20

    tables["train_prefs"][3] = chats[3] | dict(prompt=None)
    said = refusal(load_pairs, "me/prefs", "mine", "train", splits=["train_prefs"])
    assert "'me/prefs' (train_prefs), row 4: chosen starts with the assistant's message" in said
    monkeypatch.undo()
    said = refusal(load_pairs, "me/nowhere", "mine", "train")
    assert "'me/nowhere' (this dataset) can't be had from the Hub (" in said
    assert "; check the id and the network, or give a local folder or file" in said


def test_run_on_a_file_of_ones_own(project):
    rows = [in_chat(row) | dict(share=0.8) for row in World().rows("harmless", "train", 150)]
    write(project.folder / "mine.json", rows)
    small = {k: v for k, v in SMALL.items() if not k.startswith(("n_train", "n_eval"))}
    done = project.papermill("run", "runs/mine.ipynb", data="mine.json", **small)
    assert done.returncode == 0, done.stderr
    results = project.results("mine")
    assert results["workload"] == "mine" and results["data"] == "mine.json"
    assert results["n_train"] + results["n_valid"] + results["n_eval"] == 150
    assert results["dropped"]["eval"] == dict(other_part=150 - results["n_eval"])
    assert results["shared_prompts"] == 0

    write(project.folder / "few.json", rows[:20])
    few = project.papermill("run", data="few.json", **small)
    assert "intervals need 12 or more; give more pairs" in error(few)
    none = project.papermill("run", data="none.json", **small)
    assert "there is no file or folder" in error(none)
    named = dict(data="few.json", name="splits", splits="train,test")
    two = project.papermill("run", **named, **small)
    assert "few.json has few; name two of them" in error(two)
