"The demo, real files, kills, and bad input, through papermill as a person would run it."

import gzip
import json
import math
import re
import signal
import subprocess
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SMALL, error
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from qr_rlhf.model import train_tokenizer
from qr_rlhf.runs import open_run
from qr_rlhf.synthetic import World


def read_rewards(project, name):
    return pd.read_parquet(project.folder / "runs" / name / "rewards.parquet")


# the demo


def test_demo_measures_what_is_promised(demo):
    results = demo.results("harmless")
    assert results["workload"] == "harmless"  # a cleaned notebook still honours -p
    assert results["profile"] == "demo"
    assert results["n_eval"] == SMALL["n_eval"]
    assert results["n_train"] + results["n_valid"] == SMALL["n_train"]
    assert {"accuracy", "nll", "kl"} <= set(results["difference"])
    assert results["models"]["scalar"]["crossing_rate"] == 0


@pytest.mark.parametrize("model", ["scalar", "quantile"])
def test_demo_measures_each_model(demo, model):
    block = demo.results("harmless")["models"][model]
    assert {"accuracy", "nll", "auroc", "crossing_rate", "per_seed", "kl"} <= set(block)
    assert set(block["kl"]) == {"kde", "histogram", "knn"}
    for part in block["kl"].values():
        assert {"value", "low", "high", "swapped"} <= set(part)
        assert all(map(math.isfinite, part.values()))


def test_demo_measures_picking_by_length(demo):
    null = demo.results("harmless")["null"]
    assert math.isclose(null["longer"]["value"] + null["shorter"]["value"], 1)
    better = max(null[rule]["value"] for rule in ("longer", "shorter"))
    for model, block in demo.results("harmless")["models"].items():
        beyond = null["beyond"][model]
        assert math.isclose(beyond["value"], block["accuracy"] - better, abs_tol=1e-9)
        assert beyond["low"] < beyond["value"] < beyond["high"]
    assert "picking the" in (demo.folder / "runs" / "harmless.ipynb").read_text()


def test_demo_compares_with_the_truth(demo):
    scalar, quantile = sorted(demo.results("harmless")["truth"], key=len)
    assert set(scalar) == {"model", "seed", "difference_correlation"}
    assert set(quantile) == {*scalar, "spread_correlation"}
    assert (scalar["model"], quantile["model"]) == ("scalar", "quantile")


def test_demo_writes_files_and_a_notebook(demo):
    runs = demo.folder / "runs"
    figures = [f"{f}.{ending}" for f in ("figure2", "figure3") for ending in ("png", "svg")]
    for name in ("rewards.parquet", *figures):
        assert (runs / "harmless" / name).stat().st_size > 1000
    text = (runs / "harmless.ipynb").read_text()
    assert "Profile demo" in text
    assert "image/png" in text


def test_demo_says_what_trains_before_it_does(demo):
    text = (demo.folder / "runs" / "harmless.ipynb").read_text()
    said = re.findall(
        r"(warm-up of the backbone|training \d of \d: \w+ model, seed \d): starts", text
    )
    assert said[0] == "warm-up of the backbone"
    trained = [
        "training 1 of 2: scalar model, seed 0",
        "training 2 of 2: quantile model, seed 0",
    ]
    assert sorted(said[1:]) == trained  # at the same time, where there are two cores
    assert "Quantile − scalar, 95 % intervals over pairs, one seed" in text  # its verdict
    assert not re.search(r"\w+Warning", text)


@pytest.mark.parametrize(("model", "n"), [("scalar", 1), ("quantile", 10)])
def test_checkpoints_load_without_this_package(demo, model, n):
    rewards = read_rewards(demo, "harmless").query("pair == 0 and side == 'chosen'")
    ours = rewards[rewards.model == model].reward.to_numpy()
    pair = World().rows("harmless", "test", 1)[0]
    folder = demo.folder / "runs" / "harmless" / model / "seed0"
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        inputs = tokenizer(pair["chosen"] + tokenizer.eos_token, return_tensors="pt")
        quantiles = stock(**inputs).logits[0].numpy()
    assert len(ours) == n
    assert np.abs(quantiles - ours).max() < 1e-5
    assert not list(folder.glob("*.bin"))  # no pickle


# going on, or refusing to


def test_finished_work_is_taken_up(demo):
    before = demo.results("harmless")
    # the form with standard output redirected
    again = demo.run("run", None, workload="harmless", **SMALL)
    assert again.stdout.count("taken up") >= 4, again.stderr
    assert demo.results("harmless") == before  # even the seconds it took


