"Runs that are killed in each phase, in one process and in two, end as uninterrupted ones."

import errno
import io
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from conftest import ROOT

from qr_rlhf import resume
from qr_rlhf.formats import InputError
from qr_rlhf.resume import find_damage, sweep, train_to, write_folder, write_whole
from qr_rlhf.runs import open_run


def test_a_run_that_is_killed_in_each_phase_ends_as_an_uninterrupted_one(project):
    done = project.forks.run(["-m", "resilience", "--kills", "0"], ROOT / "tests")
    assert done.returncode == 0, done.stdout + done.stderr[-20_000:]
    assert done.stdout.count("as uninterrupted") == 2, done.stdout


@pytest.fixture
def full_disk():
    "No file may be larger than 10 kB: as if the disk were full."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def too_much(folder):
    folder.mkdir()
    (folder / "small").write_text("x")
    (folder / "large").write_bytes(bytes(20_000))


def no_trainer(work):
    raise AssertionError("a trainer was made")


@pytest.mark.parametrize(
    "write",
    [
        lambda place: write_whole(place / "file", lambda path: path.write_bytes(bytes(20_000))),
        lambda place: write_folder(place / "folder", too_much),
    ],
    ids=["file", "folder"],
)
def test_a_full_disk_is_one_sentence(tmp_path, full_disk, write):
    with pytest.raises(OSError, match="nothing can be written there") as caught:
        write(tmp_path)
    assert "\n" not in str(caught.value) and "make room" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    "A folder in which nothing can be made. No right stops root, who gets the same errors."
    if os.geteuid():
        tmp_path.chmod(0o500)
        yield tmp_path
        tmp_path.chmod(0o700)
        return

    def refusing(call):
        def refused(path, *args, **kwargs):
            if Path(path).is_relative_to(tmp_path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path, *args, **kwargs)

        return refused

    for module, name in ((os, "mkdir"), (os, "open"), (io, "open")):
        monkeypatch.setattr(module, name, refusing(getattr(module, name)))
    yield tmp_path


@pytest.mark.parametrize(
    "write",
    [
        lambda place: write_whole(place / "file", lambda path: path.write_text("x")),
        lambda place: write_folder(place / "folder", too_much),
        lambda place: open_run(place / "run", {}),
        lambda place: train_to(place / "model", no_trainer),
    ],
    ids=["file", "folder", "run", "training"],
)
def test_a_folder_that_is_read_only_is_one_sentence(read_only, write):
    with pytest.raises(OSError, match=r"nothing can be written there \(Permission denied\)"):
        write(read_only)


def test_a_folder_is_written_by_one_at_a_time(tmp_path, monkeypatch):
    "As where two trainings are started at once that merge the same adapter."
    folder, begun, go_on = tmp_path / "merged", Event(), Event()

    def slowly(place):
        place.mkdir()
        (place / "half").write_text("x")
        begun.set()
        assert go_on.wait(60)
        (place / "other half").write_text("y")

    with ThreadPoolExecutor() as pool:
        first = pool.submit(write_folder, folder, slowly)
        assert begun.wait(60)
        with monkeypatch.context() as soon:
            soon.setattr(resume, "PATIENCE", 0.1)
            told = "merged.working: another process is working here"
            with pytest.raises(InputError, match=told):
                write_folder(folder, slowly)
        second = pool.submit(write_folder, folder, no_trainer)  # it waits, and takes it up
        go_on.set()
        first.result()
        second.result()
    assert not find_damage(folder) and (folder / "other half").read_text() == "y"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_leftovers_and_nothing_else_are_swept(tmp_path):
    kept = [".lock", "figure2.svg", ".figure2.svg", "model.2.json", ".hidden"]
    left = [".figure2.4711.svg", "sub/.README.12.md", "sub/.results.9"]
    (tmp_path / "sub").mkdir()
    for name in kept + left:
        (tmp_path / name).write_text("x")
    sweep(tmp_path)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == set(kept)


def test_a_run_is_opened_only_with_the_settings_it_was_made_with(tmp_path):
    folder = tmp_path / "run"
    open_run(folder, dict(a=1)).release()
    (folder / ".results.4711.json").write_text("{")
    (folder / "scalar" / "seed0.working").mkdir(parents=True)
    (folder / "scalar" / "seed0.working" / ".lock").touch()  # of a training that never began
    open_run(folder, dict(a=2)).release()  # nothing was made yet
    (folder / "results.json").write_text("{}")
    for spoil in (lambda path: path.write_text('{"a'), lambda path: path.unlink()):
        spoil(folder / "settings.json")
        with pytest.raises(ValueError, match="it can't be known how this run was made"):
            open_run(folder, dict(a=2))
