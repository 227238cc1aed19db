"""Bounds as functions of log-weights: formulas in numpy, corner cases, order, and expectations by enumeration."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax

from inference.bounds import CIWAE, MIWAE, PIWAE, Renyi
from inference.objectives import ELBO, IWAE
from inference.particles import Particles
from inference.thermodynamic import TVO
from tests.estimation import deviations, exact_thermodynamic, gradient_draws, log_evidence
from tests.gradient_cases import LIMIT

K, N = 6, 40


def draws_with(log_weight):
    """Particles of given log-weights, split into densities at random."""
    prior, q = torch.randn_like(log_weight), torch.randn_like(log_weight)
    return Particles(log_weight - prior + q, prior, q, {}, 1.0, True)


@pytest.fixture
def log_weight():
    return 3 * torch.randn(K, N) - 100


def value(objective, log_weight):
    return objective.from_particles(draws_with(log_weight))


def test_formulas(log_weight):
    w = log_weight.numpy()

    def mean(values):
        return logsumexp(values, axis=0) - math.log(len(values))

    boundaries = [0, 0.1, math.sqrt(0.1), 1]
    means = [np.sum(softmax(b * w, axis=0) * w, axis=0) for b in boundaries]
    widths = np.diff(boundaries)
    expected = {
        Renyi(0.3, K): mean(0.7 * w) / 0.7,
        Renyi(2.5, K): mean(-1.5 * w) / -1.5,
        Renyi(-1.0, K): mean(2 * w) / 2,
        Renyi(-math.inf, K): w.max(0),
        Renyi(math.inf, K): w.min(0),
        MIWAE(K, 3): np.mean([mean(w[i::3]) for i in range(3)], axis=0),
        CIWAE(0.3, K): 0.3 * w.mean(0) + 0.7 * mean(w),
        TVO(K, 3, first=0.1): sum(a * b for a, b in zip(widths, means[:-1], strict=True)),
        TVO(K, 3, first=0.1, side="right"): sum(a * b for a, b in zip(widths, means[1:], strict=True)),
    }
    for objective, numbers in expected.items():
        np.testing.assert_allclose(value(objective, log_weight), numbers, rtol=1e-10)


@pytest.mark.parametrize(
    ("objective", "same"),
    [
        (Renyi(0.0, K), IWAE(K)),
        (Renyi(1.0, K), ELBO(K)),
        (MIWAE(K, 1), IWAE(K)),
        (MIWAE(K, K), ELBO(K)),
        (CIWAE(0.0, K), IWAE(K)),
        (CIWAE(1.0, K), ELBO(K)),
        (PIWAE(K, 2), IWAE(K)),
        (TVO(K, 1), ELBO(K)),
    ],
)
def test_corner_cases(objective, same, log_weight):
    torch.testing.assert_close(value(objective, log_weight), value(same, log_weight), rtol=1e-12, atol=0)
    other = value(ELBO(K) if isinstance(same, IWAE) else IWAE(K), log_weight)
    assert (value(objective, log_weight) - other).abs().min() > 1e-3


def test_renyi_bounds_are_continuous_at_the_elbo_and_fall_with_their_order(log_weight):
    elbo = value(ELBO(K), log_weight)
    for sign in (-1, 1):
        near = value(Renyi(1 + sign * 1e-5, K), log_weight)
        torch.testing.assert_close(near, elbo, rtol=0, atol=1e-3)
        assert (sign * (elbo - near) > 0).all()
    orders = [-math.inf, -20.0, -2.0, 0.0, 0.5, 1.0, 3.0, 30.0, math.inf]
    values = torch.stack([value(Renyi(order, K), log_weight) for order in orders])
    assert (values.diff(dim=0) < 0).all()
    torch.testing.assert_close(value(Renyi(-1e4, K), log_weight), values[0], rtol=0, atol=1e-3)


def test_bounds_of_one_weight_are_that_weight():
    log_weight = torch.randn(1, N)
    for objective in (IWAE(1), Renyi(0.5, 1), Renyi(-math.inf, 1), MIWAE(1, 1), CIWAE(0.5, 1), TVO(1, 4)):
        torch.testing.assert_close(value(objective, log_weight), log_weight[0])


def test_equal_weights_make_every_bound_tight():
    log_weight = torch.full((K, N), -3.7)
    bounds = (ELBO(K), IWAE(K), Renyi(0.5, K), Renyi(5.0, K), MIWAE(K, 2), CIWAE(0.5, K), TVO(K), TVO(K, side="right"))
    for objective in bounds:
        torch.testing.assert_close(value(objective, log_weight), log_weight[0])


def test_weights_of_very_different_size_leave_values_and_gradients_finite():
    log_weight = torch.tensor([[-1e4], [0.0], [-5e3], [30.0]], dtype=torch.float32).requires_grad_()
    for objective in (Renyi(0.5, 4), Renyi(3.0, 4), MIWAE(4, 2), CIWAE(0.0, 4), TVO(4).float()):
        bound = objective.combine(log_weight).sum()
        assert bound.isfinite()
        assert torch.autograd.grad(bound, log_weight)[0].isfinite().all()
    for objective in (Renyi(0.5, 4), MIWAE(4, 2), CIWAE(0.0, 4)):
        assert objective.double_reparameterization(log_weight.detach()).isfinite().all()


@pytest.mark.parametrize("objective", [IWAE(K), Renyi(0.3, K), Renyi(-1.0, K), MIWAE(K, 2), CIWAE(0.3, K)])
def test_double_reparameterization_is_one_minus_the_relative_change_of_a_derivative(objective, log_weight):
    """The factor, from the second derivative of the bound in each log-weight, taken by automatic differentiation."""
    log_weight.requires_grad_()
    (first,) = torch.autograd.grad(objective.combine(log_weight).sum(), log_weight, create_graph=True)
    second = torch.stack(
        [torch.autograd.grad(row.sum(), log_weight, retain_graph=True)[0][k] for k, row in enumerate(first)]
    )
    expected = 1 - second / first
    found = objective.double_reparameterization(log_weight.detach())
    torch.testing.assert_close(found, expected.detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["bits", "normal"])
def test_the_thermodynamic_sums_lie_on_either_side_of_log_p(kind):
    boundaries = [0.0, *(10 ** (i / 4 - 1) for i in range(4)), 1.0]
    widths = np.diff(boundaries).tolist()
    left = float(exact_thermodynamic(kind, boundaries[:-1], widths)["value"])
    right = float(exact_thermodynamic(kind, boundaries[1:], widths)["value"])
    elbo = float(exact_thermodynamic(kind, [0.0], [1.0])["value"])
    assert elbo < left < log_evidence(kind) < right
    for side, truth in (("left", left), ("right", right)):
        draws = gradient_draws(TVO(2000, 5, first=0.1, side=side), kind, 200)["value"]
        assert deviations(draws, truth) < LIMIT
        assert deviations(draws, elbo) > 2 * LIMIT


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Renyi(math.nan), "alpha must be a number"),
        (lambda: MIWAE(64, 5), "groups must divide the 64 particles"),
        (lambda: CIWAE(1.5), r"weight must lie in \[0, 1\]"),
        (lambda: TVO(first=1.0), "first must lie between 0 and 1"),
        (lambda: TVO(partitions=0), "partitions must be at least 1"),
        (lambda: TVO(side="both"), "'left' or 'right', got 'both'"),
        (lambda: PIWAE(6, 4), "groups must divide"),
    ],
)
def test_bad_options_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()