def test_other_settings_are_refused(demo):
    other = error(demo.papermill("run", workload="harmless", **SMALL | dict(epochs=2)))
    assert "epochs was 1.0 and is now 2.0" in other
    assert "give another name" in other


def test_a_run_that_is_held_is_refused(project):
    lock = open_run(project.folder / "runs" / "held", dict(any=1))
    held = project.papermill("run", workload="harmless", name="held", **SMALL)
    assert "held: another process is working here" in error(held)
    lock.release()


def kill_with_children(process):
    "End a process and its children at once, as a crash would."
    command = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    children = subprocess.run(command, capture_output=True, text=True).stdout.split()
    for pid in [*children, process.pid]:
        subprocess.run(["kill", "-9", str(pid)])
    process.wait()


def test_a_killed_run_ends_as_an_uninterrupted_one(demo):
    folder = demo.folder / "runs" / "killed"
    parameters = dict(workload="harmless", name="killed", **SMALL)
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    command = demo.command("run", "runs/killed.ipynb", **parameters)
    process = subprocess.Popen(command, cwd=demo.folder, env=demo.env, **silent)
    work = folder / "quantile" / "seed0.working"
    while not list(work.glob("checkpoint-*")) and process.poll() is None:
        time.sleep(0.01)
    kill_with_children(process)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "results.json").exists()
    demo.run("run", "runs/killed.ipynb", **parameters)
    whole, resumed = read_rewards(demo, "harmless"), read_rewards(demo, "killed")
    pd.testing.assert_frame_equal(whole, resumed, check_exact=True)


# real files


def write_folder(folder, workload, **sizes):
    "Files in HH-RLHF's layout, each with two rows more that can't be used."
    (folder / f"{workload}-base").mkdir(parents=True)
    for split, n in sizes.items():
        rows = World(seed=1).rows(workload, split, n)
        equal = dict(chosen=rows[0]["chosen"], rejected=rows[0]["chosen"])
        empty = dict(chosen=rows[1]["chosen"], rejected="\n\nHuman: Hello.\n\nAssistant:")
        path = folder / f"{workload}-base" / f"{split}.jsonl.gz"
        with gzip.open(path, "wt", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in [*rows, equal, empty])


def write_gpt2(folder, workload, vocab_size):
    "A small GPT-2 with random weights, whose tokenizer pads with its end token, as GPT-2's."
    rows = World().rows(workload, "train", 50)
    tokenizer = train_tokenizer([row["chosen"] for row in rows], vocab_size)
    tokenizer.pad_token = tokenizer.eos_token  # it must get a padding token of its own
    tokenizer.save_pretrained(folder)
    size = dict(vocab_size=len(tokenizer), n_positions=256, n_layer=1, n_embd=16, n_head=2)
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(folder)


def test_paper_profile_on_local_folders(project):
    "The paper's profile with a local GPT-2 and local files: every line is accounted for."
    write_folder(project.folder / "hh", "helpful", train=150, test=30)
    write_gpt2(project.folder / "gpt2", "helpful", 400)
    where = dict(workload="helpful", name="local", data="hh", backbone="gpt2")
    settings = dict(profile="paper", max_length=200, seeds="0,1")
    project.run("run", "runs/local.ipynb", **where, **settings)
    results = project.results("local")
    lost = sum(n for reasons in results["dropped"].values() for n in reasons.values())
    assert results["n_train"] + results["n_valid"] + results["n_eval"] + lost == 152 + 32
    assert results["dropped"]["train"]["equal"] == 1
    assert results["dropped"]["train"]["empty"] == 1
    assert results["seeds"] == [0, 1]
    assert len(results["models"]["quantile"]["per_seed"]) == 2
    assert results["objective"]["target"] == "label"
    assert "truth" not in results
    message = error(project.papermill("report", names="local,missing"))
    assert "missing is not finished" in message
    assert "papermill nbs/run.ipynb" in message


# the report, and another objective


def test_report(demo):
    demo.run("run", "runs/helpful.ipynb", workload="helpful", **SMALL)
    demo.run("report", "runs/report.ipynb")
    table = pd.read_csv(demo.folder / "runs" / "table1.csv")
    assert list(table.workload) == ["helpful", "helpful", "harmless", "harmless"]
    assert list(table["paper: KL"]) == [4.914, 6.779, 6.833, 7.291]
    found = demo.results("harmless")["models"]["scalar"]["kl"]["kde"]["value"]
    assert abs(table.KL[2] - found) < 1e-9
    text = (demo.folder / "runs" / "table1.md").read_text()
    assert "6.779" in text
    assert "95 % intervals over pairs, one seed" in text
    report = (demo.folder / "runs" / "report.ipynb").read_text()
    assert "picks the longer" in report
    assert "detectable" in report


