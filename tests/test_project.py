"The project's own order: notebooks, package, README, and what an installation needs."

import json, re, shutil, subprocess, sys
from pathlib import Path

import pytest
from nbconvert import HTMLExporter
from readme import ROOT, readme

NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)


def test_package_is_the_notebooks_export(tmp_path):
    for name in ("settings.ini", "nbs", "qr_rlhf"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    for path in (tmp_path / "qr_rlhf").glob("*.py"):
        path.unlink()
    (tmp_path / "qr_rlhf" / "__init__.py").write_text(
        (ROOT / "qr_rlhf" / "__init__.py").read_text()
    )
    subprocess.run(["nbdev_export"], cwd=tmp_path, check=True)
    ours, theirs = (
        {p.name: p.read_text() for p in (root / "qr_rlhf").glob("*.py")}
        for root in (ROOT, tmp_path)
    )
    assert ours == theirs, "notebooks and package differ: run nbdev_export"


def test_readme_is_the_index():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), (
        "run: python tests/readme.py"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_fit_to_commit(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert {"name", "language", "display_name"} <= set(
        notebook["metadata"]["kernelspec"]
    )  # papermill needs the language
    outputs = [o for c in notebook["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert path.stat().st_size < 1_500_000
    assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text(encoding="utf-8")), (
        "a path of somebody's machine"
    )
    assert len(HTMLExporter().from_filename(str(path))[0]) > 1000


def test_modules_are_small_and_import_only_what_stands_above():
    order = [
        "formats",
        "sources",
        "data",
        "model",
        "losses",
        "peers",
        "training",
        "runs",
        "large",
        "cards",
        "analysis",
        "figures",
        "uncertainty",
        "synthetic",
        "features",
        "policy",
    ]
    assert {p.stem for p in (ROOT / "qr_rlhf").glob("*.py")} == {*order, "__init__", "_modidx"}
    for i, name in enumerate(order):
        text = (ROOT / "qr_rlhf" / f"{name}.py").read_text()
        assert text.count("\n") <= 300, name
        assert set(re.findall(r"^from (?:qr_rlhf)?\.(\w+) import", text, re.M)) <= set(order[:i]), (
            name
        )


def test_imports_without_the_tools_of_development():
    blocked = "import sys\nfor n in ('nbdev', 'fastcore', 'execnb', 'papermill', 'IPython', 'jupyterlab', 'nbconvert'): sys.modules[n] = None\n"
    modules = [
        p.stem for p in (ROOT / "qr_rlhf").glob("*.py") if p.stem not in ("__init__", "_modidx")
    ]
    subprocess.run(
        [sys.executable, "-c", blocked + "import " + ", ".join(f"qr_rlhf.{m}" for m in modules)],
        cwd=ROOT,
        check=True,
    )
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, qr_rlhf; assert 'torch' not in sys.modules and 'transformers' not in sys.modules",
        ],
        cwd=ROOT,
        check=True,
    )


def test_chapters_make_the_docs():
    subprocess.run(
        [sys.executable, "-c", "from nbdev.serve import proc_nbs; proc_nbs()"], cwd=ROOT, check=True
    )
    assert (ROOT / "_proc" / "00_data.ipynb").exists()
