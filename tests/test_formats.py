"Other people's files, formats and tokenizers: the same words give the same table, ids and rewards."

import gzip, json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import SMALL, error
from datasets import Dataset, DatasetDict, disable_progress_bars
from transformers import AutoModelForSequenceClassification

from qr_rlhf import sources
from qr_rlhf.data import data_hash, encode_pairs, load_pairs
from qr_rlhf.formats import text_to_messages
from qr_rlhf.model import load_reward_model, load_tokenizer, score, tiny_gpt2, train_tokenizer
from qr_rlhf.synthetic import World
from qr_rlhf.training import score_pairs

disable_progress_bars()
SIDES = ("chosen", "rejected")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def message(role, content):
    return dict(role=role, content=content)


def in_chat(row):
    "A row of HH-RLHF's text as messages, the prompt given."
    chosen, rejected = (text_to_messages(row[side]) for side in SIDES)
    assert chosen[:-1] == rejected[:-1]
    return dict(prompt=chosen[:-1], chosen=chosen[-1:], rejected=rejected[-1:])


def write(path, rows):
    "Write rows as the file's ending says."
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        text = (
            json.dumps(rows)
            if ".json" in path.suffixes
            else "".join(json.dumps(row) + "\n" for row in rows)
        )
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def load(path):
    return [load_pairs(path, "mine", split) for split in ("train", "test")]


@pytest.fixture(scope="module")
def rows():
    return World().rows("helpful", "train", 60)


