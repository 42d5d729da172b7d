"The objectives: values worked by hand, finite gradients, divided votes, and what is refused."

import math

import pytest
import torch

from qr_rlhf.losses import (
    OBJECTIVES,
    PURM,
    CategoricalDPL,
    DistributionalObjective,
    NormalDPL,
    Objective,
    PaperObjective,
    bradley_terry,
    distributional_bradley_terry,
    quantile_huber,
)
from qr_rlhf.model import normal_quantiles

PAPER = [
    PaperObjective(),
    PaperObjective(target="shift"),
    PaperObjective(kappa=0.0),
    PaperObjective(target="own"),
    PaperObjective(link="distributional"),
    PaperObjective(kappa=0.1, target="shift", link="distributional"),
]
OURS = [DistributionalObjective(), DistributionalObjective(family="free")]
PEERS = [PURM(), NormalDPL(), CategoricalDPL()]


def pairs(objective, seed=0):
    "Outputs for six pairs, chosen and rejected."
    two = isinstance(objective, PURM) or getattr(objective, "family", "") == "normal"
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 6, 2 if two else 10, generator=generator)


def test_bradley_terry_by_hand():
    loss = bradley_terry(torch.tensor([0.0, 2.0, -1e30]), torch.tensor([0.0, 0.0, 1e30]))
    assert torch.allclose(loss, torch.tensor([math.log(2), math.log(1 + math.exp(-2)), 2e30]))


def test_quantile_huber_by_hand():
    quantiles = torch.tensor([[0.0, 1.5]])
    one, other = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    several = quantile_huber(quantiles, torch.cat([one, other], -1))
    apart = quantile_huber(quantiles, one) + quantile_huber(quantiles, other)
    assert torch.isclose(several, apart / 2)
    sharp = quantile_huber(quantiles, one, kappa=0.1)  # beyond κ, κ(|u| − κ/2)/κ = |u| − κ/2
    assert math.isclose(sharp, (1 / 4 * 1.95 + 3 / 4 * 0.45) / 2, rel_tol=1e-6)


def test_paper_objective_is_the_sum_of_its_parts():
    chosen, rejected = pairs(PaperObjective())
    plain = PaperObjective(target="none")
    one = chosen[:, :1], rejected[:, :1]
    assert torch.isclose(plain(*one), bradley_terry(chosen[:, 0], rejected[:, 0]).mean())
    one = torch.ones(6, 1)
    label = quantile_huber(chosen, one) + quantile_huber(rejected, -one)
    total = plain(chosen, rejected) + 3 * label.mean() / 2
    assert torch.isclose(PaperObjective(weight=3.0)(chosen, rejected), total)


def test_shift_target_holds_chosen_one_margin_above():
    shift, plain = PaperObjective(target="shift"), PaperObjective(target="none")
    chosen, _ = pairs(shift)

    def regression(distance):
        rejected = chosen - distance
        return shift(chosen, rejected) - plain(chosen, rejected)

    assert regression(1) < regression(5)


def test_own_target_pulls_the_chosen_quantiles_to_their_mean():
    own, plain = PaperObjective(target="own", weight=10.0), PaperObjective(target="none")
    chosen, rejected = pairs(own)
    mean = chosen.mean(-1, keepdim=True)
    total = plain(chosen, rejected) + 10 * quantile_huber(chosen, mean).mean()
    assert torch.isclose(own(chosen, rejected), total)
    equal = mean.expand_as(chosen)
    assert torch.isclose(own(equal, rejected), plain(equal, rejected))


def test_distributional_objective_uses_the_quantiles_of_the_family():
    agreed, divided = torch.tensor([[0.0, -3.0]]), torch.tensor([[0.0, 1.0]])
    quantiles = normal_quantiles(divided, 10), normal_quantiles(agreed, 10)
    loss = DistributionalObjective(pool=0.0)(divided, agreed)
    assert torch.isclose(loss, distributional_bradley_terry(*quantiles).mean())
    free = DistributionalObjective(family="free")
    chosen, rejected = pairs(free)
    shuffled = chosen[:, torch.randperm(10)]
    assert torch.isclose(free(chosen, rejected), free(shuffled, rejected))
    assert (free.quantiles(chosen).diff(dim=-1) >= 0).all()


def test_the_pool_is_the_variance_of_log_s():
    chosen, rejected = pairs(DistributionalObjective())
    pooled, plain = DistributionalObjective(pool=1.0), DistributionalObjective(pool=0.0)
    difference = pooled(chosen, rejected) - plain(chosen, rejected)
    assert torch.isclose(difference, torch.cat([chosen[:, 1], rejected[:, 1]]).var())


