"""Quantile reward models: train, load, score, evaluate, export.

`help(qr_rlhf.train)`, `help(qr_rlhf.load)` and `help(qr_rlhf.RewardModel)` say how. The names
below are loaded when they are used; each chapter's module has more.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# ruff: noqa: F401

if TYPE_CHECKING:  # what editors and mypy see; the same names as in WHERE
    from .backbones import load_tokenizer
    from .data import encode_pairs, load_pairs
    from .library import RewardModel, load, train
    from .losses import DistributionalObjective, PaperObjective
    from .model import RewardDistribution, load_reward_model
    from .policy import RiskMeasure, reward_function
    from .training import PairTrainer, training_arguments

WHERE = dict(
    train="library",
    load="library",
    RewardModel="library",
    RewardDistribution="model",
    RiskMeasure="policy",
    reward_function="policy",
    load_pairs="data",
    encode_pairs="data",
    load_tokenizer="backbones",
    load_reward_model="model",
    PaperObjective="losses",
    DistributionalObjective="losses",
    PairTrainer="training",
    training_arguments="training",
)
__all__ = ["__version__", *WHERE]


def __getattr__(name: str) -> object:
    "Load a name when it is first used, so that importing the package is quick."
    if name not in WHERE:
        raise AttributeError(f"module 'qr_rlhf' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"qr_rlhf.{WHERE[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
