"""Diagonal Gaussians: their divergences, and what a prior's location and scale are worth."""

import copy

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import kl_divergence

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal, Unconditional
from models.likelihoods import FixedGaussian
from models.nets import MLP, Linear
from models.priors import LearnedNormal, StandardNormal
from tests import oracles


def random_core(dim=3):
    core = DiagonalNormal((dim,), (5,), MLP)
    with torch.no_grad():
        core.net.output_bias.copy_(torch.randn(2 * dim) / 2)
    return core


def moments(made):
    return made.mean.detach().numpy(), made.stddev.detach().numpy()


def test_one_net_gives_means_and_log_standard_deviations():
    core, x = random_core(), torch.randn(6, 5)
    output = core.net(x)
    made = core(x)
    assert torch.allclose(made.mean, output[:, :3])
    assert torch.allclose(made.stddev.log(), output[:, 3:])
    z = made.sample()
    by_hand = stats.norm.logpdf(z, *moments(made)).sum(1)
    assert np.allclose(made.log_prob(z).detach(), by_hand, atol=1e-10)


def test_images_keep_their_channels_together():
    core = DiagonalNormal((2, 3, 4), (5,), Linear)
    x = torch.randn(6, 5)
    made, output = core(x), core.net(x)
    assert torch.equal(made.mean, output[:, :2])
    assert torch.allclose(made.stddev.log(), output[:, 2:])


def test_unconditional_is_blind():
    core = Unconditional((3,), (5,))
    with torch.no_grad():
        core.loc.normal_()
        core.log_scale.normal_()
    guide, x = Amortized(core), torch.randn(6, 5)
    assert guide(x).shape == (6, 3)
    assert torch.equal(core(x).mean, core(torch.randn(6, 5)).mean)
    assert core(x).batch_shape == ()
    assert torch.equal(core(x).stddev, core.log_scale.exp())


@pytest.mark.row("0.5", "4.2")
def test_one_call_serves_a_batch_with_parameters_that_do_not_grow():
    core = random_core()
    guide = Amortized(core)
    calls = []
    core.net.register_forward_hook(lambda *_: calls.append(1))
    count = sum(parameter.numel() for parameter in guide.parameters())
    for size in (1, 7, 100):
        assert guide(torch.randn(size, 5)).shape == (size, 3)
    assert len(calls) == 3
    assert sum(parameter.numel() for parameter in guide.parameters()) == count


@pytest.mark.row("0.8", "1.16", "2.14")
def test_kl_to_the_standard_normal_is_every_other_form_of_it():
    q = random_core()(torch.randn(6, 5))
    kl = kl_divergence(q, StandardNormal((3,))()).detach()
    for value, loc, scale in zip(kl, *moments(q), strict=True):
        assert value.item() == pytest.approx(oracles.diagonal_kl(loc, scale), abs=1e-10)
        assert value.item() == pytest.approx(oracles.gaussian_kl(loc, np.diag(scale**2)), abs=1e-10)
        assert value.item() != pytest.approx(oracles.diagonal_kl(loc, scale**2), abs=1e-2)


def standard_log_density(z):
    return StandardNormal((1,))().log_prob(torch.tensor(z)[:, None]).numpy()


@pytest.mark.row("1.16")
def test_both_integrals_of_the_kl_separately():
    q, prior = random_core()(torch.randn(6, 5)), StandardNormal((3,))()
    for i, (loc, scale) in enumerate(zip(*moments(q), strict=True)):
        cross = oracles.standard_normal_expectation(loc, scale)
        entropy = q.entropy()[i].item()
        assert -entropy == pytest.approx(oracles.negative_entropy(scale), abs=1e-10)
        assert kl_divergence(q, prior)[i].item() == pytest.approx(-entropy - cross, abs=1e-10)
        # The prior's log-density is a sum over dimensions: each takes a one-dimensional quadrature.
        parts = [oracles.normal_expectations(standard_log_density, m, s) for m, s in zip(loc, scale, strict=True)]
        assert sum(parts) == pytest.approx(cross, abs=1e-10)


@pytest.mark.row("0.8", "1.16")
def test_kl_in_one_dimension_by_quadrature():
    q = random_core(dim=1)(torch.randn(4, 5))
    kl = kl_divergence(q, StandardNormal((1,))()).detach()
    for value, (loc,), (scale,) in zip(kl, *moments(q), strict=True):

        def integrand(z, loc=loc, scale=scale):
            log_q = stats.norm.logpdf(z, loc, scale)
            return np.exp(log_q) * (log_q - stats.norm.logpdf(z))

        found, _ = integrate.quad(integrand, loc - 12 * scale, loc + 12 * scale, epsabs=1e-12, epsrel=1e-12)
        assert value.item() == pytest.approx(found, abs=1e-10)


