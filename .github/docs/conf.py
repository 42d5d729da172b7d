"""The docs as a site: Sphinx on the notebooks that nbdev has processed; nothing is executed.

python -c "from nbdev.serve import proc_nbs; proc_nbs()"
sphinx-build -W --keep-going -c .github/docs _proc _docs/html
"""

import json
import re
from pathlib import Path

import yaml
from nbdev.config import get_config

PAGES = Path(__file__).parents[2] / "_proc"
SITE = get_config().doc_host + get_config().doc_baseurl

project, html_title = get_config().lib_name, get_config().title
copyright = get_config().copyright
extensions = ["myst_nb"]
html_theme, html_static_path, html_css_files = "furo", ["static"], ["wide.css"]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]


def read_page(path: Path) -> tuple[dict, dict]:
    "What stands at the top of a notebook (title, question, name of its module), and the rest."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    head = "".join(notebook["cells"][0]["source"]).strip("-\n ")
    return yaml.safe_load(head), notebook


def modules() -> dict[str, str]:  # module → page
    return {
        read_page(path)[0].get("output-file", "").removesuffix(".html"): path.stem
        for path in PAGES.glob("[0-9]*.ipynb")
    }


def contents() -> str:
    "The sidebar: run and report, the chapters in their order, the studies."
    chapters = sorted(path.stem for path in PAGES.glob("[0-9]*.ipynb"))
    studies = sorted(f"studies/{path.stem}" for path in PAGES.glob("studies/*.ipynb"))
    parts = {  # of the chapters as in nbs/index.ipynb
        "Runs": ["run", "report"],
        "The story": chapters[:9],
        "Data": chapters[9:15],
        "Models, training": chapters[15:25],
        "Use": chapters[25:29],
        "Experiments": chapters[29:],
        "Studies": studies,
    }
    trees = [
        "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])
        for caption, pages in parts.items()
    ]
    return "\n\n".join(trees)


def prose(text: str) -> dict:
    "A cell of Markdown, whose links lead to the pages of this site and to their headings."

    def page(link):
        return f"](/{MODULES[link[1]]}.ipynb"

    def heading(link):  # named as in JupyterLab; the site drops capitals and punctuation
        return link[1] + re.sub(r"[^\w-]", "", link[2]).lower() + ")"

    text = re.sub(rf"\]\({re.escape(SITE)}/(\w+)\.html", page, text)
    text = re.sub(r"(\]\([\w./]*#)([^)]+)\)", heading, text)
    text = text.replace("](../.github/", f"]({get_config().git_url}/blob/main/.github/")
    return dict(cell_type="markdown", metadata={}, source=text)


def as_markdown(cell: dict) -> str | None:
    "What a code cell shows, if its code is not shown and it shows Markdown alone."
    shown = [output.get("data", {}).get("text/markdown") for output in cell["outputs"]]
    hidden = "#| echo: false" in "".join(cell["source"])
    return "\n\n".join(map("".join, shown)) if hidden and shown and all(shown) else None


def convert(cell: dict) -> dict:
    "A cell without what nbdev writes for Quarto."
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return prose(source)
    if text := as_markdown(cell):
        text = re.sub(r"\A---\n", "", text)
        return prose(re.sub(r"\{target=[^}]*\}", "", text))
    tags = ["remove-input"] if "#| echo: false" in source else []
    source = re.sub(r"^#\|.*\n?", "", source, flags=re.M)
    shown = [o for o in cell["outputs"] if o.get("data", {}).get("text/markdown") != ["---"]]
    return cell | dict(source=source, metadata=dict(tags=tags), outputs=shown)


def convert_page(app, name: str, source: list[str]):
    "Called by Sphinx with the text of each page."
    head, notebook = read_page(PAGES / f"{name}.ipynb")
    number = f"{int(name[:2])} " if name[:2].isdigit() else ""
    cells = [prose(f"# {number}{head['title']}\n\n> {head.get('description', '')}")]
    cells += [convert(cell) for cell in notebook["cells"][2:]]
    if name == "index":
        cells.append(prose(contents()))
    cells = [cell | dict(id=f"cell-{i}") for i, cell in enumerate(cells)]
    source[0] = json.dumps(notebook | dict(cells=cells))


def setup(app):
    app.connect("source-read", convert_page)


MODULES = modules()
