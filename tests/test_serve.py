"The server: what many clients get, what is refused, and that it outlives what it is sent."

import asyncio
import copy
import json
import re
import shutil
import socket

import httpx
import numpy as np
import pytest
import torch
from conftest import ROOT
from serving import (
    ASK,
    LIMITS,
    MARKED,
    SAY,
    Server,
    answers_to_malformed,
    ask_from_clients,
    is_refusal,
    known_rewards,
    save_model,
)
from transformers import GPT2Config, pipeline

from qr_rlhf import load, serve
from qr_rlhf.batches import Scorer, encode_text, length_batches
from qr_rlhf.export import ending_tokenizer, text_ends
from qr_rlhf.model import (
    RewardDistribution,
    load_reward_model,
    load_tokenizer,
    quantile_levels,
    read_quantiles,
    score,
)
from qr_rlhf.packing import describe_outputs
from qr_rlhf.policy import RiskMeasure, export_reward_model
from qr_rlhf.serve import BodyLimit, Limits, make_app

TEXT = MARKED + "No."


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A saved reward model: its folder, the model, its tokenizer, and known rewards."
    folder = tmp_path_factory.mktemp("served")
    model, tokenizer = save_model(folder)
    return folder, model, tokenizer, known_rewards(model, tokenizer)


@pytest.fixture(scope="module")
def server(saved):
    with Server(saved[0]) as server:
        yield server


def ask(app, *requests, **options):
    "Answers of an application, without a network; each request is a path and a body."

    async def send():
        door = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=door, base_url="http://app", **options) as c:
            return await asyncio.gather(*(c.post(path, json=body) for path, body in requests))

    return asyncio.run(send())


def told(answer):
    return answer.json()["error"]["message"]


def test_many_clients_get_what_score_gives(server, saved):
    assert ask_from_clients(server.url, saved[3], requests=320, clients=32) < 1e-5


def test_malformed_requests_are_refused_with_a_sentence(server):
    for answer, asked in answers_to_malformed(server.url, 100, seed=0):
        assert is_refusal(answer), (asked, answer.status_code, answer.text[:300])
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


def test_killed_and_started_again_it_serves(server, saved):
    server.kill()
    server.start()
    assert ask_from_clients(server.url, saved[3], requests=32, clients=32) < 1e-5


def test_the_recipe_for_trl_trains(server, saved, monkeypatch):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    folder, model, tokenizer, _ = saved
    book = json.loads((ROOT / "nbs" / "28_serve.ipynb").read_text(encoding="utf-8"))
    text = "\n".join("".join(cell["source"]) for cell in book["cells"])
    recipe = re.search(r"```python\n(import httpx.*?)\ntrainer", text, re.S)[1]
    known, seen = {}, []
    exec(recipe.replace("http://localhost:8000", server.url), known)

    def watched(prompts, completions, **kwargs):
        rewards = known["reward"](prompts, completions)
        seen.append((prompts, completions, rewards))
        return rewards

    args = dict(max_steps=1, num_generations=8, max_completion_length=8, use_cpu=True)
    args |= dict(bf16=False, report_to="none")
    trl.GRPOTrainer(
        model=str(folder / "backbone"),
        reward_funcs=watched,
        args=trl.GRPOConfig(str(folder / "grpo"), **args),
        train_dataset=Dataset.from_dict(dict(prompt=[MARKED[:-1]])),
    ).train()
    for prompts, completions, rewards in seen:
        replies = [reply.split("\n\nHuman:")[0] for reply in completions]
        quantiles = score(model, tokenizer, prompts[0], replies)
        assert np.allclose(rewards, RewardDistribution(quantiles).cvar(0.2), atol=1e-5)
    assert seen


def test_every_form_of_a_request_gives_the_same(saved):
    _, model, tokenizer, _ = saved
    app, ids = make_app(model, tokenizer, "m"), tokenizer(TEXT)["input_ids"]
    forms = [dict(input=form) for form in (TEXT, [TEXT], ids, [ids], TEXT + "<|endoftext|>")]
    forms += [dict(messages=[ASK, SAY]), dict(input=TEXT, model="m", use_activation=True)]
    answers = ask(app, *[("/classify", form) for form in forms])
    expected = score(model, tokenizer, "Why?", ["No."])
    for answer in answers:
        (item,) = answer.json()["data"]
        assert abs(item["probs"][-1] - expected.mean()) < 1e-5, answer.text
        assert item["num_classes"] == 1 and item["index"] == 0
    usage = answers[0].json()["usage"]
    assert usage["prompt_tokens"] == usage["total_tokens"] == len(ids) + 1
    assert answers[0].json()["object"] == "list" and answers[0].json()["model"] == "m"
    (answer,) = ask(app, ("/get_reward", dict(query=[TEXT], prompts=[MARKED], labels=[None])))
    logs = answer.json()["extra_logs"]
    levels = [logs[f"reward at level {level:g}"] for level in model.config.quantile_levels]
    assert np.allclose(levels, expected.T, atol=1e-5)
    assert np.allclose(logs["mean"], answer.json()["rewards"], atol=1e-6)