@pytest.mark.row("0.8", "0.10")
def test_kl_is_the_average_log_ratio_of_draws():
    q, prior, count = random_core()(torch.randn(5)), StandardNormal((3,))(), 1_000_000
    with torch.no_grad():
        z = q.sample((count,))
        ratio = q.log_prob(z) - prior.log_prob(z)
    standard_error = ratio.std() / count**0.5
    kl = kl_divergence(q, prior)
    assert (ratio.mean() - kl).abs() < 4 * standard_error
    assert (ratio.mean() - kl_divergence(dist.Normal(q.mean, q.variance).to_event(1), prior)).abs() > 4 * standard_error


@pytest.mark.row("2.14")
@pytest.mark.parametrize("learned", [False, True])
def test_kl_of_a_full_covariance(learned):
    prior = LearnedNormal((3,)) if learned else StandardNormal((3,))
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_()
    loc, root = torch.randn(4, 3), torch.randn(4, 3, 3)
    covariance = root @ root.mT + 0.2 * torch.eye(3)
    q, p = dist.MultivariateNormal(loc, covariance), prior()
    kl = kl_divergence(q, p)
    p_loc, p_scale = moments(p)
    for value, m, s in zip(kl, loc.numpy(), covariance.numpy(), strict=True):
        assert value.item() == pytest.approx(oracles.gaussian_kl(m, s, p_loc, np.diag(p_scale**2)), abs=1e-10)
    full = torch.distributions.MultivariateNormal(p.mean, torch.diag(p.variance))
    assert torch.allclose(kl, kl_divergence(torch.distributions.MultivariateNormal(loc, covariance), full), atol=1e-10)
    diagonal = dist.Normal(loc, covariance.diagonal(dim1=-2, dim2=-1).sqrt()).to_event(1)
    assert not torch.allclose(kl, kl_divergence(diagonal, p), rtol=1e-3)


@pytest.mark.row("0.9")
def test_with_a_fixed_covariance_the_kl_is_an_l2_penalty_on_the_mean():
    prior, scale = StandardNormal((3,))(), torch.rand(3) + 0.2
    loc = torch.randn(50, 3, requires_grad=True)
    kl = kl_divergence(dist.Normal(loc, scale).to_event(1), prior)
    rest = kl - loc.square().sum(1) / 2
    assert (rest - rest[0]).abs().max() < 1e-12
    assert kl.std() > 0.1
    (gradient,) = torch.autograd.grad(kl.sum(), loc)
    assert torch.allclose(gradient, loc, atol=1e-12)


def elbo(prior, core, likelihood, x, noise):
    """ELBO at frozen noise, term by term: draws are loc + scale noise, the divergence is the closed form."""
    q, p = core(x), prior()
    z = q.mean + q.stddev * noise
    difference, ratio = q.mean - p.mean, q.stddev / p.stddev
    rate = 0.5 * (ratio**2 + (difference / p.stddev) ** 2 - 1 - 2 * ratio.log()).sum(-1)
    residual = (x - likelihood(z).mean).square().sum(-1)
    constant = x.shape[-1] / 2 * torch.log(2 * torch.pi * likelihood.scale**2)
    return -residual / (2 * likelihood.scale**2) - constant - rate


def absorbed(prior, core, likelihood):
    """The same encoder and decoder for a standard normal prior: z = loc + scale z', folded into affine layers."""
    core, likelihood = copy.deepcopy(core), copy.deepcopy(likelihood)
    loc, log_scale = prior.loc, prior.log_scale
    last, first = core.net.output, likelihood.net.hidden[0]
    dim = len(loc)
    with torch.no_grad():
        last.weight[:dim].div_(log_scale.exp()[:, None])
        last.bias[:dim].sub_(loc).div_(log_scale.exp())
        last.bias[dim:].sub_(log_scale)
        first.bias.add_(first.weight @ loc)
        first.weight.mul_(log_scale.exp())
    return StandardNormal((dim,)), core, likelihood


@pytest.mark.row("3.17")
def test_a_standard_normal_prior_loses_nothing():
    prior, core, likelihood = LearnedNormal((3,)), random_core(), FixedGaussian((5,), (3,), MLP, scale=0.5)
    with torch.no_grad():
        prior.loc.normal_()
        prior.log_scale.normal_()
    x, noise = torch.randn(20, 5), torch.randn(20, 3)
    value = elbo(prior, core, likelihood, x, noise)
    standard, folded_core, folded_likelihood = absorbed(prior, core, likelihood)
    assert torch.allclose(elbo(standard, folded_core, folded_likelihood, x, noise), value, atol=1e-10)
    assert not torch.allclose(elbo(standard, core, likelihood, x, noise), value, atol=0.1)
