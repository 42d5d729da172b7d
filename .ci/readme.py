"Make README.md from nbs/index.ipynb: python .ci/readme.py"

import posixpath
import re
from pathlib import Path

from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent


def readme() -> str:
    "The index notebook in Markdown, without code; its links hold from the top folder."
    exporter = MarkdownExporter(exclude_input=True, exclude_output_prompt=True)
    text = exporter.from_filename(str(ROOT / "nbs" / "index.ipynb"))[0]
    text = re.sub(r"\]\((?!https?:|#)([^)]+)\)", from_top, text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def from_top(link: re.Match) -> str:
    "A link of the index as a link of the top folder."
    return f"]({posixpath.normpath(posixpath.join('nbs', link[1]))})"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
