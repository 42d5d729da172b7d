"What pip installs, read from settings.ini, which nbdev reads too."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = parser["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    license="MIT",
    keywords=settings["keywords"].split(),
    url=settings["git_url"],
    packages=find_packages(include=["qr_rlhf"]),
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={
        extra: settings[f"{extra}_requirements"].split()
        for extra in ("dev", "bench", "policy", "serve", "peft")
    },
    entry_points={"nbdev": ["qr_rlhf=qr_rlhf._modidx:d"]},
    zip_safe=False,
)
