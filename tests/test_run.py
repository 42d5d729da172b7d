"The demo, real files, kills, and bad input, through papermill as a person would run it."

import gzip, json, math, re, signal, subprocess, time

import numpy as np
import pandas as pd
import torch
from conftest import SMALL, error
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from qr_rlhf.model import train_tokenizer
from qr_rlhf.runs import open_run
from qr_rlhf.synthetic import World


def test_demo_writes_what_is_promised(demo):
    results = demo.results("harmless")
    assert (
        results["workload"] == "harmless" and results["profile"] == "demo"
    )  # a cleaned notebook still honours -p
    assert (
        results["n_eval"] == SMALL["n_eval"]
        and results["n_train"] + results["n_valid"] == SMALL["n_train"]
    )
    for model in ("scalar", "quantile"):
        block = results["models"][model]
        assert {"accuracy", "nll", "auroc", "crossing_rate", "per_seed", "kl"} <= set(
            block
        ) and set(block["kl"]) == {"kde", "histogram", "knn"}
        assert all(
            {"value", "low", "high", "swapped"} <= set(v) and all(map(math.isfinite, v.values()))
            for v in block["kl"].values()
        )
    assert {"accuracy", "nll", "kl"} <= set(results["difference"]) and results["models"]["scalar"][
        "crossing_rate"
    ] == 0
    for name in ("rewards.parquet", "figure2.png", "figure2.svg", "figure3.png", "figure3.svg"):
        assert (demo.folder / "runs" / "harmless" / name).stat().st_size > 1000
    text = (demo.folder / "runs" / "harmless.ipynb").read_text()
    assert "Profile demo" in text and "image/png" in text


def test_checkpoints_load_without_this_package(demo):
    rewards = pd.read_parquet(demo.folder / "runs" / "harmless" / "rewards.parquet")
    pair = World().rows("harmless", "test", 1)[0]
    for model, n in (("scalar", 1), ("quantile", 10)):
        folder = demo.folder / "runs" / "harmless" / model / "seed0"
        stock, tokenizer = (
            AutoModelForSequenceClassification.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
        )
        with torch.no_grad():
            quantiles = stock(
                **tokenizer(pair["chosen"] + tokenizer.eos_token, return_tensors="pt")
            ).logits[0]
        ours = rewards[
            (rewards.model == model) & (rewards.pair == 0) & (rewards.side == "chosen")
        ].reward
        assert len(ours) == n and np.abs(quantiles.numpy() - ours.to_numpy()).max() < 1e-5
        assert not list(folder.glob("*.bin"))  # no pickle


def test_finished_work_is_taken_up_and_other_settings_refused(demo):
    before = demo.results("harmless")
    again = demo.papermill(
        "run", None, workload="harmless", **SMALL
    )  # the form with standard output redirected
    assert again.returncode == 0 and again.stdout.count("taken up") >= 4, again.stderr
    after = demo.results("harmless")
    assert {k: v for k, v in before.items() if k != "seconds"} == {
        k: v for k, v in after.items() if k != "seconds"
    }
    other = error(demo.papermill("run", workload="harmless", **SMALL | dict(epochs=2)))
    assert "epochs was 1.0 and is now 2.0" in other and "give another name" in other
    lock = open_run(demo.folder / "runs" / "held", dict(any=1))
    assert "another process is working on this run" in error(
        demo.papermill("run", workload="harmless", name="held", **SMALL)
    )
    lock.release()