@pytest.fixture(scope="module")
def backbone(rows, tmp_path_factory):
    "A folder with a tiny GPT-2 and its tokenizer, which has no chat template."
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = train_tokenizer([row["chosen"] for row in rows], 400)
    tokenizer.save_pretrained(folder)
    tiny_gpt2(tokenizer, max_length=400, n_layer=2, n_embd=32, n_head=2, seed=0).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def chat_tokenizer(backbone):
    tokenizer = load_tokenizer(backbone)
    tokenizer.add_special_tokens(
        dict(eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"])
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def test_chat_and_string_files_give_the_same_table_and_rewards(rows, backbone, tmp_path):
    "Ten pairs in each of TRL's formats and every kind of file."
    ten = rows[:10]
    chats = [in_chat(row) for row in ten]
    formats = dict(
        strings_implicit=ten,
        chat=chats,
        strings=[
            dict(
                prompt=row["chosen"][: row["chosen"].rindex("\n\nAssistant:")],
                **{s: row[s][row[s].rindex("\n\nAssistant: ") + 13 :] for s in SIDES},
            )
            for row in ten
        ],
        chat_implicit=[{s: c["prompt"] + c[s] for s in SIDES} for c in chats],
    )
    files = [
        write(tmp_path / f"{name}{ending}", content)
        for name, content in formats.items()
        for ending in (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
    ]
    tables = [load(path) for path in files]
    first = tables[0]
    assert len(first[0][0]) + len(first[1][0]) == 10 and not set(first[0][0]["prompt"]) & set(
        first[1][0]["prompt"]
    )
    for table in tables:
        for (pairs, dropped), (same, _) in zip(table, first):
            assert pairs.to_list() == same.to_list() and len(pairs) + sum(dropped.values()) == 10
    assert len({data_hash(*(pairs for pairs, _ in table)) for table in tables}) == 1
    tokenizer = load_tokenizer(backbone)
    model = load_reward_model(backbone, tokenizer, n=10)
    rewards = [
        torch.from_numpy(
            score_pairs(
                model,
                tokenizer,
                encode_pairs(load(path)[0][0], tokenizer, 400)[0],
                disable_tqdm=True,
            )
        )
        for path in (files[0], files[5], files[-1])
    ]
    assert (
        torch.equal(rewards[0], rewards[1])
        and torch.equal(rewards[0], rewards[2])
        and rewards[0].std() > 0
    )


def test_a_folder_has_its_own_test_part(rows, tmp_path):
    write(tmp_path / "train.jsonl", rows[:20])
    write(tmp_path / "test.parquet", [in_chat(row) for row in rows[20:32]])
    (train, _), (test, dropped) = load(tmp_path)
    assert len(train) == 20 and len(test) == 12 and not dropped
    write(tmp_path / "validation.jsonl", rows[:20])
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(
        ValueError, match="has train, validation, not both train and test; name two of them"
    ):
        load(tmp_path)
    assert len(load_pairs(tmp_path, "mine", "test", splits=["train", "validation"])[0]) == 20
    parts = [load_pairs(tmp_path, "mine", split, splits=["train"]) for split in ("train", "test")]
    assert sum(len(pairs) for pairs, _ in parts) == 20 and parts[0][1]["other_part"] == len(
        parts[1][0]
    )


def test_ids_are_those_of_the_chat_template(rows, chat_tokenizer, tmp_path):
    "Prompt and response together are what `apply_chat_template` gives for the whole dialogue, as TRL tokenises it; with a system message, and whatever a reply starts with."
    chats = [in_chat(row) for row in rows[:12]]
    chats[1]["prompt"] = [message("system", "You are brief.\n"), *chats[1]["prompt"]]
    for i, text in enumerate((" two\n\nlines ", "\n\nHm.", "naïve 北京", "")):
        chats[2 + i]["chosen"] = [message("assistant", text)]
    pairs, dropped = load_pairs(write(tmp_path / "mine.json", chats), "mine", "train", splits=None)
    more, dropped_too = load_pairs(tmp_path / "mine.json", "mine", "test")
    assert dropped["empty"] == dropped_too["empty"] == 1
    ids = {}
    for table in (pairs, more):
        encoded, gone = encode_pairs(table, chat_tokenizer, 400)
        assert not gone
        ids |= {
            tuple(r["prompt_ids"] + r[f"{side}_ids"]): tuple(r["prompt_ids"])
            for r in encoded
            for side in SIDES
        }
    expected = {}
    for i, chat in enumerate(chats):
        if i == 5:
            continue
        prompt = chat_tokenizer.apply_chat_template(
            chat["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for side in SIDES:
            expected[
                tuple(
                    chat_tokenizer.apply_chat_template(
                        chat["prompt"] + chat[side], tokenize=True, return_dict=False
                    )
                )
            ] = tuple(prompt)
    assert set(ids) == set(expected) and len(ids) == 22
    assert (
        sum(ids[k] == expected[k] for k in ids) >= 20
    )  # one pair's prompt ends a token earlier: its line break and the reply's are one token
    system = next(
        k
        for k in ids
        if chat_tokenizer.decode(k).startswith("<|im_start|>system\nYou are brief.\n<|im_end|>\n")
    )
    assert system[-2] == chat_tokenizer.eos_token_id and chat_tokenizer.decode(system[-1:]) == "\n"


def test_rewards_by_chat_template_are_those_of_the_stock_class(
    rows, backbone, chat_tokenizer, tmp_path
):
    model = load_reward_model(backbone, chat_tokenizer, n=10)
    model.save_pretrained(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)
    stock, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        load_tokenizer(tmp_path),
    )
    assert tokenizer.chat_template == CHATML
    chat = in_chat(rows[0])
    whole = tokenizer.apply_chat_template(
        chat["prompt"] + chat["chosen"], return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        expected = stock(**whole).logits
    assert (score(model, tokenizer, chat["prompt"], [chat["chosen"]]) - expected).abs().max() < 1e-5
    table = load_pairs(
        write(tmp_path / "one.jsonl", [row | dict(share=0.7) for row in rows[:10]]), "mine", "train"
    )[0]
    encoded, _ = encode_pairs(table, tokenizer, 400)
    rewards = score_pairs(model, tokenizer, encoded, disable_tqdm=True)
    again = score(model, tokenizer, table[0]["prompt"], [table[0][side] for side in SIDES])
    assert (torch.from_numpy(rewards[0]) - again).abs().max() < 1e-5 and encoded[0]["share"] == 0.7


@pytest.mark.parametrize(
    "row, said",
    [
        (3, "this is of type int"),
        (dict(chosen="Hm."), "the field 'rejected' is missing; each row needs"),
        (dict(prompt="Why?", chosen="Hm.", rejected=3), "'rejected' is of type int"),
        (
            dict(prompt="Why?", chosen="Hm.", rejected=[message("assistant", "No.")]),
            "one is a string and the other a list",
        ),
        (dict(chosen="Hm.", rejected="No."), "there is no prompt; give a field 'prompt'"),
        (
            dict(
                prompt="Why?",
                chosen=[dict(role="assistant")],
                rejected=[message("assistant", "No.")],
            ),
            "chosen, message 1 is no",
        ),
        (dict(chosen=[{"from": "gpt", "value": "Hm."}], rejected=[]), "rename from and value"),
        (
            dict(
                prompt="Why?",
                chosen=[message("bot", "Hm.")],
                rejected=[message("assistant", "No.")],
            ),
            "has the role 'bot'",
        ),
        (dict(prompt="Why?", chosen="Hm.", rejected="No.", share=1.5), "'share' is 1.5"),
        (
            dict(prompt=[message("user", 3)], chosen="Hm.", rejected="No."),
            "prompt, message 1: the content is of type int",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_malformed_row_is_named(row, said, rows, tmp_path):
    good = in_chat(rows[0])
    for name, where in (
        ("mine.jsonl", "mine.jsonl, line 3: "),
        ("mine.json", "mine.json, item 3: "),
    ):
        with pytest.raises(ValueError) as caught:
            load(write(tmp_path / name, [good, good, row]))
        assert (
            where in str(caught.value)
            and said in str(caught.value)
            and "\n" not in str(caught.value)
        )


def test_what_cannot_be_used_is_counted(rows, tmp_path):
    good = [in_chat(row) for row in rows]
    bad = [
        dict(good[0], chosen=[message("assistant", None) | dict(tool_calls=[dict(id=1)])]),
        dict(good[0], rejected=[message("assistant", [dict(type="image")])]),
        dict(good[0], chosen=good[0]["rejected"]),
        dict(good[0], chosen=[message("assistant", "He wrote:\n\nHuman: Hello.")]),
        dict(good[0], chosen=[message("assistant", "Hm."), message("user", "And?")]),
        dict(good[0], rejected=[message("assistant", " ")]),
        dict(prompt="Another.", **{s: good[0]["prompt"] + good[0][s] for s in SIDES}),
        dict(
            good[0],
            chosen=[
                message("assistant", "Hm."),
                message("system", "Stop."),
                message("assistant", "So."),
            ],
        ),
    ]
    for pairs, dropped in load(write(tmp_path / "mine.jsonl", good + bad)):
        assert len(pairs) + sum(dropped.values()) == len(good) + len(bad)
        dropped.pop("other_part")
        assert dropped == dict(
            tool_use=1,
            not_text=1,
            equal=1,
            turn_marker=1,
            no_reply=1,
            empty=1,
            prompt_differs=1,
            system_inside=1,
        )


def test_a_dataset_on_the_hub(rows, tmp_path, monkeypatch):
    "What the Hub would answer is made up here: a dataset with splits of its own names, and one in HH-RLHF's layout."
    chats = [in_chat(row) for row in rows]
    tables = dict(train_prefs=chats[:20], test_prefs=chats[20:32], train_sft=chats[32:34])
    files = {"me/prefs": ["data/train_prefs.parquet"], "me/hh": ["helpful-base/train.jsonl.gz"]}

    class Answers:
        def dataset_info(self, repo, timeout):
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in files[repo]])

    monkeypatch.setattr(sources, "HfApi", Answers)
    monkeypatch.setattr(
        sources,
        "load_dataset",
        lambda repo, config: DatasetDict({k: Dataset.from_list(v) for k, v in tables.items()}),
    )
    monkeypatch.setattr(
        sources, "hub_file", lambda repo, name: write(tmp_path / name.replace("/", "-"), rows[:20])
    )
    with pytest.raises(
        ValueError,
        match="'me/prefs' has train_prefs, test_prefs, train_sft, not both train and test; name two of them.*-p splits train_prefs,test_prefs",
    ):
        load_pairs("me/prefs", "mine", "train")
    train, test = (
        load_pairs("me/prefs", "mine", split, splits=["train_prefs", "test_prefs"])[0]
        for split in ("train", "test")
    )
    assert len(train) == 20 and len(test) == 12
    (tmp_path / "hh").mkdir()
    write(tmp_path / "hh" / "train.jsonl", rows[:20])
    write(tmp_path / "hh" / "test.json", rows[20:32])
    assert (
        train.to_list() == load(tmp_path / "hh")[0][0].to_list()
        and test.to_list() == load(tmp_path / "hh")[1][0].to_list()
    )
    assert len(load_pairs("me/hh", "helpful", "train")[0]) == 20
    tables["train_prefs"][3] = dict(chats[3], prompt=None)
    with pytest.raises(
        ValueError,
        match=r"'me/prefs' \(train_prefs\), row 4: chosen starts with the assistant's message",
    ):
        load_pairs("me/prefs", "mine", "train", splits=["train_prefs"])
    monkeypatch.undo()
    with pytest.raises(
        ValueError,
        match="'me/nowhere' .* can't be had from the Hub .*; check the id and the network, or give a local folder or file",
    ):
        load_pairs("me/nowhere", "mine", "train")


def test_run_on_a_file_of_ones_own(project):
    rows = [in_chat(row) | dict(share=0.8) for row in World().rows("harmless", "train", 150)]
    write(project.folder / "mine.json", rows)
    small = {
        k: v for k, v in SMALL.items() if not k.startswith("n_train") and not k.startswith("n_eval")
    }
    done = project.papermill("run", "runs/mine.ipynb", data="mine.json", **small)
    assert done.returncode == 0, done.stderr
    results = project.results("mine")
    assert (
        results["workload"] == "mine"
        and results["data"] == "mine.json"
        and results["n_train"] + results["n_valid"] + results["n_eval"] == 150
    )
    assert (
        results["dropped"]["eval"] == dict(other_part=150 - results["n_eval"])
        and results["shared_prompts"] == 0
    )
    write(project.folder / "few.json", rows[:20])
    assert "intervals need 12 or more; give more pairs" in error(
        project.papermill("run", data="few.json", **small)
    )
    assert "there is no file or folder" in error(
        project.papermill("run", data="none.json", **small)
    )
    assert "few.json has few; name two of them" in error(
        project.papermill("run", data="few.json", name="splits", splits="train,test", **small)
    )
