"What somebody reads who mistypes a parameter or gives a file that can't be read."

import json
import re

import nbformat
import pytest
from conftest import ROOT, error
from nbclient import NotebookClient

from qr_rlhf.formats import InputError
from qr_rlhf.settings import parameters

TAKING_PARAMETERS = [
    *(ROOT / "nbs" / f"{name}.ipynb" for name in ("run", "report")),
    *sorted((ROOT / "nbs" / "studies").glob("*.ipynb")),
]


def code_cells(path):
    "Tags and source of each code cell."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [
        (cell["metadata"].get("tags", []), "".join(cell["source"]))
        for cell in cells
        if cell["cell_type"] == "code"
    ]


# parameters


@pytest.mark.parametrize(
    ("notebook", "wrong", "right"),
    [
        ("run", "epohcs", "epochs"),
        ("report", "name", "names"),
        ("studies/tuning", "epoch", "epochs"),
    ],
)
def test_an_unknown_parameter_is_refused(project, notebook, wrong, right):
    said = error(project.papermill(notebook, **{wrong: 2}))
    assert said == f"{wrong}: there is no such parameter; the nearest is {right}."


@pytest.mark.parametrize("path", TAKING_PARAMETERS, ids=lambda path: path.stem)
def test_parameters_are_checked_by_the_cell_that_follows_them(path):
    (given, _), (tags, imports), *others = code_cells(path)
    own = path.stem == "run"
    assert given == ["injected-parameters" if own else "parameters"] and not tags
    check = (
        "check_parameters(globals(), parameters())" if own else "check_parameters(globals())"
    )
    assert imports.splitlines()[-1] == check
    tagged = [tags for tags, _ in others if tags]
    assert tagged == ([["parameters"]] if own else [])


def test_run_ipynb_uses_no_parameters_name_for_something_else():
    "It takes the value of any name that is a parameter's, should it have one."
    tags, cells = zip(*code_cells(ROOT / "nbs" / "run.ipynb"), strict=True)
    own = "\n".join(cell for tag, cell in zip(tags, cells, strict=True) if not tag)
    assert not set(re.findall(r"^(?:for )?(\w+)(?:, \w+)* (?:=|in) ", own, re.M)) & {
        *parameters()
    }


def run_cells(*sources):
    "Run cells in one kernel, and return what they show."
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    where = dict(metadata=dict(path=str(ROOT)))
    NotebookClient(
        notebook, kernel_name="python3", allow_errors=True, resources=where
    ).execute()
    return [cell.outputs for cell in notebook.cells]


def test_a_second_run_in_the_same_kernel_passes():
    defaults, given = "seeds = 0\nepochs = 10  # of training", "# Parameters\nepochs = 2"
    check = "from qr_rlhf.studies import check_parameters\ncheck_parameters(globals())"
    once = [defaults, given, check, "results = 3"]
    wrong = [defaults, "# Parameters\nepohcs = 2", check]
    *passed, refused = run_cells(*once, *once, *wrong, *once, *wrong[:2], check)
    assert [outputs for outputs in passed if outputs] == [refused]  # of the wrong one
    (shown,) = refused
    sentence = "epohcs: there is no such parameter; the nearest is epochs."
    assert shown.output_type == "error" and shown.ename == "InputError"
    assert shown.traceback == [sentence] and shown.evalue == sentence


# errors

# what only those who program meet
COMPUTING = {"analysis", "rewards", "synthetic", "uncertainty", "training"}


def test_errors_about_what_a_person_gave_are_of_one_class():
    others = [p for p in (ROOT / "qr_rlhf").glob("*.py") if p.stem not in COMPUTING]
    others += (ROOT / "nbs" / "studies").glob("*.ipynb")
    assert not [p.name for p in others if "raise ValueError(" in p.read_text(encoding="utf-8")]


def fail():
    raise InputError("seeds: 'a' can't be read as list[int].")


def test_a_notebook_shows_the_sentence_or_on_demand_the_traceback(monkeypatch):
    with pytest.raises(ValueError) as caught:
        fail()
    assert caught.value._render_traceback_() == ["seeds: 'a' can't be read as list[int]."]
    monkeypatch.setenv("QR_RLHF_TRACEBACK", "1")
    (shown,) = caught.value._render_traceback_()
    assert shown.startswith("Traceback (most recent call last)") and ", in fail\n" in shown
    assert shown.rstrip().endswith("InputError: seeds: 'a' can't be read as list[int].")


def test_a_wrong_value_ends_in_its_sentence(project):
    done = project.papermill("run", seeds="a")
    said = error(done)
    assert said == "seeds: 'a' can't be read as list[int], such as 0,1,2."
    assert "Exception encountered at" in done.stderr.strip().splitlines()[-2]
    cells = json.loads((project.folder / "runs" / "out.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    (shown,) = [output for output in outputs if output["output_type"] == "error"]
    assert shown["traceback"] == [said]
