"What the tests share: a copy of the project, so that notebooks leave no trace here."

import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a process for each core already
if "GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # numbers are compared to the last digit

import pytest
from filelock import FileLock
from forks import Forks

ROOT = Path(__file__).parent.parent
SMALL = dict(  # the least demo that still trains, evaluates and resumes
    n_train=160,
    n_eval=24,
    vocab_size=400,
    n_layer=1,
    n_embd=16,
    n_head=2,
    warm_up_epochs=1,
    epochs=1,
    batch_size=16,
    evaluations=2,
)


class Project:
    "A copy of the project's notebooks in a folder of its own, and papermill in it."

    def __init__(self, folder):
        self.folder = Path(folder)
        shutil.copy(ROOT / "settings.ini", self.folder)
        without = shutil.ignore_patterns(".ipynb_checkpoints")
        shutil.copytree(ROOT / "nbs", self.folder / "nbs", ignore=without)
        (self.folder / "runs").mkdir()
        self.env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(self.folder / "hub"),
            "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody answers there
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        self.forks = Forks(self.folder, self.env)

    def command(self, notebook, output, **parameters):
        "The papermill command; without output the notebook goes to standard output."
        paths = [f"nbs/{notebook}.ipynb", *([output] if output else [])]
        given = []
        for name, value in parameters.items():
            given += ["-p", name, str(value)]
        quick = ["--no-progress-bar", "--no-request-save-on-cell-execute"]
        return [sys.executable, "-m", "papermill", *paths, *given, *quick]

    def papermill(self, notebook, output="runs/out.ipynb", **parameters):
        "Run a notebook, and return the finished process, whether it failed or not."
        command = self.command(notebook, output, **parameters)
        return self.forks.run(command[1:], self.folder)

    def run(self, notebook, output="runs/out.ipynb", **parameters):
        "Run a notebook that must not fail."
        done = self.papermill(notebook, output, **parameters)
        assert done.returncode == 0, done.stderr
        return done

    def results(self, name):
        return json.loads((self.folder / "runs" / name / "results.json").read_text())


def error(process):
    "The last line of a failed process: the sentence a person reads."
    assert process.returncode, process.stdout
    return process.stderr.strip().splitlines()[-1]


LONGEST_FIRST = """run policy_study people_studies small_studies large spread_studies studies
resilience distributed formats groups project serve damage library many""".split()


def pytest_collection_modifyitems(items):
    "Begin with the files that take longest, so that at the end no process waits for another."
    place = {f"test_{name}": i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("project"))
    yield project
    project.forks.stop()


@pytest.fixture(scope="session")
def demo(project, tmp_path_factory):
    "One finished run of the demo at a very small setting; the first process makes it for all."
    base = tmp_path_factory.getbasetemp()  # of this process; its parent is all processes'
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    runs = project.folder / "runs"
    with FileLock(f"{made}.lock"):
        if (made / "harmless.ipynb").exists():
            shutil.copytree(made, runs, dirs_exist_ok=True)
        else:
            project.run("run", "runs/harmless.ipynb", workload="harmless", **SMALL)
            shutil.copytree(runs / "harmless", made / "harmless", dirs_exist_ok=True)
            shutil.copy(runs / "harmless.ipynb", made)
    return project
