"The policy study, tiny: on the embedded world, and on local files with a finished run."

import math
import shutil

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
)


def test_policies_in_the_embedded_world(project):
    parameters = (
        {
            k: SMALL[k]
            for k in ("n_train", "vocab_size", "n_layer", "n_embd", "n_head", "warm_up_epochs")
        }
        | TINY
        | dict(max_prompt=80)
    )
    done = project.papermill(
        "studies/policy",
        "runs/policy.ipynb",
        seeds="0,1",
        reward_epochs=1,
        rewards="scalar mean, quantile cvar 0.2",
        **parameters,
    )
    assert done.returncode == 0, done.stderr
    results = project.results("policy")
    assert (
        set(results["rewards"]) == {"scalar mean", "quantile cvar 0.2"}
        and results["stock_difference"] < 1e-4
    )
    for curves in results["rewards"].values():
        assert set(curves) == {"0", "1"}
        for rows in curves.values():
            assert [row["step"] for row in rows] == [0, 2] and {
                "proxy",
                "true",
                "cvar",
                "kl",
                "recognised",
                "length",
            } <= set(rows[0])
            assert (
                abs(rows[0]["proxy"]) < 1e-9
                and abs(rows[0]["kl"]) < 1e-4 < abs(rows[1]["kl"])
                and 0 <= rows[1]["recognised"] <= 1
                and 1 <= rows[1]["length"] <= 10
            )
            assert all(
                row["cvar"] <= row["true"]
                and (row["recognised"] > 0 or math.isclose(row["true"], -10))
                for row in rows
            )
    assert set(results["verdict"]) == {"quantile cvar 0.2 − scalar mean"}
    assert all(
        {"over_seeds", "over_prompts", "each"} <= set(d["true"]) and len(d["true"]["each"]) == 2
        for d in results["differences"].values()
    )
    assert (project.folder / "runs" / "policy" / "policy.png").stat().st_size > 1000
    again = project.papermill(
        "studies/policy",
        "runs/policy.ipynb",
        seeds="0,1",
        reward_epochs=1,
        rewards="scalar mean, quantile cvar 0.2",
        **parameters,
    )
    assert (
        again.returncode == 0
        and (project.folder / "runs" / "policy.ipynb").read_text().count("taken up") >= 9
    )
    assert project.results("policy")["rewards"] == results["rewards"]
    assert "choose from scalar, quantile, distributional" in error(
        project.papermill("studies/policy", name="other", rewards="best mean")
    )


def test_paper_profile_takes_up_a_run(demo):
    """Its reward models come from a finished run without a warmed-up language model.

    The backbone is a local GPT-2 with another tokenizer; the data are local files in
    HH-RLHF's layout.
    """
    write_folder(demo.folder / "hh-policy", "harmless", 120, 30)
    write_gpt2(demo.folder / "gpt2-policy", "harmless", 300)
    shutil.copytree(
        demo.folder / "runs" / "harmless",
        demo.folder / "runs" / "reward",
        ignore=shutil.ignore_patterns("warm_up"),
    )
    paper = dict(profile="paper", workload="harmless", data="hh-policy", backbone="gpt2-policy")
    done = demo.papermill(
        "studies/policy",
        "runs/policy-paper.ipynb",
        name="policy-paper",
        runs_of="reward",
        seeds="0,1",
        max_prompt=150,
        **paper,
        **TINY,
    )
    assert done.returncode == 0, done.stderr
    results = demo.results("policy-paper")
    assert (
        set(results["rewards"]) == {"scalar mean", "quantile mean", "quantile cvar 0.2"}
        and not results["verdict"]
    )
    rows = results["rewards"]["quantile mean"]["1"]
    assert "true" not in rows[0] and rows[1]["kl"] > 0 and results["stock_difference"] < 1e-4
    assert "-p runs_of helpful-paper" in error(
        demo.papermill("studies/policy", name="none", profile="paper")
    )
    assert "missing is not finished" in error(
        demo.papermill("studies/policy", name="none", runs_of="missing", **paper)
    )
