"""A posterior with two modes under a guide with one, and what a prior that is trained gains: both by quadrature."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm

from guides.amortized import Amortized
from guides.gaussian import Unconditional
from inference.objectives import ELBO
from inference.particles import particles
from models.latent import LatentVariableModel
from models.likelihoods import FixedGaussian
from models.priors import MixturePrior, StandardNormal
from tests import brute_force
from tests.models.test_prior_gain import parts_by_quadrature, scalar_pair
from tests.prior_cases import posterior_parameters
from tests.programs import at


class Square(torch.nn.Module):
    """x = z^2, which z and -z explain alike."""

    def __init__(self, *shapes):
        super().__init__()

    def forward(self, z):
        return z.square()


GRID = np.linspace(-6, 6, 4001)
STEP = GRID[1] - GRID[0]


@pytest.mark.row("4.28")
def test_the_gap_of_a_unimodal_guide_is_its_divergence_from_two_modes():
    model = LatentVariableModel(StandardNormal((1,)), FixedGaussian((1,), (1,), Square, scale=0.5))
    x, core = torch.tensor([[1.5]]), Unconditional((1,), (1,))
    guide = Amortized(core)
    log_joint = norm.logpdf(GRID) + norm.logpdf(1.5, GRID**2, 0.5)
    log_p = logsumexp(log_joint) + math.log(STEP)
    posterior = np.exp(log_joint - log_p)
    assert posterior[2000] < 0.1 * posterior.max()  # two modes
    with torch.no_grad():
        core.loc.fill_(0.3)
    optimizer = torch.optim.Adam(core.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (-ELBO(20)(model, guide, x).mean()).backward()
        optimizer.step()
    loc, scale = core.loc.item(), core.log_scale.exp().item()
    log_q = norm.logpdf(GRID, loc, scale)
    gap = np.sum(np.exp(log_q) * (log_q - log_joint + log_p)) * STEP
    draws = particles(model, at(guide, z=torch.tensor(GRID)[:, None, None]), x, len(GRID))
    weights = draws.log_q.exp() * STEP
    bound = (weights * (draws.log_likelihood + draws.log_prior - draws.log_q)).sum().item()
    assert log_p - bound == pytest.approx(gap, abs=1e-8)
    assert abs(abs(loc) - math.sqrt(1.5)) < 0.3  # it has found one mode
    assert gap == pytest.approx(math.log(2), abs=0.1)  # and pays for the other, which holds one half
    mixture = np.logaddexp(norm.logpdf(GRID, loc, scale), norm.logpdf(GRID, -loc, scale)) - math.log(2)
    assert np.sum(np.exp(mixture) * (mixture - log_joint + log_p)) * STEP < 0.1  # two modes would lose next to nothing


@pytest.mark.row("4.26", "4.31")
def test_a_trained_prior_gains_what_the_marginal_kl_falls():
    """Guide and decoder held, a mixture is fitted: bound up, marginal KL down by as much, information untouched."""
    torch.manual_seed(0)
    x = torch.randn(12, 2)
    prior = MixturePrior((1,), components=3)
    model, guide = scalar_pair(prior, x)
    loc, scale = posterior_parameters(guide, x)
    z = np.linspace(-9, 9, 20_001)
    log_aggregate = logsumexp(norm.logpdf(z[:, None], loc[:, 0], scale[:, 0]), axis=1) - math.log(12)

    def marginal_kl():
        with torch.no_grad():
            log_p = prior().log_prob(torch.tensor(z)[:, None]).numpy()
        return np.sum(np.exp(log_aggregate) * (log_aggregate - log_p)) * (z[1] - z[0])

    def bound():
        with torch.no_grad():
            reconstruction, log_prior, negative_entropy = parts_by_quadrature(model, guide, x)
        return (reconstruction + log_prior - negative_entropy).item(), (negative_entropy - log_prior).item()

    (start, start_kl), start_marginal = bound(), marginal_kl()
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        (-ELBO(8)(model, guide, x).mean()).backward()
        optimizer.step()
    (end, end_kl), end_marginal = bound(), marginal_kl()
    assert start_marginal > 0.05
    assert end_marginal < 0.5 * start_marginal
    assert end - start == pytest.approx(start_marginal - end_marginal, abs=1e-8)
    information = brute_force.scalar_surgery(loc[:, 0], scale[:, 0])[1]
    for kl, marginal in ((start_kl, start_marginal), (end_kl, end_marginal)):
        assert kl - marginal == pytest.approx(information, abs=1e-6)
