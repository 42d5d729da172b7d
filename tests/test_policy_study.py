"The policy study, tiny: GRPO in the embedded world, and against the models of a finished run."

import json
import math
import shutil

import numpy as np
import pytest
from conftest import error
from test_run import write_folder

from qr_rlhf.model import load_tokenizer

TINY = dict(
    seeds=2,
    evaluate_every=1,
    evaluations=6,
    kl_budget=0.02,
    prompts_a_step=2,
    generations=2,
    max_prompt=80,
    max_completion=10,
    n_prompts=12,
    n_eval=6,
    learning_rate=1e-2,
    check=False,
)
EMBEDDED = TINY | dict(n_train=160, warm_up_epochs=1, reward_epochs=1)
REWARDS = "scalar", "length", "mean", "pessimistic"
BUDGET = TINY["kl_budget"]


@pytest.fixture(scope="module")
def results(project):
    project.run("studies/policy", "runs/policy.ipynb", **EMBEDDED)
    return project.results("policy")


def path_of(results, reward, seed):
    rows = results["evaluations"]
    return [row for row in rows if (row["reward"], row["seed"]) == (reward, seed)]


def samples_of(project, reward, seed=0):
    "What a policy said at the start and at each evaluation."
    folder = project.folder / "runs" / "policy" / "policies" / reward / f"seed{seed}"
    log = json.loads((folder / "log.json").read_text())
    return [row["samples"] for row in log if "samples" in row]


def test_a_policy_stops_when_its_budget_is_spent(results):
    for reward in REWARDS:
        for seed in (0, 1):
            start, *way, end = path_of(results, reward, seed)
            assert (start["step"], start["proxy"]) == (0, pytest.approx(0, abs=1e-9))
            assert abs(start["kl"]) < 1e-4
            assert all(row["kl"] < BUDGET for row in way)
            assert end["kl"] >= BUDGET or end["step"] == TINY["evaluations"]
    assert any(row["step"] < TINY["evaluations"] for row in results["evaluations"][-1:])


def test_values_are_read_at_the_budget(results):
    for end in results["ends"]:
        *_, a, b = path_of(results, end["reward"], end["seed"])
        for metric in ("length", "true", "proxy"):
            expected = np.interp(BUDGET, [a["kl"], b["kl"]], [a[metric], b[metric]])
            assert end[metric] == pytest.approx(expected, abs=1e-6)


def test_truth_of_the_responses(results, project):
    for reward in REWARDS:
        for samples in samples_of(project, reward):
            known = np.array(samples["recognised"]) > 0
            assert (np.array(samples["tail"]) <= samples["true"]).all()
            assert np.allclose(np.array(samples["true"])[~known], -10)
    for end in results["ends"]:
        share, known = end["recognised"], end["true_recognised"]
        if share:
            assert math.isclose(end["true"], share * known - 10 * (1 - share))


def test_the_length_null_is_the_scalar_reward_minus_tokens(results, project):
    tokenizer = load_tokenizer(project.folder / "runs" / "policy" / "warm_up")
    scalar, null = (samples_of(project, reward)[0] for reward in ("scalar", "length"))
    assert scalar["response"] == null["response"]
    lengths = [len(tokenizer(r, add_special_tokens=False).input_ids) for r in null["response"]]
    taken_off = np.subtract(scalar["proxy"], null["proxy"])
    assert results["penalties"]["0"] > 0
    assert np.allclose(taken_off, results["penalties"]["0"] * np.array(lengths), atol=1e-5)


def test_differences_and_findings(results, project):
    part = results["differences"]["pessimistic − mean"]["length"]
    means = {end["reward"]: end["length"] for end in results["ends"] if end["seed"] == 1}
    assert part["each"][1] == pytest.approx(means["pessimistic"] - means["mean"])
    error_of_mean = np.std(part["each"], ddof=1) / 2**0.5
    assert part["could_see"] == pytest.approx(2.8 * error_of_mean)
    folder = project.folder / "runs" / "policy"
    for picture in ("policy.png", "differences.png"):
        assert (folder / picture).stat().st_size > 1000
    findings = json.loads((folder / "findings.json").read_text())
    assert {"pessimistic_minus_mean", "could_see", "pessimistic_minus_length"} <= set(findings)
    assert findings["seeds"] == 2 and set(findings["recognised"]) == set(REWARDS)


def test_finished_work_is_taken_up(results, project):
    policy = project.folder / "runs" / "policy" / "policies" / "mean" / "seed1"
    written = (policy / "log.json").stat().st_mtime_ns
    project.run("studies/policy", "runs/policy.ipynb", **EMBEDDED)
    assert (policy / "log.json").stat().st_mtime_ns == written
    assert project.results("policy")["ends"] == results["ends"]


def test_a_finished_run_lends_its_models(demo):
    "Pairs in HH-RLHF's layout: no truth is known."
    write_folder(demo.folder / "hh-policy", "harmless", train=120, test=30)
    runs = demo.folder / "runs"
    shutil.copytree(runs / "harmless", runs / "lender", ignore=shutil.ignore_patterns(".lock"))
    settings = json.loads((runs / "lender" / "settings.json").read_text())
    text = json.dumps(settings | dict(data="hh-policy"))
    (runs / "lender" / "settings.json").write_text(text)
    lent = dict(name="policy-lent", runs_of="lender", max_prompt=150)
    demo.run("studies/policy", "runs/policy-lent.ipynb", **TINY | lent)
    results = demo.results("policy-lent")
    assert {end["reward"] for end in results["ends"]} == set(REWARDS)
    assert set(results["differences"]["pessimistic − mean"]) == {"length", "proxy"}
    assert not (runs / "policy-lent" / "scalar").exists() and not results["says"]


def test_what_cannot_be_had_is_said(project):
    refused = project.papermill("studies/policy", name="other", objective="best")
    assert "scalar" in error(refused)
    old = project.folder / "runs" / "old"
    old.mkdir()
    for name in ("results.json", "rewards.parquet"):
        (old / name).write_text("{}")
    settings = dict(workload="helpful", data="hh", backbone="gpt2", max_length=64, subsets=None)
    (old / "settings.json").write_text(json.dumps(settings))
    refused = project.papermill("studies/policy", name="other", runs_of="old")
    assert "runs_of: old was made by an earlier version (its settings lack splits)" in error(
        refused
    )
