"What a model doesn't know: measures of bounds, and the posterior of the last layer."

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from qr_rlhf.bounds import (
    Bounds,
    best_precision,
    bound_error,
    fit_laplace,
    head_inputs,
    head_weights,
    log_odds,
    margin,
    measure_bounds,
    seed_bounds,
)
from qr_rlhf.formats import InputError
from qr_rlhf.losses import OBJECTIVES
from qr_rlhf.model import load_reward_model, tiny_gpt2, train_tokenizer
from qr_rlhf.training import rewards_table, score_pairs

SCALAR = OBJECTIVES["scalar"][0]


def some_bounds(n=300, seed=0):
    rng = np.random.default_rng(seed)
    middle, below, above = rng.normal(size=n), *rng.uniform(0, 1.5, (2, n))
    return Bounds(middle, middle - below, middle + above)


def test_four_pairs_by_hand():
    middle = np.array([2.0, -2.0, 0.0, 0.5])
    measures = measure_bounds(Bounds(middle, middle - 1, middle + 1))
    assert measures["accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert measures["confident_true"] == measures["confident_false"] == 1 / 4


def test_a_weight_is_a_repetition():
    bounds, weights = some_bounds(), np.random.default_rng(1).integers(0, 5, 300)
    repeated = Bounds(*(np.repeat(part, weights) for part in bounds))
    weighted = measure_bounds(bounds, weights)
    assert weighted == pytest.approx(measure_bounds(repeated))
    assert weighted["bound_error"] != pytest.approx(measure_bounds(bounds)["bound_error"])


def cost_of_upper(bounds, bins):
    "The upper bounds' error, from its definition, bin by bin."
    upper = expit(np.concatenate([bounds.high, -bounds.low]))
    won, cost = np.repeat([1, 0], len(bounds.low)), 0
    for k in range(bins):
        here = (upper >= k / bins) & (upper < (k + 1) / bins)
        if here.any():
            cost += here.sum() * max(won[here].mean() - upper[here].mean(), 0)
    return cost / len(won)


def test_lower_and_upper_bounds_err_alike():
    bounds = some_bounds()
    assert bound_error(bounds, np.ones(300), 10) == pytest.approx(cost_of_upper(bounds, 10))
    assert bound_error(bounds, np.ones(300), 10) > 0.001


def test_wide_bounds_are_never_wrong_and_never_confident():
    middle = some_bounds().middle
    measures = measure_bounds(Bounds(middle, middle - 99, middle + 99))
    assert measures["bound_error"] < 1e-9
    assert measures["confident_true"] == measures["confident_false"] == 0


def table_of(quantiles, seed):
    return rewards_table(np.asarray(quantiles, float), "quantile", seed)


def test_bounds_from_a_rewards_table():
    ten = np.arange(10) - 4.5
    over = pd.concat([table_of([[ten + k, ten]], seed) for seed, k in enumerate((1, 3))])
    assert np.allclose(seed_bounds(over, 2)["quantile"], [[2], [2 - 8**0.5], [2 + 8**0.5]])
    with pytest.raises(InputError, match="give two or more"):
        seed_bounds(table_of([[ten, ten]], 0))


def logistic(n=400, d=5, seed=0):
    "Features of pairs `[n, 2, d]` whose first response was chosen."
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(n, 2, d)), rng.normal(size=d)
    first_wins = rng.random(n) < expit((x[:, 0] - x[:, 1]) @ w)
    return np.where(first_wins[:, None, None], x, x[:, ::-1])


def test_laplace_is_the_textbooks():
    x = logistic()
    difference = x[:, 0] - x[:, 1]

    def cost(w):
        return -log_expit(difference @ w).sum() + w @ w  # precision 2

    w = minimize(cost, np.zeros(5), tol=1e-10).x
    step = 1e-3 * np.eye(5)
    hessian = [
        [
            (cost(w + a + b) - cost(w + a - b) - cost(w - a + b) + cost(w - a - b)) / 4e-6
            for b in step
        ]
        for a in step
    ]
    found = fit_laplace(SCALAR, torch.tensor(w[None]), torch.tensor(x), precision=2.0)
    assert np.allclose(found.covariance, np.linalg.inv(hessian), rtol=1e-3, atol=1e-5)


