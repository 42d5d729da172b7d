"""Kill runs in each of their phases, and at random moments; each must end as if nothing was.

python tests/resilience.py             a kill in each phase, two processes, 20 random kills
python tests/resilience.py --kills 0   without the random ones, as test_resilience.py does
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from threading import RLock

import pandas as pd
import torch
from conftest import SMALL
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformers import Trainer

from qr_rlhf import pipeline, resume
from qr_rlhf.figures import figure2, figure3
from qr_rlhf.model import tiny_gpt2, train_tokenizer
from qr_rlhf.runs import launch, save_figure
from qr_rlhf.settings import make_settings
from qr_rlhf.studies import quiet
from qr_rlhf.synthetic import World
from qr_rlhf.training import PairTrainer

PHASES = {  # phase → the function after whose n-th call in any process the first is killed
    "the settings are written": (pipeline, "open_run", 1),
    "the backbone is written": (pipeline, "tiny_gpt2", 1),
    "tokenising": (pipeline, "encode_pairs", 2),
    "warming up": (Trainer, "training_step", 3),
    "evaluating the warm-up": (Trainer, "prediction_step", 1),
    "saving the warm-up": (Trainer, "_save_optimizer_and_scheduler", 1),
    "exporting the warm-up": (Trainer, "_load_best_model", 1),
    "training": (PairTrainer, "compute_loss", 6),
    "evaluating": (PairTrainer, "prediction_step", 1),
    "saving": (Trainer, "_save_rng_state", 2),
    "writing a manifest": (resume, "checksum", 3),
    "exporting": (resume, "write_manifest", 2),
    "a model is there": (resume, "save", 1),
    "scoring": (pipeline, "score_pairs", 2),
    "writing the rewards": (pd.DataFrame, "to_parquet", 1),
    "drawing": (Figure, "savefig", 2),
    "writing the results": (Path, "write_text", 3),  # after two model cards
}
TOGETHER = {  # the same for the second of two processes
    "training": (PairTrainer, "compute_loss", 6),
    "saving its random numbers": (Trainer, "_save_optimizer_and_scheduler", 2),
}


LOG = tempfile.TemporaryFile("w+")  # what the runs print


def die_after(owner, name, calls):
    "Kill the first process, and the copy of it that calls a function the n-th time."
    original, count = getattr(owner, name), itertools.count(1)

    def function(*args, **kwargs):
        found = original(*args, **kwargs)
        if next(count) == calls:
            os.kill(os.getsid(0), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)  # if this is a copy
        return found

    setattr(owner, name, function)


def start(function, *args, die=None, **environment):
    "Call a function in a process of its own, which may be told to die; returns its id."
    if process := os.fork():
        return process
    os.setsid()
    tqdm.set_lock(RLock())  # or else all share one, which a killed process may hold
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(LOG.fileno(), stream.fileno())
    try:
        if die:
            die_after(*die)
        function(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def wait(process):
    "How a process ended: 0, or minus the signal."
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run(runs, processes=2):
    "What run.ipynb does; its two models train at the same time, or one after the other."
    quiet(threads=1)
    settings = make_settings("demo", workload="harmless", **SMALL)
    run = pipeline.begin_run(settings, "harmless", runs)
    pipeline.add_backbone(run)
    pipeline.warm_up(run)
    pipeline.train_models(run, processes)
    rewards = pipeline.score_models(run)
    for name, draw in dict(figure2=figure2, figure3=figure3).items():
        save_figure(draw(rewards, "a run that is killed"), run.folder / name)
    results = pipeline.collect_results(run, rewards)
    pipeline.finish_run(run, results, seconds=1)


def run_and_kill(runs, die=None, after=None):
    "Start a run and kill its first process; its copies end by themselves, a moment later."
    process = start(run, runs, die=die)
    if after is not None:
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
    return wait(process)


def differences(whole, other):
    "What is otherwise in a run that was killed: names of files, weights, rewards, results."
    names = [{str(p.relative_to(f)) for p in f.rglob("*")} for f in (whole, other)]
    found = [f"{name} is there in one only" for name in names[0] ^ names[1]]
    for name in names[0] & names[1]:
        files = whole / name, other / name
        if files[0].suffix in (".safetensors", ".parquet"):
            equal = files[0].read_bytes() == files[1].read_bytes()
        elif files[0].name == "results.json":
            equal = results(files[0]) == results(files[1])
        else:
            continue
        found += [] if equal else [f"{name} differs"]
    return found


def results(path):
    return json.loads(path.read_text()) | dict(seconds=None)


class Report:
    "Prints a line for each check, and remembers whether all were passed."

    failed = 0

    def add(self, title, found):
        self.failed += bool(found)
        print(f"{title}: {'; '.join(found) or 'as uninterrupted'}", flush=True)

    def add_kill(self, phase, ended):
        killed = ended == -signal.SIGKILL
        self.failed += not killed
        print(f"{phase}: {'killed' if killed else f'ended with {ended}'}", flush=True)


def kill_in_each_phase(place, report):
    "One run, killed in one phase after the other."
    assert wait(start(run, place / "whole", 1)) == 0
    for phase, die in PHASES.items():
        report.add_kill(phase, run_and_kill(place / "killed", die))
    folders = place / "whole" / "harmless", place / "killed" / "harmless"
    damage(folders[1])
    assert wait(start(run, place / "killed")) == 0
    for aside in folders[1].rglob("*.damaged"):
        shutil.rmtree(aside)
    report.add(f"one run, killed {len(PHASES)} times and damaged", differences(*folders))


def damage(folder):
    "Spoil what is finished: a model, the backbone, and the rewards of all."
    os.truncate(folder / "quantile" / "seed0" / "model.safetensors", 1000)
    (folder / "scratch" / "tokenizer.json").unlink()
    os.truncate(folder / "rewards.parquet", 1000)


def write_inputs(folder):
    "Pairs and a backbone for `launch`."
    folder.mkdir()
    pairs = World().rows("helpful", "train", 100)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tokenizer = train_tokenizer([pair["chosen"] for pair in pairs], 400)
    tokenizer.save_pretrained(folder / "backbone")
    gpt2 = tiny_gpt2(tokenizer, max_length=256, n_layer=1, n_embd=16, n_head=2, seed=0)
    gpt2.save_pretrained(folder / "backbone")


def launch_in(folder):
    os.chdir(folder)
    quiet(threads=1)
    options = "--name mine --data pairs.jsonl --splits pairs --backbone backbone --seeds 0"
    options += " --max_length 256 --epochs 1 --batch_size 4 --learning_rate 1e-3"
    launch([*options.split(), "--warmup_steps", "2", "--evaluations", "3"])


def launch_two(folder, die=None):
    "Start `launch` in two processes; if the second dies, the first one is killed, too."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    ranks = [dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    first = start(launch_in, folder, **both, **ranks[0])
    second = start(launch_in, folder, die=die, **both, **ranks[1])
    ended = wait(second)
    if ended:
        time.sleep(0.5)  # as long as the first one goes on alone
        os.kill(first, signal.SIGKILL)
    wait(first)
    return ended


def kill_two_processes(place, report):
    for name in ("alone", "together"):
        assert wait(start(write_inputs, place / name)) == 0
    assert launch_two(place / "alone") == 0
    for phase, die in TOGETHER.items():
        report.add_kill(f"two processes, {phase}", launch_two(place / "together", die))
    assert launch_two(place / "together") == 0
    found = differences(place / "alone" / "runs", place / "together" / "runs")
    report.add(f"two processes, killed {len(TOGETHER)} times", found)


def kill_at_random(place, report, kills, seed):
    "Kill runs at random moments, each once or twice."
    rng, began, done = random.Random(seed), time.time(), 0
    assert wait(start(run, place / "timed")) == 0
    lasts = time.time() - began
    while done < kills:
        runs, moments = place / f"killed{done}", []
        for _ in range(rng.choice([1, 2])):
            moments.append(rng.uniform(0, lasts))
            run_and_kill(runs, after=moments[-1])
        assert wait(start(run, runs)) == 0
        found = differences(place / "whole" / "harmless", runs / "harmless")
        when = " and ".join(f"{moment:.1f}" for moment in moments)
        report.add(f"killed after {when} of {lasts:.1f} seconds", found)
        done += len(moments)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of these moments")
    given, report = parser.parse_args(), Report()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kill_in_each_phase(Path(folder), report)
        kill_two_processes(Path(folder), report)
        if given.kills:
            kill_at_random(Path(folder), report, given.kills, given.seed)
    if report.failed:
        LOG.seek(0)
        print(LOG.read(), file=sys.stderr)
    sys.exit(report.failed > 0)