def test_a_killed_run_ends_as_an_uninterrupted_one(demo):
    work = demo.folder / "runs" / "killed" / "quantile" / "seed0.working"
    process = subprocess.Popen(
        demo.command("run", "runs/killed.ipynb", workload="harmless", name="killed", **SMALL),
        cwd=demo.folder,
        env=demo.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not list(work.glob("checkpoint-*")) and process.poll() is None:
        time.sleep(0.01)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    for pid in [*children, process.pid]:
        subprocess.run(["kill", "-9", str(pid)])
    process.wait()
    assert (
        process.returncode == -signal.SIGKILL
        and not (demo.folder / "runs" / "killed" / "results.json").exists()
    )
    done = demo.papermill("run", "runs/killed.ipynb", workload="harmless", name="killed", **SMALL)
    assert done.returncode == 0, done.stderr
    a, b = (
        pd.read_parquet(demo.folder / "runs" / name / "rewards.parquet")
        for name in ("harmless", "killed")
    )
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def write_folder(folder, workload, n_train, n_test):
    (folder / f"{workload}-base").mkdir(parents=True)
    for split, n in (("train", n_train), ("test", n_test)):
        rows = World(seed=1).rows(workload, split, n)
        rows += [
            dict(chosen=rows[0]["chosen"], rejected=rows[0]["chosen"]),
            dict(chosen=rows[1]["chosen"], rejected="\n\nHuman: Hello.\n\nAssistant:"),
        ]
        with gzip.open(
            folder / f"{workload}-base" / f"{split}.jsonl.gz", "wt", encoding="utf-8"
        ) as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)


def write_gpt2(folder, workload, vocab_size):
    "A small GPT-2 with random weights, whose tokenizer pads with its end token as GPT-2's own does."
    tokenizer = train_tokenizer(
        [r["chosen"] for r in World().rows(workload, "train", 50)], vocab_size
    )
    tokenizer.pad_token = tokenizer.eos_token  # it must get a padding token of its own
    tokenizer.save_pretrained(folder)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_layer=1, n_embd=16, n_head=2)
    ).save_pretrained(folder)


def test_paper_profile_on_local_folders(project):
    "The paper's profile with a local GPT-2 (random weights) and local files in HH-RLHF's layout: every line is accounted for."
    write_folder(project.folder / "hh", "helpful", 150, 30)
    write_gpt2(project.folder / "gpt2", "helpful", 400)
    done = project.papermill(
        "run",
        "runs/local.ipynb",
        profile="paper",
        workload="helpful",
        name="local",
        data="hh",
        backbone="gpt2",
        max_length=200,
        seeds="0,1",
    )
    assert done.returncode == 0, done.stderr
    results = project.results("local")
    lost = sum(n for reasons in results["dropped"].values() for n in reasons.values())
    assert results["n_train"] + results["n_valid"] + results["n_eval"] + lost == 152 + 32
    assert results["dropped"]["train"]["equal"] == 1 and results["dropped"]["train"]["empty"] == 1
    assert (
        results["seeds"] == [0, 1]
        and len(results["models"]["quantile"]["per_seed"]) == 2
        and results["objective"]["target"] == "label"
    )
    message = error(project.papermill("report", names="local,missing"))
    assert "missing is not finished" in message and "papermill nbs/run.ipynb" in message


def test_report(demo):
    done = demo.papermill("run", "runs/helpful.ipynb", workload="helpful", **SMALL)
    assert done.returncode == 0, done.stderr
    done = demo.papermill("report", "runs/report.ipynb")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(demo.folder / "runs" / "table1.csv")
    assert list(table.workload) == ["helpful", "helpful", "harmless", "harmless"] and list(
        table["paper: KL"]
    ) == [4.914, 6.779, 6.833, 7.291]
    assert (
        abs(table.KL[2] - demo.results("harmless")["models"]["scalar"]["kl"]["kde"]["value"]) < 1e-9
    )
    assert "6.779" in (demo.folder / "runs" / "table1.md").read_text()


def test_distributional_objective(demo):
    done = demo.papermill(
        "run",
        "runs/distributional.ipynb",
        workload="harmless",
        name="distributional",
        objective="distributional",
        **SMALL,
    )
    assert done.returncode == 0, done.stderr
    results, rewards = (
        demo.results("distributional"),
        pd.read_parquet(demo.folder / "runs" / "distributional" / "rewards.parquet"),
    )
    assert (
        results["objective"]["name"] == "distributional"
        and results["models"]["quantile"]["crossing_rate"] == 0
        and len(results["spread_by_mean"]) == 1
    )
    stock = AutoModelForSequenceClassification.from_pretrained(
        demo.folder / "runs" / "distributional" / "quantile" / "seed0"
    )
    assert (
        stock.config.num_labels == 2
        and stock.config.quantile_family == "normal"
        and rewards[rewards.model == "quantile"].level.nunique()
        == len(stock.config.quantile_levels)
        == 10
    )
    scalar = [
        pd.read_parquet(demo.folder / "runs" / name / "rewards.parquet")
        .query("model == 'scalar'")
        .reward.to_numpy()
        for name in ("harmless", "distributional")
    ]
    assert np.array_equal(*scalar)  # the scalar model knows nothing of the other's objective


