"""A learned prior is worth the fall of the marginal KL, no more and no less."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp
from scipy.stats import norm

from inference.objectives import ELBO
from inference.particles import particles
from models.flow_prior import CouplingPrior
from models.latent import LatentVariableModel
from models.priors import MixturePrior, StandardNormal
from models.vamp import AggregatedPosterior
from tests import brute_force, oracles
from tests.prior_cases import pair, perturbed, posterior_parameters
from tests.programs import at

GRID = torch.linspace(-9, 9, 3001, dtype=torch.float64)


def scalar_pair(prior, x):
    """One scalar latent per datum whose posteriors lie well inside of ``GRID``."""
    model, guide = pair(prior, x)
    with torch.no_grad():
        guide.core.net.output.weight[1].mul_(0.2)
        guide.core.net.output.bias[1].fill_(-0.7)
        model.likelihood.net.output.weight.normal_()
    return model, guide


def parts_by_quadrature(model, guide, x):
    """Means over the data of reconstruction, E_q log p(z) and negative entropy of q, by the trapezoidal rule."""
    z = GRID[:, None, None].expand(len(GRID), len(x), 1)
    draws = particles(model, at(guide, z=z), x, len(GRID))
    q = draws.log_q.exp() * (GRID[1] - GRID[0])
    assert torch.allclose(q.sum(0), torch.ones(len(x)), atol=1e-12)
    return [(q * part).sum(0).mean() for part in (draws.log_likelihood, draws.log_prior, draws.log_q)]


@pytest.mark.row("4.27", "4.31")
def test_the_best_prior_is_the_aggregated_posterior_and_its_gain_the_old_marginal_kl():
    x = torch.randn(12, 2)
    aggregated, guide = scalar_pair(AggregatedPosterior((1,), (2,)), x)
    standard = LatentVariableModel(StandardNormal((1,)), aggregated.likelihood)
    with torch.no_grad():
        (reconstruction, before, entropy), (same, after, _) = (
            parts_by_quadrature(model, guide, x) for model in (standard, aggregated)
        )
        loc, scale = posterior_parameters(guide, x)
        kl, information, marginal = brute_force.scalar_surgery(loc[:, 0], scale[:, 0])
        assert marginal > 0.05
        assert (entropy - before).item() == pytest.approx(kl, abs=1e-8)
        assert reconstruction == same
        assert (after - before).item() == pytest.approx(marginal, abs=1e-8)  # what the ELBO gains
        assert (entropy - after).item() == pytest.approx(information, abs=1e-8)  # the KL that is left: marginal KL 0
        # Any other prior gains less.
        fitted = aggregated.prior().log_prob(GRID[:, None])
        for _ in range(5):
            other = perturbed(MixturePrior((1,)))().log_prob(GRID[:, None])
            assert (fitted.exp() * other).sum() < (fitted.exp() * fitted).sum()


@pytest.mark.row("4.26", "4.31")
def test_the_gradient_in_the_prior_is_that_of_the_marginal_kl():
    x = torch.randn(12, 2)
    model, guide = scalar_pair(perturbed(MixturePrior((1,), components=3)), x)
    reconstruction, log_prior, negative_entropy = parts_by_quadrature(model, guide, x)
    prior = list(model.prior.parameters())
    for untouched in (reconstruction, negative_entropy):
        assert torch.autograd.grad(untouched, prior, retain_graph=True, allow_unused=True) == (None,) * 3
    elbo = reconstruction + log_prior - negative_entropy
    found = torch.cat([g.flatten() for g in torch.autograd.grad(elbo, prior)]).numpy()
    loc, scale = posterior_parameters(guide, x)
    z = GRID.numpy()[:, None]
    log_aggregate = logsumexp(norm.logpdf(z, loc[:, 0], scale[:, 0]), axis=1) - math.log(12)

    def marginal_kl(flat):
        logits, mean, log_scale = flat.reshape(3, 3)
        log_p = logsumexp(norm.logpdf(z, mean, np.exp(log_scale)) + log_softmax(logits), axis=1)
        return np.sum(np.exp(log_aggregate) * (log_aggregate - log_p)) * (GRID[1] - GRID[0]).item()

    flat = torch.cat([p.detach().flatten() for p in prior]).numpy()
    steps = 1e-5 * np.eye(len(flat))
    slope = np.array([(marginal_kl(flat + s) - marginal_kl(flat - s)) / 2e-5 for s in steps])
    assert np.abs(slope).max() > 0.01
    assert np.allclose(found, -slope, atol=1e-6)


def crescents(count):
    """Two crescents in the plane, as data and latents at once."""
    angle = math.pi * torch.rand(count)
    upper = torch.randint(2, (count,)).double() * 2 - 1
    points = torch.stack([angle.cos() - 0.5 * upper, upper * (angle.sin() - 0.3)], -1)
    return 1.5 * points + 0.1 * torch.randn(count, 2)


def narrow_pair(prior, x):
    """A fixed encoder and decoder, near the identity, with posteriors of scale 0.1: only the prior is to be found."""
    model, guide = pair(prior, x)
    with torch.no_grad():
        guide.core.net.output.weight.copy_(torch.eye(4, 2))
        guide.core.net.output.bias.copy_(torch.tensor([0.0, 0.0, -2.3, -2.3]))
        model.likelihood.net.output.weight.copy_(torch.eye(2))
    return model, guide


@pytest.mark.row("4.30")
def test_the_aggregated_posterior_overfits_and_costs_a_pass_over_its_data():
    """N(0, I) is too narrow-minded, the aggregated posterior of the training data too sure of them."""
    x, held_out = crescents(40), crescents(400)
    flow, (standard, _), (aggregated, guide) = (
        CouplingPrior((2,), hidden=(16,)),
        narrow_pair(StandardNormal((2,)), x),
        narrow_pair(AggregatedPosterior((2,), (2,)), x),
    )
    learned = LatentVariableModel(flow, standard.likelihood)
    objective = ELBO(particles=200)

    def bounds(model):
        with torch.no_grad():
            return torch.stack([objective(model, guide, some).mean() for some in (x, held_out)])

    untrained = bounds(learned)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        (-ELBO(particles=4)(learned, guide, x).mean()).backward()
        optimizer.step()
    of_flow, of_standard, of_aggregate = bounds(learned), bounds(standard), bounds(aggregated)
    gap = {"flow": of_flow[0] - of_flow[1], "aggregate": of_aggregate[0] - of_aggregate[1]}
    assert (untrained - of_standard).abs().max() < 0.05
    assert (of_flow > of_standard + 0.1).all()  # on training and held-out data
    assert of_aggregate[0] > of_flow[0] > of_standard[0]
    assert gap["aggregate"] > gap["flow"] + 0.2
    rows = []
    guide.core.net.register_forward_hook(lambda net, args, out: rows.append(len(args[0])))
    ELBO(max_plate_nesting=1)(aggregated, guide, held_out[:10])
    assert rows == [10, 40]  # one pass over the batch, and one over all data for the prior
    rows.clear()
    ELBO(max_plate_nesting=1)(learned, guide, held_out[:10])
    assert rows == [10]


def test_quadrature_agrees_with_the_closed_form():
    x = torch.randn(12, 2)
    model, guide = scalar_pair(StandardNormal((1,)), x)
    with torch.no_grad():
        _, log_prior, negative_entropy = parts_by_quadrature(model, guide, x)
    loc, scale = posterior_parameters(guide, x)
    expected = np.mean([oracles.diagonal_kl(m, s) for m, s in zip(loc, scale, strict=True)])
    assert (negative_entropy - log_prior).item() == pytest.approx(expected, abs=1e-10)
