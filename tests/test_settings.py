"How settings are read, checked and described, and whom a run's folder belongs to."

import json
import os
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

from qr_rlhf import runs
from qr_rlhf.losses import OBJECTIVES, Objective
from qr_rlhf.runs import (
    DPI,
    launch,
    open_run,
    run_arguments,
    save_figure,
    versions,
    write_whole,
)
from qr_rlhf.settings import (
    FIELDS,
    PROFILES,
    make_settings,
    parameters,
    read_value,
)


def parameter_lines(names):
    "The line of a cell for each parameter: its name, its default, and what it means."
    values, helps = dict(profile='"demo"'), parameters()
    return [f"{name} = {values.get(name)}  # {helps[name]}" for name in names]


FIRST = """workload profile name data n_train backbone seeds epochs learning_rate lora_rank
n_quantiles objective""".split()


def test_run_ipynb_has_the_described_parameters():
    cells = json.loads((ROOT / "nbs" / "run.ipynb").read_text(encoding="utf-8"))["cells"]
    tagged = {t: c for c in cells for t in c["metadata"].get("tags", [])}
    shown, listed = (
        "".join(tagged[tag]["source"]).splitlines()
        for tag in ("injected-parameters", "parameters")
    )
    assert shown == ["# Parameters", *parameter_lines(FIRST)]
    assert listed == parameter_lines(parameters()) and max(map(len, listed)) <= 100
    assert tagged["parameters"]["metadata"]["jupyter"]["source_hidden"]
    assert all(field.metadata["help"] for field in FIELDS.values())


def test_the_demo_and_figures_have_their_sizes():
    "In the forks of other tests they are smaller (`make_small` of forks.py)."
    demo = make_settings("demo", workload="harmless")
    assert (demo.n_layer, demo.n_embd, demo.vocab_size, demo.evaluations) == (2, 128, 1500, 6)
    assert DPI == 300


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        ("seeds", "0,1,2", [0, 1, 2]),
        ("seeds", 3, [3]),
        ("seeds", "[1, 2]", [1, 2]),
        ("seeds", (0, 1), [0, 1]),
        ("subsets", "'helpful-base', helpful-online", ["helpful-base", "helpful-online"]),
        ("n_train", "all", None),
        ("n_train", "", None),
        ("n_train", 1e3, 1000),
        ("learning_rate", "5e-6", 5e-6),
        ("load_in_4bit", True, True),
        ("gradient_checkpointing", "False", False),
        ("backbone", " gpt2 ", "gpt2"),
    ],
)
def test_a_value_is_read_as_its_fields_type(name, given, read):
    found = read_value(FIELDS[name], given)
    assert found == read and type(found) is type(read)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("seeds", "a"),
        ("seeds", ""),
        ("seeds", "1,1"),
        ("n_layer", 1.5),
        ("n_layer", "inf"),
        ("max_length", "None"),
        ("kappa", "x"),
        ("learning_rate", "nan"),
        ("load_in_4bit", "yes"),
    ],
)
def test_a_value_that_is_none_is_refused_by_name(name, given):
    with pytest.raises(ValueError, match=rf"^{name}: .* can't be read as [^\n]+\.$"):
        read_value(FIELDS[name], given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(workload="x"), "choose one of helpful, harmless."),
        (dict(batch=3), "batch: there is no such setting; the nearest is batch_size."),
        (dict(n_eval=3), "n_eval: 3 is too small; the least is 12."),
        (dict(epochs=0), "epochs: 0.0 is too small"),
        (dict(seeds="0,-1"), "seeds: -1 is too small; the least is 0."),
        (dict(seeds=2**32), "seeds: 4294967296 is too large; the most is 4294967295."),
        (dict(dropout=2), "dropout: 2.0 is too large; the most is 1."),
        (dict(warm_up_learning_rate=-1), "warm_up_learning_rate: -1.0 is too small"),
        (dict(lora_rank=0), "lora_rank: 0 is too small; the least is 1."),
        (dict(target="labels"), "choose one of label, shift, own, none."),
        (dict(link="x"), "choose one of mean, distributional."),
        (dict(objective="both"), "choose one of paper, free, distributional, purm"),
        (dict(objective="distributional", family="x"), "choose one of normal, free."),
        (dict(objective="distributional", pool=-1), "pool, hold: -1.0, 0.0"),
        (dict(objective="distributional", link="x"), "choose one of mean, distributional."),
        (dict(kappa=-1), "neither may be negative"),
        (dict(n_head=3), "n_embd: 128 is no multiple of n_head, 3"),
        (dict(lr_scheduler_type="cos"), "cosine"),
        (dict(precision="fp16"), "choose one of float32, bfloat16."),
        (dict(load_in_4bit=True), "give lora_rank too"),
        (dict(profile="full"), "choose one of demo, paper."),
    ],
)
def test_settings_that_cannot_be_are_refused(given, words):
    with pytest.raises(ValueError) as refusal:
        make_settings(**dict(profile="demo") | given)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_is_not_said_comes_from_the_profile():
    settings = make_settings("demo", n_train=10, epochs="3", seeds=None)
    assert (settings.n_train, settings.epochs) == (10, 3)
    assert settings.seeds == PROFILES["demo"]["seeds"] == [0]
    paper = make_settings("paper")
    assert (paper.seeds, paper.learning_rate, paper.warmup_steps) == ([0, 1, 2], 5e-6, 500)
    assert (paper.n_train, paper.warm_up_epochs, paper.max_length) == (None, 0.0, 1024)


