"""A server under load: many clients, malformed requests, a kill and a new start.

`python tests/serving.py` runs the long form and prints a report; test_serve.py has a short one.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import httpx
from conftest import ROOT

from qr_rlhf.model import (
    RewardDistribution,
    load_reward_model,
    load_tokenizer,
    score,
    tiny_gpt2,
    train_tokenizer,
)
from qr_rlhf.policy import read_measure
from qr_rlhf.synthetic import World

MEASURE = "cvar 0.2"
LIMITS = dict(body=100_000, texts=64)
MARKED = "\n\nHuman: Why?\n\nAssistant: "
ASK, SAY = dict(role="user", content="Why?"), dict(role="assistant", content="No.")


def save_model(folder, family=None):
    "Save a reward model with ten quantiles, and give it back with its tokenizer."
    rows = World().rows("harmless", "train", 200)
    tokenizer = train_tokenizer([row["chosen"] for row in rows], 600)
    backbone = folder / "backbone"
    tokenizer.save_pretrained(backbone)
    tiny_gpt2(tokenizer, 512, 2, 32, 4, seed=0).save_pretrained(backbone)
    tokenizer = load_tokenizer(backbone)
    model = load_reward_model(backbone, tokenizer, 10, family=family).eval()
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return model, tokenizer


def known_rewards(model, tokenizer, n=40):
    "Whole texts of many lengths, and the rewards that `score` gives them."
    known, measure = {}, read_measure(MEASURE)
    for row in World().rows("harmless", "test", n):
        prompt, _, reply = row["chosen"].rpartition("\n\nAssistant:")
        replies = [reply, " No.", " I must decline. I must decline.", " Yes!"]
        quantiles = score(model, tokenizer, f"{prompt}\n\nAssistant:", replies)
        rewards = measure(RewardDistribution(quantiles)).tolist()
        texts = [f"{prompt}\n\nAssistant:{text}" for text in replies]
        known |= dict(zip(texts, rewards, strict=True))
    return known


class Server:
    "A server in a process of its own."

    def __init__(self, folder, port=None, key=None):
        self.folder, self.port, self.key = folder, port or free_port(), key
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        return self.start()

    def __exit__(self, *error):
        self.kill()

    def start(self):
        options = [f"--{name}={value}" for name, value in LIMITS.items()]
        command = [sys.executable, "-m", "qr_rlhf.serve", str(self.folder), *options]
        command += ["--measure", MEASURE, "--port", str(self.port)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        env |= {"QR_RLHF_API_KEY": self.key} if self.key else {}
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
        while self.process.poll() is None:
            try:
                httpx.get(f"{self.url}/health").raise_for_status()
                return self
            except httpx.TransportError:
                time.sleep(0.1)
        raise RuntimeError("the server ended before it served")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def ask_from_clients(url, known, requests, clients):
    "Largest difference between the answers to many requests and the known rewards."

    def client(seed):
        rng, worst = random.Random(seed), 0.0
        with httpx.Client(base_url=url, timeout=120) as connection:
            for _ in range(requests // clients):
                texts = rng.choices(list(known), k=rng.randint(1, 4))
                found = ask(connection, texts, rng.random() < 0.5)
                pairs = zip(texts, found, strict=True)
                worst = max(worst, *(abs(known[text] - reward) for text, reward in pairs))
        return worst

    with ThreadPoolExecutor(clients) as pool:
        return max(pool.map(client, range(clients)))


def ask(connection, texts, as_vllm):
    if as_vllm:
        answer = connection.post("/classify", json=dict(input=texts)).raise_for_status().json()
        return [item["probs"][-1] for item in answer["data"]]
    answer = connection.post("/get_reward", json=dict(query=texts)).raise_for_status().json()
    assert len(answer["extra_logs"]["reward at level 0.05"]) == len(texts)
    return answer["rewards"]


def malformed(rng):
    "Requests that no server can answer, without end: method, path, body and content type."
    as_json, text = "application/json", MARKED + "No."
    whole = json.dumps(dict(input=text)).encode()
    values = [
        3,
        1.5,
        True,
        {},
        {"text": text},
        [],
        [[]],
        [3.5],
        [text, 3],
        [text, None],
        "",
        [""],
    ]
    values += [[-1], [10**9], [[1], [10**6]], [[1], "a"], [True], [[text]], ["a" * 50_000]]
    values += ["\ud800", [text, "b\udfff"], [text] * 65, 10**4000]
    chats = [[], [3], [ASK], [SAY], [ASK, ASK], [ASK, dict(role="assistant")]]
    chats += [[ASK, dict(role="bot", content="No.")], [dict(role="system", content="a"), SAY]]
    chats += [[ASK, dict(role="assistant", content="a\n\nHuman: b")], "Why?", dict(ASK)]
    chats += [
        [ASK, dict(role="assistant", content=[dict(type="image")])],
        [ASK, dict(SAY, content=3)],
    ]
    bodies = [b"", b"null", b"[]", b"3", b'"a"', b"{}", b"{" * 90_000, b"[" * 90_000]
    bodies += [
        b'{"input": NaN}',
        b'{"input": "\xff"}',
        b'{"input": 1e999}',
        b"\x00",
        b"a" * 150_000,
    ]
    bodies += [b'{"input": ' + b"9" * 5_000 + b"}"]
    while True:
        path = rng.choice(["/classify", "/get_reward"])
        field = "input" if path == "/classify" else "query"
        yield "POST", path, json.dumps({field: rng.choice(values)}).encode(), as_json
        yield (
            "POST",
            "/classify",
            json.dumps(dict(messages=rng.choice(chats))).encode(),
            as_json,
        )
        yield "POST", path, rng.choice(bodies), as_json
        yield "POST", path, rng.randbytes(rng.randint(1, 200)), as_json
        yield "POST", path, whole[: rng.randrange(len(whole))], as_json
        yield "POST", path, whole, rng.choice(["text/plain", "application/xml", "a", ""])
        yield (
            "POST",
            "/get_reward",
            json.dumps(dict(query=[text], prompts=[])).encode(),
            as_json,
        )
        other = rng.choice(
            [dict(model="another"), dict(chat_template="a"), dict(messages=[ASK, SAY])]
        )
        yield "POST", "/classify", json.dumps(dict(input=text, **other)).encode(), as_json
        yield rng.choice(["GET", "PUT", "DELETE"]), path, b"", as_json
        yield "POST", rng.choice(["/", "/get_rewards", "/../etc"]), whole, as_json


def answers_to_malformed(url, n, seed):
    "The answers to malformed requests, and what was asked."
    with httpx.Client(base_url=url, timeout=120) as connection:
        for method, path, body, kind in islice(malformed(random.Random(seed)), n):
            headers = {"Content-Type": kind}
            answer = connection.request(method, path, content=body, headers=headers)
            yield answer, (method, path, body[:200], kind)


def is_refusal(answer):
    "Whether an answer is a client's error, with one sentence."
    if not 400 <= answer.status_code < 500:
        return False
    said = answer.json()["error"]["message"]
    return said.endswith(".") and "\n" not in said and len(said) <= 1000


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--malformed", type=int, default=500)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        known = known_rewards(*save_model(Path(folder)))
        with Server(folder) as server:
            report(server, known, given)


def report(server, known, given):
    start = time.perf_counter()
    worst = ask_from_clients(server.url, known, given.requests, given.clients)
    rate = given.requests / (time.perf_counter() - start)
    print(
        f"{given.requests} requests of {given.clients} clients, {rate:.0f} a second: no error,"
    )
    print(f"largest difference from score {worst:.0e}")
    codes = Counter()
    for answer, asked in answers_to_malformed(server.url, given.malformed, seed=1):
        codes[answer.status_code] += 1
        if not is_refusal(answer):
            print("not refused:", asked, answer.status_code, answer.text[:200])
    print(f"{given.malformed} malformed requests: {dict(codes)}")
    server.kill()
    server.start()
    worst = ask_from_clients(server.url, known, 2 * given.clients, given.clients)
    print(f"killed and started again: largest difference {worst:.0e}")


if __name__ == "__main__":
    main()