@pytest.mark.parametrize("family", [None, "normal", "free"])
def test_the_stock_pipeline_gives_what_score_gives(tmp_path, family):
    model, tokenizer = save_model(tmp_path, family)
    stock = pipeline("text-classification", model=str(tmp_path))
    outputs = {one["label"]: one["score"] for one in stock(TEXT + "<|endoftext|>", top_k=None)}
    assert stock(TEXT + "<|endoftext|>")[0]["score"] == max(outputs.values())
    in_order = torch.tensor([[outputs[model.config.id2label[i]] for i in range(len(outputs))]])
    expected = score(model, tokenizer, "Why?", ["No."])
    assert torch.allclose(read_quantiles(in_order, model.config), expected, atol=1e-5)
    measure = None if family else RiskMeasure("cvar", 0.2)
    export_reward_model(model, tokenizer, tmp_path / "export", measure)
    exported = pipeline("text-classification", model=str(tmp_path / "export"))
    wanted = expected[:, :2].mean() if measure else expected.mean()
    for text in (TEXT, TEXT + "<|endoftext|>"):
        (one,) = exported(text)
        assert one["label"] == "reward" and abs(one["score"] - wanted) < 1e-5


def test_outputs_have_names_and_no_loss(saved):
    folder, model, tokenizer, _ = saved
    config = json.loads((folder / "config.json").read_text())
    names = [f"reward at level {level:g}" for level in quantile_levels(10)]
    assert list(config["id2label"].values()) == names and config["label2id"][names[3]] == 3
    assert config["problem_type"] == "regression"
    assert model(**tokenizer(TEXT, return_tensors="pt")).loss is None
    other = GPT2Config(num_labels=2)
    describe_outputs(other, quantile_levels(10), "normal")
    assert other.id2label == {0: "mean reward", 1: "log scale"} and other.num_labels == 2


def test_a_checkpoint_of_an_earlier_version_loads_as_before(saved, tmp_path):
    folder, model, tokenizer, _ = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    del config["problem_type"]
    config["id2label"] = {i: f"LABEL_{i}" for i in range(10)}
    config["label2id"] = {f"LABEL_{i}": i for i in range(10)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = load_reward_model(tmp_path, load_tokenizer(tmp_path))
    found, expected = (score(m, tokenizer, "Why?", ["No."]) for m in (old, model))
    assert torch.equal(found, expected)
    assert old.config.problem_type == "regression" and old.config.id2label[0].endswith("0.05")


@pytest.mark.parametrize("family", ["normal", "free"])
def test_other_families_are_read_as_score_reads_them(tmp_path, family):
    model, tokenizer = save_model(tmp_path, family)
    app = make_app(model, tokenizer, "m", RiskMeasure("entropic", 1.0))
    (answer,) = ask(app, ("/get_reward", dict(query=[TEXT])))
    expected = RewardDistribution(score(model, tokenizer, "Why?", ["No."]))
    wanted = RiskMeasure("entropic", 1.0)(expected)
    assert np.allclose(answer.json()["rewards"], wanted, atol=1e-5)
    assert len(answer.json()["extra_logs"]) == 11


def test_whoever_lacks_the_key_gets_nothing(saved):
    _, model, tokenizer, _ = saved
    app = make_app(model, tokenizer, "m", key="öpen")
    request = ("/classify", dict(input=TEXT))
    for header in (None, "Bearer open", "Basic open", "Bearer "):
        (answer,) = ask(app, request, headers={"Authorization": header} if header else None)
        assert answer.status_code == 401 and told(answer).startswith("key: ")
    (answer,) = ask(app, request, headers={"Authorization": "Bearer öpen".encode()})
    assert answer.status_code == 200


def test_where_too_much_waits_others_are_told_to_come_again(saved):
    _, model, tokenizer, _ = saved
    app = make_app(model, tokenizer, "m", limits=Limits(waiting=3))
    answers = ask(app, *[("/classify", dict(input=[TEXT] * 2))] * 3)
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200, 503, 503]
    busy = [answer for answer in answers if answer.status_code == 503]
    assert told(busy[0]) == "busy: 2 texts wait already; try again later."
    assert busy[0].headers["retry-after"] == "1"
    assert ask(app, ("/classify", dict(input=TEXT)))[0].status_code == 200
    (too_many,) = ask(app, ("/classify", dict(input=[TEXT] * 4)))
    assert too_many.status_code == 400
    assert told(too_many).startswith("input: 4 texts are more than the 3 that may wait; send ")


def test_what_fails_within_is_one_sentence_and_the_server_goes_on(saved):
    _, model, tokenizer, _ = saved
    broken = copy.deepcopy(model)
    app, request = make_app(broken, tokenizer, "m"), ("/classify", dict(input=TEXT))
    weights = broken.score.weight.detach().clone()
    broken.score.weight.data[:] = float("nan")
    (answer,) = ask(app, request)
    assert answer.status_code == 500 and told(answer).endswith("its log says why.")
    broken.score.weight.data[:] = weights
    assert ask(app, request)[0].status_code == 200


