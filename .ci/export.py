"Export the notebooks to the package: nbdev_export, with its lists of names in 96 columns."

from textwrap import TextWrapper

import nbdev.maker
from nbdev.doclinks import nbdev_export


def wrapper(width, **options):
    return TextWrapper(width=86, **options)  # "__all__ = " comes before them


if __name__ == "__main__":
    nbdev.maker.TextWrapper = wrapper
    nbdev_export()
