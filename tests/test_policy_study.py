"The policy study, tiny: GRPO in the embedded world, and the paper's profile on local files."

import json
import math
import shutil

import pytest
from conftest import SMALL, error
from test_run import write_folder, write_gpt2

TINY = dict(
    steps=2,
    evaluations=1,
    prompts_a_step=2,
    generations=2,
    max_completion=10,
    n_prompts=12,
    n_eval=6,
    learning_rate=1e-2,
    check=False,
)
SAME = "n_train", "vocab_size", "n_layer", "n_embd", "n_head", "warm_up_epochs"
EMBEDDED = {k: SMALL[k] for k in SAME} | TINY
EMBEDDED |= dict(max_prompt=80, reward_epochs=1, seeds="0,1")
EMBEDDED |= dict(rewards="scalar mean, quantile cvar 0.2")


@pytest.fixture(scope="module")
def results(project):
    done = project.papermill("studies/policy", "runs/policy.ipynb", **EMBEDDED)
    assert done.returncode == 0, done.stderr
    return project.results("policy")


def test_every_policy_is_evaluated_along_the_way(results):
    assert set(results["rewards"]) == {"scalar mean", "quantile cvar 0.2"}
    for curves in results["rewards"].values():
        assert set(curves) == {"0", "1"}
        for start, end in curves.values():
            assert (start["step"], end["step"]) == (0, 2)
            assert abs(start["proxy"]) < 1e-9
            assert abs(start["kl"]) < 1e-4 < abs(end["kl"])
            assert 0 <= end["recognised"] <= 1 and 1 <= end["length"] <= 10


def test_truth_of_the_responses(results):
    for curves in results["rewards"].values():
        for row in (row for rows in curves.values() for row in rows):
            assert row["cvar"] <= row["true"]
            assert row["recognised"] > 0 or math.isclose(row["true"], -10)


def test_trl_alone_gives_the_same_rewards(results):
    assert results["stock_difference"] < 1e-4


def test_differences_and_findings(results, project):
    assert set(results["verdict"]) == {"quantile cvar 0.2 − scalar mean"}
    for found in results["differences"].values():
        assert {"over_seeds", "over_prompts", "each"} <= set(found["true"])
        assert len(found["true"]["each"]) == 2
    folder = project.folder / "runs" / "policy"
    assert (folder / "policy.png").stat().st_size > 1000
    findings = json.loads((folder / "findings.json").read_text())
    expected = {"start", "scalar", "quantile_cvar", "cvar_minus_mean", "seeds"}
    assert set(findings) == expected and findings["seeds"] == 2


def test_finished_work_is_taken_up(results, project):
    again = project.papermill("studies/policy", "runs/policy.ipynb", **EMBEDDED)
    assert again.returncode == 0, again.stderr
    text = (project.folder / "runs" / "policy.ipynb").read_text()
    assert "language model: taken up" in text
    assert "4 reward models, 4 of them taken up" in text
    assert "4 policies, 4 of them taken up" in text
    assert project.results("policy")["rewards"] == results["rewards"]


def test_unknown_reward_models_are_refused(project):
    refused = project.papermill("studies/policy", name="other", rewards="best mean")
    assert "choose from scalar, quantile, distributional" in error(refused)


PAPER = dict(profile="paper", workload="harmless", data="hh-policy", backbone="gpt2-policy")


def test_paper_profile_takes_up_a_run(demo):
    "A finished run without a warmed-up language model, a local GPT-2, HH-RLHF's layout."
    write_folder(demo.folder / "hh-policy", "harmless", train=120, test=30)
    write_gpt2(demo.folder / "gpt2-policy", "harmless", 300)
    without = shutil.ignore_patterns("warm_up")
    runs = demo.folder / "runs"
    shutil.copytree(runs / "harmless", runs / "reward", ignore=without)
    lent = dict(name="policy-paper", runs_of="reward", seeds="0,1", max_prompt=150)
    done = demo.papermill("studies/policy", "runs/policy-paper.ipynb", **lent, **PAPER, **TINY)
    assert done.returncode == 0, done.stderr
    results = demo.results("policy-paper")
    rewards = {"scalar mean", "quantile mean", "quantile cvar 0.2"}
    assert set(results["rewards"]) == rewards and not results["verdict"]
    _, end = results["rewards"]["quantile mean"]["1"]
    assert "true" not in end and end["kl"] > 0 and results["stock_difference"] < 1e-4


def test_what_the_paper_profile_lacks_is_said(project):
    refused = project.papermill("studies/policy", name="none", profile="paper")
    assert "-p runs_of helpful-paper" in error(refused)
    refused = project.papermill("studies/policy", name="none", runs_of="missing", **PAPER)
    assert "missing is not finished" in error(refused)
