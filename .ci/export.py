"Export the notebooks to the package: nbdev_export, whose lists of names are wrapped at 100 columns."

from textwrap import TextWrapper

import nbdev.maker
from nbdev.doclinks import nbdev_export


def wrapper(width, **options):
    return TextWrapper(width=100, **options)


if __name__ == "__main__":
    nbdev.maker.TextWrapper = wrapper
    nbdev_export()
