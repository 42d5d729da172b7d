"Links of README, its neighbours and all notebooks: files and headings within are there."

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

TEXTS = [ROOT / "README.md", *(ROOT / ".github").glob("*.md")]
NOTEBOOKS = [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs" / "studies").glob("*.ipynb")]
CODE = re.compile(r"(`{3,}|~{3,}).*?\1|`[^`\n]*`", re.S)
LINK = re.compile(
    r"\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)|<(?:img|a)\b[^>]*(?:src|href)=\"([^\"]*)\""
)
OUTSIDE = re.compile(r"https?://[\w-]+(\.[\w-]+)+(:\d+)?(/[^\s<>\"{}|\\^]*)?|mailto:\S+@\S+")


def prose(path):
    "The Markdown of a file: of a notebook, its cells and what they show."
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [cell["source"] for cell in cells if cell["cell_type"] == "markdown"]
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    parts += [data["text/markdown"] for data in shown if "text/markdown" in data]
    return "\n\n".join("".join(part) for part in parts)


def links(path):
    text = CODE.sub("", prose(path))
    return {inside or attribute for inside, attribute in LINK.findall(text)}


def headings(path):
    "The names of a file's headings in links, as JupyterLab or GitHub make them."
    titles = re.findall(r"^#+ +(.+?)\s*$", CODE.sub(keep_words, prose(path)), re.M)
    if path.suffix == ".ipynb":
        return {title.replace(" ", "-") for title in titles}
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


def keep_words(code):
    return "" if code[1] else code[0].strip("`")


def broken(path):
    "The links of a file that lead nowhere."
    found = []
    for link in links(path):
        place, _, heading = link.partition("#")
        target = path.parent / place if place else path
        if re.match(r"[a-z]+:", link):
            if not OUTSIDE.fullmatch(link):
                found.append(link)
        elif not target.exists() or (heading and heading not in headings(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("path", [*TEXTS, *NOTEBOOKS], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    assert not broken(path)


def test_broken_links_are_found(tmp_path):
    (tmp_path / "there.md").write_text("# Two words, `code`!\n")
    good = "[a](there.md) [b](there.md#two-words-code) [c](https://a.org/x_(y)) `[d](no.md)`"
    bad = ["none.md", "there.md#no-words", "https://nodots", "#nowhere"]
    page = tmp_path / "page.md"
    page.write_text("\n\n".join([good, "```\n[x](no.md)\n```", *(f"[x]({b})" for b in bad)]))
    assert sorted(broken(page)) == sorted(bad)


def test_every_chapter_is_linked_from_the_index():
    chapters = {path.name for path in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    assert chapters <= {Path(link).name for link in links(ROOT / "nbs" / "index.ipynb")}