def test_one_output_regresses_on_labels_too(demo):
    demo.run("run", workload="harmless", name="one_output", n_quantiles=1, **SMALL)
    results, rewards = demo.results("one_output"), read_rewards(demo, "one_output")
    assert (rewards.level == 0.5).all() and results["objective"]["target"] == "label"
    assert not any("spread_correlation" in row for row in results["truth"])
    said = (demo.folder / "runs" / "out.ipynb").read_text()
    assert "no lowest and no highest quantile" in said and "stderr" not in said


def test_distributional_objective(demo):
    parameters = dict(name="distributional", objective="distributional", **SMALL)
    demo.run("run", "runs/distributional.ipynb", workload="harmless", **parameters)
    results, rewards = demo.results("distributional"), read_rewards(demo, "distributional")
    assert results["objective"]["name"] == "distributional"
    assert results["models"]["quantile"]["crossing_rate"] == 0
    assert len(results["spread_by_mean"]) == 1
    folder = demo.folder / "runs" / "distributional" / "quantile" / "seed0"
    config = AutoModelForSequenceClassification.from_pretrained(folder).config
    assert config.num_labels == 2
    assert config.quantile_family == "normal"
    levels = rewards[rewards.model == "quantile"].level.nunique()
    assert levels == len(config.quantile_levels) == 10
    # the scalar model knows nothing of the other's objective
    tables = (read_rewards(demo, "harmless"), rewards)
    theirs, ours = (table[table.model == "scalar"].reward for table in tables)
    assert np.array_equal(theirs.to_numpy(), ours.to_numpy())


# bad input


def test_no_network_is_one_sentence(project):
    start = time.time()
    paper = dict(profile="paper", workload="helpful", name="offline")
    message = error(project.papermill("run", **paper))
    assert time.time() - start < 30
    hub = r"data: 'Anthropic/hh-rlhf' .* can't be had from the Hub .*; "
    assert re.match(f"{hub}check the id and the network, or give a local folder", message)
    assert not list((project.folder / "runs").glob("offline/results.json"))


def test_unknown_values_are_one_sentence(project):
    workload = error(project.papermill("run", workload="helpfull"))
    assert "choose one of helpful, harmless" in workload
    parameters = dict(workload="helpful", name="other", objective="both")
    objective = error(project.papermill("run", **parameters))
    assert "choose one of paper, free, distributional, purm" in objective


def test_a_bad_file_is_one_sentence(project):
    folder = project.folder / "bad" / "helpful-base"
    folder.mkdir(parents=True)
    row = '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": 3}\n'
    (folder / "train.jsonl").write_text(row)
    message = error(project.papermill("run", workload="helpful", data="bad"))
    assert "train.jsonl, line 1: the field 'rejected' is of type int" in message


# the parameters


def parameters_cell():
    cells = json.loads((ROOT / "nbs" / "run.ipynb").read_text())["cells"]
    (cell,) = [cell for cell in cells if cell["metadata"].get("tags") == ["parameters"]]
    return "".join(cell["source"]).splitlines()


def test_every_parameter_is_explained(project):
    command = [*project.command("run", "")[:4], "--help-notebook"]
    where = dict(cwd=project.folder, env=project.env)
    text = subprocess.run(command, **where, capture_output=True, text=True).stdout
    lines = parameters_cell()
    assert len(lines) > 25
    for line in lines:
        name, comment = line.split(" = ")[0], line.split("  # ")[1]
        assert re.search(rf"\b{name}:", text), line
        assert comment.split(" ")[0] in text, line


def test_table1_audit(demo):
    tiny = dict(runs="harmless", n_resamples=4, n_simulations=2, check=False)
    demo.run("studies/table1_audited", "runs/table1_audited.ipynb", **tiny)
    results, kl = demo.results("table1_audited"), demo.results("harmless")["models"]
    assert (
        len(results["audit"]["difference"]) == 4 * 91 * 2
    )  # views and readings, settings, directions
    assert set(results["ratios"]["harmless"]) == {"KL", "KL within pairs", "1 − ρ"}
    assert results["invariance"]["offsets of standard deviation 4"]["AUROC"] < 0.56
    findings = json.loads(
        (demo.folder / "runs" / "table1_audited" / "findings.json").read_text()
    )
    assert findings["accurate"] <= int(findings["size"].split()[0])
    audit = pd.DataFrame(results["audit"])
    ours = audit.query(
        "family == 'KDE' and size == 1 and view == 'as is' and reading == 'mean'"
    )
    assert abs(ours.scalar.iloc[0] - kl["scalar"]["kl"]["kde"]["value"]) < 2e-3