def test_calibration_study(project):
    done = project.papermill(
        "studies/calibration",
        "runs/calibration.ipynb",
        pairs=600,
        curve=300,
        seeds="0,1",
        epochs=1,
        n_test=100,
    )
    assert done.returncode == 0, done.stderr
    worlds = project.results("calibration")["worlds"]
    assert (
        set(worlds) == {"bimodal", "skewed"}
        and set(worlds["skewed"]["distributional"]) == {"300", "600"}
        and set(worlds["skewed"]["PURM"]) == {"600"}
    )
    found = worlds["bimodal"]["distributional"]["600"]
    assert (
        all(
            len(found[k]) == 2
            for k in (
                "nll_gap",
                "spread_correlation",
                "partial_spread_correlation",
                "scale_ratio",
                "coverage",
                "wasserstein",
            )
        )
        and min(found["nll_gap"]) > 0
    )
    assert (project.folder / "runs" / "calibration" / "identification.png").stat().st_size > 1000
    assert "-p votes" in error(project.papermill("studies/annotators"))


def test_calibration_study_on_text(project):
    done = project.papermill(
        "studies/calibration",
        "runs/calibration-text.ipynb",
        level="text",
        n_start=100,
        n_train=100,
        n_eval=40,
        text_seeds="3,4",
    )
    assert done.returncode == 0, done.stderr
    worlds = project.results("calibration-text")["worlds"]
    known = worlds["harmless, from the means"]
    assert set(worlds["harmless, from the language model"]) == {"distributional"} and set(
        known
    ) == {"scalar", "label QR", "distributional"}
    assert all(
        len(m["100"]["accuracy_on_votes"]) == len(m["100"]["spread_correlation"]) == 2
        for m in known.values()
    ) and known["scalar"]["100"]["spread_correlation"] == [0, 0]
    assert (
        min(known["label QR"]["100"]["temperature"]) > 0
        and (project.folder / "runs" / "calibration-text" / "text.png").stat().st_size > 1000
    )
    assert "votes was 20 and is now 1" in error(
        project.papermill(
            "studies/calibration",
            level="text",
            n_start=100,
            n_train=100,
            n_eval=40,
            text_seeds="3,4",
            votes=1,
        )
    )


def test_bad_input_is_one_sentence(project):
    start = time.time()
    message = error(project.papermill("run", profile="paper", workload="helpful", name="offline"))
    assert time.time() - start < 30 and re.match(
        r"ValueError: data: 'Anthropic/hh-rlhf' .* can't be had from the Hub .*; check the id and the network, or give a local folder",
        message,
    )
    assert "choose one of helpful, harmless" in error(project.papermill("run", workload="helpfull"))
    assert "choose one of paper, distributional" in error(
        project.papermill("run", workload="helpful", name="other", objective="both")
    )
    (project.folder / "bad" / "helpful-base").mkdir(parents=True)
    (project.folder / "bad" / "helpful-base" / "train.jsonl").write_text(
        '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": 3}\n'
    )
    assert "train.jsonl, line 1: the field 'rejected' is of type int" in error(
        project.papermill("run", workload="helpful", data="bad")
    )
    assert not list((project.folder / "runs").glob("offline/results.json"))


def test_every_parameter_is_explained(project):
    text = subprocess.run(
        [*project.command("run", "")[:4], "--help-notebook"],
        cwd=project.folder,
        env=project.env,
        capture_output=True,
        text=True,
    ).stdout
    cell = json.loads((project.folder / "nbs" / "run.ipynb").read_text())["cells"]
    lines = "".join(
        next(c["source"] for c in cell if c["metadata"].get("tags") == ["parameters"])
    ).splitlines()
    assert len(lines) > 25
    for line in lines:
        name, comment = line.split(" = ")[0], line.split("  # ")[1]
        assert re.search(rf"\b{name}:", text) and comment.split(" ")[0] in text, line