def test_a_bad_request_spoils_no_other(saved):
    _, model, tokenizer, _ = saved
    app = make_app(model, tokenizer, "m")
    bodies = [dict(input=TEXT), dict(input="a" * 5000), dict(input=[10**6]), dict(input=TEXT)]
    answers = ask(app, *[("/classify", body) for body in bodies])
    assert [answer.status_code for answer in answers] == [200, 400, 400, 200]
    assert "tokens with its ends, but a sequence may have 512; shorten it." in told(answers[1])


def test_a_request_that_cannot_be_computed_spoils_no_other(saved, monkeypatch):
    _, model, tokenizer, _ = saved
    compute = Scorer.compute

    def compute_short(scorer, rows):
        if max(map(len, rows)) > 100:
            raise MemoryError
        return compute(scorer, rows)

    monkeypatch.setattr(Scorer, "compute", compute_short)
    app = make_app(model, tokenizer, "m")
    bodies = [dict(input=TEXT), dict(input="a" * 300), dict(input=TEXT)]
    answers = ask(app, *[("/classify", body) for body in bodies])
    assert [answer.status_code for answer in answers] == [200, 500, 200]


def test_a_body_is_counted_while_it_comes_in(server):
    def chunks(n):
        yield b'{"input": "'
        for _ in range(n):
            yield b"a" * 1000

    for n in (LIMITS["body"] // 1000, 150):  # without a length; a little over the limit
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{server.url}/classify", content=chunks(n), headers=headers)
        assert answer.status_code == 413
        assert told(answer).startswith("body: it has more than 100000 bytes;")
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_much_too_long_body_is_cut_off():
    async def app(scope, receive, send):
        while True:
            await receive()

    taken = []

    async def receive():
        taken.append(100)
        return dict(type="http.request", body=b"a" * 100, more_body=True)

    with pytest.raises(Exception, match="413"):
        asyncio.run(BodyLimit(app, 1000)({}, receive, None))
    assert sum(taken) <= 2200


def test_many_wrong_items_are_one_error(saved, monkeypatch):
    _, model, tokenizer, _ = saved
    app, found = make_app(model, tokenizer, "m"), []
    sentence = serve.first_fault

    def watched(error):
        found.append(len(error.errors()))
        return sentence(error)

    monkeypatch.setattr(serve, "first_fault", watched)
    bodies = [
        ("/get_reward", dict(query=[1] * 10**4)),
        ("/get_reward", dict(query=[TEXT], prompts=[1.5] * 10**4)),
        ("/classify", dict(input=[1.5] * 10**4)),
        ("/classify", dict(messages=[1] * 10**4)),
    ]
    assert all(map(is_refusal, ask(app, *bodies))) and found == [1]


def test_the_command_says_what_it_cannot_serve(saved, tmp_path):
    folder = str(saved[0])
    for given, words in [
        ([folder, "--measure", "median"], "measure: 'median' is unknown"),
        ([folder, "--measure", "quantile 0.001"], "level: 0.001 is outside"),
        ([folder, "--length", "5000"], "max_length: 5000 is more than the model's 512"),
        ([str(tmp_path)], "can't be loaded"),
    ]:
        with pytest.raises(SystemExit) as refusal:
            serve.main(given)
        assert words in refusal.value.code and refusal.value.code.endswith(".")


def test_the_command_serves_an_adapter(saved, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(saved[1]), config).save_pretrained(tmp_path)
    served = []
    monkeypatch.setattr(serve.uvicorn, "run", lambda app, **options: served.append(app))
    serve.main([str(tmp_path)])
    (answer,) = ask(served[0], ("/get_reward", dict(query=[TEXT])))
    adapted = load(tmp_path, device="cpu").score("Why?", ["No."]).mean().item()
    assert answer.json()["rewards"] == [pytest.approx(adapted, abs=1e-5)]
    plain = score(saved[1], saved[2], "Why?", ["No."]).mean().item()
    assert abs(plain - adapted) > 1e-3


def test_batches_hold_every_sequence_once():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 300, size=rng.integers(0, 40)).tolist()
        batches = length_batches(lengths, 512)
        assert sorted(sum(batches, [])) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) * max(lengths[i] for i in batch) <= 512


def test_the_token_that_a_template_opens_with_is_put_back(saved):
    tokenizer = copy.deepcopy(saved[2])
    tokenizer.add_special_tokens(dict(bos_token="<s>"))
    tokenizer.chat_template = (
        "<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    )
    whole = tokenizer.apply_chat_template([ASK, SAY], tokenize=False)
    without, ends = whole.removeprefix("<s>"), text_ends(tokenizer)
    ids = encode_text(tokenizer, ends, whole, "input")
    assert ids == encode_text(tokenizer, ends, without, "input")
    assert ids[0] == tokenizer.bos_token_id and ids.count(ids[0]) == 1
    exported = ending_tokenizer(tokenizer)
    assert exported(whole)["input_ids"] == exported(without)["input_ids"] == ids
