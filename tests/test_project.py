"The project's own order: notebooks, package, README, and what an installation needs."

import json
import re
import runpy
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbconvert import HTMLExporter

ORDER = """formats groups chat together files sources backbones size data rewards
analysis judgements packing model ratings losses resume many training figures
grammar synthetic uncertainty bounds large settings runs export policy batches
library serve pipeline experiments families rated studies""".split()
SHOWN = ["index", "run", "report"]
NOTEBOOKS = [
    *sorted((ROOT / "nbs").glob("*.ipynb")),
    *sorted((ROOT / "nbs/studies").glob("*.ipynb")),
]
DISPLAYS = re.compile(r"^\s*(display|print|plt\.show)\(|^display\(", re.M)


def read_cells(path, kind="code"):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def package_files(root):
    return {path.name: path.read_text() for path in (root / "qr_rlhf").glob("*.py")}


def test_package_is_the_notebooks_export(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    (tmp_path / "qr_rlhf").mkdir()
    shutil.copy(ROOT / "qr_rlhf" / "__init__.py", tmp_path / "qr_rlhf")
    export = [sys.executable, str(ROOT / ".ci" / "export.py")]
    subprocess.run(export, cwd=tmp_path, check=True)
    ours, theirs = package_files(ROOT), package_files(tmp_path)
    assert ours == theirs, "notebooks and package differ: run python .ci/export.py"


def test_readme_is_the_index():
    made = runpy.run_path(str(ROOT / ".ci" / "readme.py"))["readme"]()
    written = (ROOT / "README.md").read_text(encoding="utf-8")
    assert written == made, "run: python .ci/readme.py"
    assert len(written.splitlines()) <= 130
    assert len(written.split()) <= 1300


def outputs_of(notebook):
    "What the code cells of a notebook show, as text."
    shown = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return [output["data"]["text/markdown"] for output in shown if "data" in output]


def test_numbers_of_the_index_come_from_the_stored_results():
    stored = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    fresh = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    where = {"metadata": {"path": str(ROOT / "nbs")}}
    NotebookClient(fresh, kernel_name="python3", resources=where).execute()
    assert outputs_of(stored) == outputs_of(fresh), "run nbs/index.ipynb and .ci/readme.py"
    assert len(outputs_of(fresh)) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_fit_to_commit(path):
    text = path.read_text(encoding="utf-8")
    kernel = json.loads(text)["metadata"]["kernelspec"]
    assert {"name", "language", "display_name"} <= set(kernel)  # papermill needs the language
    outputs = [output for cell in read_cells(path) for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    ids = [cell["id"] for cell in json.loads(text)["cells"]]
    assert len(set(ids)) == len(ids)
    assert path.stat().st_size < 1_500_000
    assert not re.search(r"/(home|root|work|tmp|Users)/", text), "a path of somebody's machine"
    nbformat.validate(nbformat.reads(text, 4))


def test_a_notebook_becomes_a_page():
    page, _ = HTMLExporter().from_filename(str(ROOT / "nbs" / "run.ipynb"))
    assert "What this run says" in page and "image/png" in page


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_displayed_is_stored(path):
    if path.stem not in SHOWN and path.parent.name != "studies":
        return
    for cell in read_cells(path):
        source = "".join(cell["source"])
        outside_functions = "\n".join(re.findall(r"^(?!\s|def |@).*$", source, re.M))
        if DISPLAYS.search(outside_functions):
            assert cell["outputs"], f"{path.name} has no output for:\n{source}"


def test_modules_are_small_and_import_only_what_stands_above():
    modules = {path.stem for path in (ROOT / "qr_rlhf").glob("*.py")}
    assert modules == {*ORDER, "__init__", "_modidx"}
    for i, name in enumerate(ORDER):
        text = (ROOT / "qr_rlhf" / f"{name}.py").read_text()
        assert text.count("\n") <= 350, name
        assert set(re.findall(r"^from \.(\w+) import", text, re.M)) <= set(ORDER[:i]), name
        assert not re.search(r"^from qr_rlhf\.", text, re.M), name


def run_python(code):
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_imports_without_the_tools_of_development():
    tools = "nbdev fastcore execnb papermill IPython jupyterlab nbconvert ruff".split()
    block = f"import sys\nfor name in {tools}:\n    sys.modules[name] = None\n"
    run_python(block + "\n".join(f"import qr_rlhf.{name}" for name in ORDER))
    run_python("import sys, qr_rlhf; assert not {'torch', 'transformers'} & set(sys.modules)")
    run_python("import sys, qr_rlhf.analysis; assert 'torch' not in sys.modules")


def test_chapters_make_the_docs():
    run_python("from nbdev.serve import proc_nbs; proc_nbs()")
    assert (ROOT / "_proc" / "00_data.ipynb").exists()


def sources_of_citations():
    "The prose and code of all notebooks but the references, the package and README."
    for path in NOTEBOOKS:
        if path.stem != "37_references":
            cells = read_cells(path) + read_cells(path, "markdown")
            yield "\n".join("".join(cell["source"]) for cell in cells)
    for path in [*(ROOT / "qr_rlhf").glob("*.py"), ROOT / "README.md"]:
        yield path.read_text(encoding="utf-8")


ARXIV = re.compile(r"(?<![\d.])[12]\d(?:0[1-9]|1[0-2])\.\d{5}(?!\d)")
AUTHOR_YEAR = re.compile(r"([A-Z][\w-]+)(?: et al\.)?,? \(?((?:19|20)\d\d)\b")


def test_every_work_cited_stands_in_the_references():
    cells = read_cells(ROOT / "nbs" / "37_references.ipynb", "markdown")
    entries = "\n".join("".join(cell["source"]) for cell in cells).split("\n")
    text = "\n".join(sources_of_citations())
    cited = {(number,) for number in ARXIV.findall(text)} | set(AUTHOR_YEAR.findall(text))
    assert {("2312.08358",), ("2503.22480",), ("Dabney", "2018"), ("Owen", "2007")} <= cited
    unlisted = [work for work in cited if not any(all(x in e for x in work) for e in entries)]
    assert not unlisted, f"add to nbs/37_references.ipynb: {unlisted}"
