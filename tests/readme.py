"Make README.md from nbs/index.ipynb: python tests/readme.py"
import re
from pathlib import Path

from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).parent.parent


def readme() -> str:
    "README's text: the index notebook in Markdown, images found from the top folder, notebooks' links too, and no front matter or hidden cells."
    config = Config(TagRemovePreprocessor=dict(enabled=True, remove_cell_tags={"hide"}, remove_input_tags={"output"}),
                    MarkdownExporter=dict(preprocessors=["nbconvert.preprocessors.TagRemovePreprocessor"]))
    text = MarkdownExporter(config=config).from_filename(str(ROOT/"nbs"/"index.ipynb"))[0]
    text = re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](nbs/\1)", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__": (ROOT/"README.md").write_text(readme(), encoding="utf-8")
