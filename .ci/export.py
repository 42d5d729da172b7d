"""Export the notebooks to the package, as nbdev_export does, but for two things: lists of names
have 96 columns, and imports of several lines are relative, too."""

import re
from pathlib import Path
from textwrap import TextWrapper

import nbdev.maker
from nbdev.doclinks import nbdev_export


def wrapper(width, **options):
    return TextWrapper(width=86, **options)  # "__all__ = " comes before them


if __name__ == "__main__":
    nbdev.maker.TextWrapper = wrapper
    nbdev_export()
    for path in Path("qr_rlhf").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        relative = re.sub(r"^from qr_rlhf\.", "from .", text, flags=re.M)
        path.write_text(relative, encoding="utf-8")