def test_posterior_shrinks_like_one_over_n():
    x, w = torch.tensor(logistic()), torch.ones(1, 5)
    once, thrice = (fit_laplace(SCALAR, w, x.repeat(k, 1, 1), precision=1e-10) for k in (1, 3))
    voted = fit_laplace(SCALAR, w, x, torch.full((400,), 3), precision=1e-10)
    assert torch.allclose(once.covariance / 3, thrice.covariance, rtol=1e-5)
    assert torch.allclose(voted.covariance, thrice.covariance, rtol=1e-9)


@pytest.mark.parametrize("name", ["purm", "distributional", "dpl_normal", "paper"])
def test_information_of_any_objective(name):
    "Each vote's information is p(1 − p)·v vᵀ, its slope v here by finite differences."
    objective, outputs = OBJECTIVES[name]
    x = torch.tensor(logistic(n=30, d=3))
    w = 0.3 * torch.randn(outputs, 3, generator=torch.Generator().manual_seed(0)).double()

    def odds(weights):
        return log_odds(objective, x @ weights.T)

    steps = 1e-2 * torch.eye(3 * outputs).double().reshape(-1, outputs, 3)
    slopes = torch.stack([(odds(w + e) - odds(w - e)) / 2e-2 for e in steps], 1).double()
    worth = torch.sigmoid(odds(w)) * torch.sigmoid(-odds(w))
    information = slopes.T @ (worth.double()[:, None] * slopes)
    expected = torch.linalg.inv(information + torch.eye(len(information)))
    found = fit_laplace(objective, w, x, precision=1.0).covariance
    assert torch.allclose(found, expected, atol=5e-3)
    assert not torch.allclose(found, torch.eye(len(found)).double(), atol=0.05)


def test_deviation_is_that_of_drawn_weights():
    objective, outputs = OBJECTIVES["purm"]
    x, w = torch.tensor(logistic(d=3)), torch.ones(outputs, 3).double() / 4
    posterior = fit_laplace(objective, w, x)
    normal = torch.distributions.MultivariateNormal(w.flatten(), posterior.covariance)
    torch.manual_seed(0)
    drawn = normal.sample((4000,)).unflatten(1, w.shape)
    margins = torch.stack([margin(objective, x[:20] @ one.T) for one in drawn])
    value, deviation = posterior.read(margin, x[:20])
    assert np.allclose(margins.std(0), deviation, rtol=0.06)
    bounds = posterior.bounds(x[:20], width=2)
    assert np.allclose(bounds.high - bounds.low, 4 * deviation)
    assert np.allclose(bounds.middle, value)


def test_precision_maximises_the_marginal_likelihood():
    x = logistic()
    difference = torch.tensor(x[:, 0] - x[:, 1])
    information, w = difference.T @ difference / 5, torch.full((1, 5), 0.7).double()

    def evidence(precision):
        total = information + precision * torch.eye(5)
        return 2.5 * np.log(precision) - precision * 1.225 - torch.logdet(total) / 2

    best = best_precision(information, w)
    assert evidence(best) > max(evidence(best * 0.9), evidence(best * 1.1))


@pytest.mark.parametrize("family, n", [(None, 3), ("normal", 10)])
def test_inputs_times_weights_are_the_models_outputs(tmp_path, family, n):
    texts = ["\n\nHuman: Why?\n\nAssistant: Because it rains.", "No idea at all."]
    tokenizer = train_tokenizer(texts, vocab_size=280)
    size = dict(n_layer=1, n_embd=16, n_head=2, seed=0)
    tiny_gpt2(tokenizer, max_length=64, **size).save_pretrained(tmp_path)
    model = load_reward_model(tmp_path, tokenizer, n=n, family=family)
    rng = np.random.default_rng(0)
    rows = [
        {k: rng.integers(5, 200, rng.integers(3, 9)).tolist() for k in COLUMNS}
        for _ in range(7)
    ]
    pairs = Dataset.from_list(rows)
    found = head_inputs(model, tokenizer, pairs, batch_size=3) @ head_weights(model).T
    quantiles = OBJECTIVES["purm"][0].quantiles(found) if family else found
    scored = score_pairs(model, tokenizer, pairs, disable_tqdm=True)
    assert np.allclose(quantiles, scored, atol=1e-5)
    assert head_inputs(model, tokenizer, pairs.select([4])).shape == (1, 2, 16)


COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]


def test_a_bias_of_the_head_is_a_weight():
    head = torch.nn.Linear(4, 2)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.config = head, type("Config", (), dict(num_labels=2))

    weights = head_weights(Model())
    assert weights.shape == (2, 5) and torch.allclose(weights[:, 4].float(), head.bias)