def test_hold_is_the_mean_square_of_log_s():
    chosen, rejected = pairs(DistributionalObjective())
    held, plain = DistributionalObjective(hold=1.0), DistributionalObjective()
    difference = held(chosen, rejected) - plain(chosen, rejected)
    assert torch.isclose(difference, torch.cat([chosen[:, 1], rejected[:, 1]]).square().mean())


def test_with_the_mean_link_votes_leave_the_spread_alone():
    chosen, rejected = (
        outputs.requires_grad_() for outputs in pairs(DistributionalObjective())
    )
    loss = DistributionalObjective(link="mean")(chosen, rejected)
    loss.backward()
    assert torch.isclose(loss, bradley_terry(chosen[:, 0], rejected[:, 0]).mean())
    for outputs in (chosen, rejected):
        assert outputs.grad[:, 0].abs().min() > 1e-3 and outputs.grad[:, 1].abs().max() < 1e-6


def test_peers_against_what_defines_them():
    a, b = torch.tensor([0.8, math.log(2.0)]), torch.tensor([0.0, math.log(0.5)])
    for peer in (PURM(), NormalDPL()):
        both = peer.log_win(a, b).exp() + peer.log_win(b, a).exp()
        assert torch.isclose(both, torch.tensor(1.0))
    chosen, rejected = pairs(CategoricalDPL())
    joint = chosen.softmax(-1)[:, :, None] * rejected.softmax(-1)[:, None, :]
    by_hand = joint.tril(-1).sum((1, 2)) + joint.diagonal(dim1=1, dim2=2).sum(-1) / 2
    assert torch.allclose(CategoricalDPL().log_win(chosen, rejected).exp(), by_hand, atol=1e-6)
    even = CategoricalDPL().quantiles(torch.zeros(10))
    assert torch.allclose(even, (torch.arange(10) + 0.5) / 10, atol=1e-6)


@pytest.mark.parametrize("objective", PAPER + OURS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e4, 1e30])
def test_extreme_rewards_have_finite_losses_and_gradients(objective, dtype, size):
    outputs = [(x * size).to(dtype).requires_grad_() for x in pairs(objective)]
    if getattr(objective, "family", "") == "normal" and size == 1e30:
        loss = objective.pair_loss(*outputs).mean()  # such a variance is no float32
    else:
        loss = objective(*outputs)
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.float32
    assert all(x.grad.isfinite().all() for x in outputs)


@pytest.mark.parametrize("objective", PEERS, ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_peers_have_finite_gradients_and_ordered_quantiles(objective, size):
    outputs = [(x * size).requires_grad_() for x in pairs(objective)]
    objective(*outputs).backward()
    assert all(x.grad.isfinite().all() for x in outputs)
    assert (objective.quantiles(outputs[0].detach()).diff(dim=-1) >= -1e-4).all()


@pytest.mark.parametrize("objective", PAPER[:2] + OURS + PEERS, ids=str)
def test_divided_votes_and_networks_side_by_side(objective):
    chosen, rejected = pairs(objective)
    alone, turned = objective(chosen, rejected), objective(rejected, chosen)
    assert torch.isclose(objective(chosen, rejected, torch.ones(6)), alone)
    half = torch.full((6,), 0.5)
    assert torch.isclose(objective(chosen, rejected, half), objective(rejected, chosen, half))
    side_by_side = torch.stack([chosen, rejected]), torch.stack([rejected, chosen])
    assert torch.isclose(objective(*side_by_side), (alone + turned) / 2)


def test_every_named_objective_takes_its_number_of_outputs():
    for objective, outputs in OBJECTIVES.values():
        chosen, rejected = torch.randn(2, 6, outputs)
        assert objective(chosen, rejected).isfinite()
        assert objective.quantiles(chosen).shape == (6, 1 if outputs == 1 else 10)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (PaperObjective, dict(target="labels"), "choose one of label"),
        (PaperObjective, dict(link="median"), "choose one of mean"),
        (PaperObjective, dict(kappa=-1), "neither may be negative"),
        (PaperObjective, dict(weight=-1), "neither may be negative"),
        (DistributionalObjective, dict(family="wide"), "choose one of normal"),
        (DistributionalObjective, dict(pool=-1), "neither may be negative"),
        (DistributionalObjective, dict(hold=-1), "neither may be negative"),
        (DistributionalObjective, dict(hold=1, family="free"), "needs the family normal"),
        (DistributionalObjective, dict(link="median"), "choose one of mean"),
    ],
)
def test_wrong_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize("link", [None, "probit"])
def test_a_class_without_a_known_link_needs_its_own_chance(link):
    class Mine(Objective):
        pass

    mine = Mine()
    mine.link = link
    with pytest.raises(NotImplementedError, match=f"Mine: the link is {link!r}; give it"):
        mine(torch.zeros(2, 3), torch.ones(2, 3))
