"Worlds with prompts: votes follow the formula, and spread belongs to its owner."

import numpy as np
import pytest

from qr_rlhf.families import DPLWorld, OpposedWorld, PromptWorld, family
from qr_rlhf.formats import InputError
from qr_rlhf.synthetic import JUDGES, win_probability

OWNERS = "response", "prompt", "both"


def ask(world, pair, n, rng):
    "Share of n votes for the first, each by people who are drawn one by one."
    first, second = (world.truth(response) for response in pair)
    one, other = rng.choice(len(first.weights), (2, n), p=first.weights)
    severity, others = rng.normal(size=(2, n))
    alone = rng.random(n) < world.dependence
    other, others = np.where(alone, one, other), np.where(alone, severity, others)
    rewards = first.means[one] + first.sds[one] * severity
    opposed = second.means[other] + second.sds[other] * others
    return np.mean(rewards + rng.logistic(size=n) > opposed)


@pytest.mark.parametrize("dependence", [0, 0.4, 1])
@pytest.mark.parametrize("kind", [PromptWorld, OpposedWorld, DPLWorld])
def test_votes_of_people_agree_with_the_chance(kind, dependence):
    world, rng, n = kind(dependence=dependence), np.random.default_rng(0), 40_000
    x, p = world.pairs(4, seed=1)
    for pair, chance in zip(x, p, strict=True):
        error = np.sqrt(chance * (1 - chance) / n)
        assert abs(ask(world, pair, n, rng) - chance) < 3 * error + 1e-9


def test_votes_drawn_agree_with_the_chance():
    x, p = PromptWorld(3).pairs(20_000, seed=0)
    best = np.maximum(p, 1 - p)
    error = np.sqrt((best * (1 - best)).mean() / len(x))
    assert abs((p > 0.5).mean() - best.mean()) < 3 * error
    x, share = PromptWorld(3).pairs(2000, seed=0, votes=7)
    p = PromptWorld(3).chance(x)
    assert set(np.round(7 * share, 9)) <= set(range(8))
    assert abs(np.mean((share - p) ** 2) / np.mean(p * (1 - p) / 7) - 1) < 0.15


def test_dependence_0_and_1_are_the_two_kinds_of_judges():
    x, _ = PromptWorld(2, "both").pairs(50, seed=0)
    sides = [PromptWorld(2, "both").truth(x[:, side]) for side in range(2)]
    found = [PromptWorld(2, "both", dependence).chance(x) for dependence in (0, 0.25, 1)]
    independent, same = (win_probability(*sides, judges) for judges in JUDGES)
    assert np.allclose(found[0], independent) and np.allclose(found[2], same)
    assert np.allclose(found[1], 0.75 * independent + 0.25 * same)
    assert abs(same - independent).max() > 0.01


@pytest.mark.parametrize("owner", OWNERS)
def test_spread_belongs_to_its_owner(owner):
    world = PromptWorld(4, owner)
    x, _ = world.pairs(60, seed=0)
    assert (x[:, 0, :4] == x[:, 1, :4]).all() and (x[:, 0, 4:] != x[:, 1, 4:]).all()
    spread = world.truth(x).spread()
    assert np.allclose(*spread.T) == (owner == "prompt")
    elsewhere = x.copy()
    elsewhere[..., :4] += 1
    assert np.allclose(world.truth(elsewhere).spread(), spread) == (owner == "response")


def test_one_judge_of_a_divided_prompt_shows_nothing_of_the_division():
    world = PromptWorld(6, "prompt", dependence=1)
    x, _ = world.pairs(20, seed=0)
    mean = world.truth(x).mean()
    assert np.allclose(world.chance(x), 1 / (1 + np.exp(mean[:, 1] - mean[:, 0])))


def test_pairs_of_a_prompt_stand_together():
    x, _ = PromptWorld(0).pairs(7, seed=0, per_prompt=3)
    prompts = x[:, 0, :4]
    assert len(np.unique(prompts, axis=0)) == 3
    assert (prompts[:3] == prompts[0]).all() and (prompts[3:6] == prompts[3]).all()
    assert len(np.unique(x[..., 4:].reshape(-1, 4), axis=0)) == 14


def test_a_seed_is_a_world_of_every_kind():
    for kind, world in family(3).items():
        (x, p), (again, q) = (world.pairs(20, seed=1) for _ in range(2))
        assert np.array_equal(x, again) and np.array_equal(p, q)
        _, other = family(4)[kind].pairs(20, seed=1)
        assert np.array_equal(p, other) == (kind == "DPL's"), kind


def test_opposed_tastes_are_opposed():
    truth = OpposedWorld(3).truth(np.random.default_rng(0).normal(size=(4000, 8)))
    both = truth.means.mean(-1)
    taste = truth.means[:, 0] - both
    assert np.allclose(truth.means[:, 1] - both, -taste)
    assert abs(np.corrcoef(both, taste)[0, 1]) < 0.6 and 0.5 <= truth.weights[0, 0] <= 0.8


def test_the_divided_part_of_dpls_world():
    truth = DPLWorld().truth(np.array([[0.5], [0.8], [0.9]]))
    assert truth.means.tolist() == [[5, 5], [16, 0], [18, 0]]
    assert np.allclose(truth.mean(), [5, 8, 9]) and truth.spread()[1] > 10 > truth.spread()[0]


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: PromptWorld(dependence=-0.1), "dependence: -0.1 was given"),
        (lambda: OpposedWorld(dependence=1.5), "it is a probability"),
        (lambda: PromptWorld(owner="judge"), "owner: 'judge' is unknown"),
        (lambda: PromptWorld().pairs(4, seed=0, votes=0), "each pair needs at least one"),
    ],
)
def test_refusals(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


def test_refusals_are_sentences_for_people():
    with pytest.raises(InputError):
        DPLWorld(dependence=2)