def test_a_workload_is_named_after_the_data():
    assert make_settings("demo").workload == make_settings("paper").workload == "helpful"
    assert make_settings("demo", data="mine.jsonl").workload == "mine"
    assert make_settings("demo", data="mine.jsonl", workload="tone").workload == "tone"
    split = make_settings("paper", data="a/b", splits="train_prefs,test_prefs")
    assert split.splits == ["train_prefs", "test_prefs"]


def test_launch_refuses_what_only_the_notebook_does():
    with pytest.raises(ValueError, match="belong to nbs/run.ipynb"):
        launch(["--data", "synthetic"])
    with pytest.raises(ValueError, match="precision: 'half' is unknown"):
        launch(["--precision", "half"])


def test_the_command_says_what_is_wrong_in_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["runs", "--precision", "half"])
    with pytest.raises(SystemExit, match="^precision: 'half' is unknown"):
        runpy.run_module("qr_rlhf.runs", run_name="__main__")
    with pytest.raises(SystemExit, match="2"):  # no other option is taken for it
        launch(["--epoch", "1"])


def test_steps_are_counted_over_all_processes(tmp_path, monkeypatch):
    made = []

    def keep(folder, steps, evaluations, **options):
        made.append((steps, evaluations, options))

    monkeypatch.setattr(runs, "training_arguments", keep)
    settings = make_settings("demo", gradient_checkpointing=True)
    run_arguments(tmp_path, settings, 801, 1.5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    run_arguments(tmp_path, settings, 801, 1.5)
    steps, evaluations, checkpointing = zip(*made, strict=True)
    assert steps == (77, 39) and evaluations == (6, 6)  # 51 batches an epoch, or 26 of two
    assert [options.get("gradient_checkpointing") for options in checkpointing] == [True, None]


def test_a_folder_is_held_by_one_process_and_belongs_to_its_settings(tmp_path):
    run, settings = tmp_path / "run", dict(lr=0.1, seeds=(0, 1))
    lock = open_run(run, settings)
    assert open_run(run, dict(seeds=[0, 1], lr=0.1)) is lock  # a notebook that is run again
    start = f"from qr_rlhf.runs import open_run; open_run({str(run)!r}, {{}})"
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", start]
    other = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "run: another process is working here" in other.stderr
    lock.release(force=True)
    open_run(run, settings | dict(lr=0.2)).release()  # nothing was made yet
    assert json.loads((run / "settings.json").read_text())["lr"] == 0.2
    (run / "scalar").mkdir()
    (run / "scalar" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other settings \(lr was 0.2 and is now 0.1\)"):
        open_run(run, settings)
    open_run(run, settings | dict(lr=0.2)).release()  # the refusal let go of the folder


def test_files_appear_whole_or_not_at_all(tmp_path):
    class Broken:
        def savefig(self, path, **kwargs):
            path.write_text("half")
            raise OSError("the disk is full")

    write_whole(tmp_path / "made" / "figure.png", lambda path: path.write_text("old"))
    with pytest.raises(OSError, match="disk is full"):
        save_figure(Broken(), tmp_path / "made" / "figure")
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["figure.png"]
    assert (tmp_path / "made" / "figure.png").read_text() == "old"


def test_an_objective_needs_no_options_and_no_dataclass(monkeypatch):
    given = Objective()
    monkeypatch.setitem(OBJECTIVES, "purm", (given, 1))
    assert make_settings("demo", workload="helpful", objective="purm").make_objective() is given
    assert given.options() == {}  # a run writes them down, and so does its card
    assert make_settings("demo", objective="dpl_normal").make_objective().options() == {"n": 10}


def test_versions_of_what_computes_are_known():
    assert len(versions()) == 8 and versions()["torch"][0].isdigit()
