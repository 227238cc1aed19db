"""ELBO surgery, active units and divergences by dimension against tables, quadrature and hand values."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import norm

from guides.amortized import Amortized
from guides.exact import ExactPosterior
from guides.gaussian import DiagonalNormal, Unconditional
from inference.diagnostics import active_units, elbo_terms, kl_per_dimension, posterior_means, surgery
from inference.particles import particles
from models.latent import LatentVariableModel
from models.likelihoods import FixedGaussian
from models.nets import Linear
from models.ppca import PPCA
from models.priors import StandardNormal
from tests import oracles
from tests.programs import HierarchicalGuide, HierarchicalModel, TableGuide


@pytest.mark.row("1.20", "3.19", "5.8")
def test_a_constructed_collapse_and_its_control():
    x = torch.randn(50, 3)
    blind = LatentVariableModel(StandardNormal((2,)), FixedGaussian((3,), (2,), Linear))
    with torch.no_grad():
        blind.likelihood.net.output.weight.zero_()
    collapsed = Amortized(Unconditional((2,), (3,)))
    parts = surgery(blind, collapsed, x)
    assert abs(parts.mutual_information) < 1e-12
    assert abs(parts.kl) < 1e-12
    assert abs(parts.marginal_kl) < 1e-12
    assert active_units(collapsed, x) == 0
    assert torch.equal(kl_per_dimension(blind, collapsed, x), torch.zeros(2))
    seeing = PPCA((3,), 2)
    with torch.no_grad():
        seeing.likelihood.weight.copy_(torch.eye(3, 2))
        seeing.likelihood.log_scale.fill_(-1.0)
    exact = Amortized(ExactPosterior(seeing))
    parts = surgery(seeing, exact, x)
    assert parts.mutual_information > 1
    assert parts.kl > 1
    assert active_units(exact, x) == 2


@pytest.mark.row("1.20")
def test_a_blind_guide_away_from_the_prior_has_marginal_kl_alone():
    model = LatentVariableModel(StandardNormal((2,)), FixedGaussian((3,), (2,), Linear))
    core = Unconditional((2,), (3,))
    with torch.no_grad():
        core.loc.copy_(torch.tensor([1.0, -2.0]))
        core.log_scale.copy_(torch.tensor([0.3, -0.7]))
    parts = surgery(model, Amortized(core), torch.randn(30, 3))
    expected = oracles.diagonal_kl(np.array([1.0, -2.0]), np.exp([0.3, -0.7]))
    assert abs(parts.mutual_information) < 1e-12
    assert abs(parts.marginal_kl - expected) < 1e-10


def linear_guide(weight, log_scale=-1.0):
    core = DiagonalNormal((3,), (2,), Linear)
    with torch.no_grad():
        core.net.output.weight.zero_()
        core.net.output.weight[:3].copy_(weight)
        core.net.output.bias[3:].fill_(log_scale)
    return Amortized(core)


@pytest.mark.parametrize("kind", ["one-hots", "states"])
def test_a_vector_of_classes_is_one_active_unit(kind):
    """64 classes, told apart for half of the data and not for the other: no entry alone varies by 0.01."""
    count, classes = 64, 64
    x = torch.arange(count).double().unsqueeze(-1)
    hot = torch.eye(classes)[torch.arange(count)]
    p = 0.5 * hot + 0.5 / classes
    probs = torch.stack([p, torch.full_like(p, 1 / classes), p.flip(0)], 1)  # (N, 3, K); the second tells nothing

    def guide(x):
        own = probs[x[:, 0].long()]
        with pyro.plate("data", x.shape[0], dim=-1):
            if kind == "one-hots":
                pyro.sample("z", dist.OneHotCategorical(own).to_event(1))
            else:
                for site in range(3):
                    pyro.sample(f"z{site}", dist.Categorical(own[:, site]))
            pyro.sample("extra", dist.Normal(x, 1.0).to_event(1))

    assert p.var(0).max() < 0.01
    assert p.var(0).sum() > 0.2
    assert active_units(guide, x) == 3  # two vectors and the normal
    assert active_units(guide, x, threshold=0.3) == 1


@pytest.mark.row("1.20")
def test_active_units_by_hand():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # each column has variance 2/3
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.1], [0.13, 0.0]])  # means with variances 0.667, 0.00667 and 0.01127
    guide = linear_guide(weight)
    assert torch.allclose(posterior_means(guide, x), x @ weight.T, atol=1e-12)
    assert active_units(guide, x) == 2
    assert active_units(guide, x, threshold=0.005) == 3
    assert active_units(guide, x, threshold=0.1) == 1
    assert active_units(guide, x[:1]) == 0  # of one datum nothing varies


def flow_guide(weight):
    """A normal seen through a transform: as any flow, it can be drawn from and scored, and knows no mean."""

    def guide(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            seen_through = [dist.transforms.AffineTransform(0.0, 1.0)]
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(x @ weight.T, 1.0), seen_through).to_event(1))

    return guide


@pytest.mark.row("1.20")
def test_means_estimated_from_draws_do_not_make_units_active():
    """An average over 64 draws of N(0, 1) varies by 1/64 from datum to datum, more than the threshold."""
    x, weight = torch.randn(500, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.3]])
    guide = flow_guide(weight)
    means = posterior_means(guide, x)
    assert means.shape == (500, 3)
    assert means[:, 1].var() > 0.01
    assert active_units(guide, x) == 2
    assert active_units(flow_guide(torch.zeros(3, 2)), x) == 0
    assert (means - x @ weight.T).abs().max() < 5 / 8


@pytest.mark.row("1.20")
def test_latents_below_a_collapsed_one_are_not_active_by_its_noise():
    def guide(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            top = pyro.sample("top", dist.Normal(torch.zeros(x.shape[0], 1), 1.0).to_event(1))
            bottom = torch.cat([top, x[:, :1]], -1)
            pyro.sample("bottom", dist.Normal(bottom, 0.1).to_event(1))

    x = torch.randn(500, 2)
    means = posterior_means(guide, x)
    assert means.shape == (500, 3)
    assert torch.equal(means[:, 0], torch.zeros(500))
    assert means[:, 1].var() > 0.01  # chance alone
    assert torch.allclose(means[:, 2], x[:, 0], atol=1e-12)
    assert active_units(guide, x) == 1


def test_of_a_categorical_the_probabilities_are_the_means():
    q = oracles.random_tables(64, 8)
    x = torch.tensor(oracles.tiny_discrete_vae().data())
    assert np.allclose(posterior_means(TableGuide(q), x).detach(), q, atol=1e-12)
    assert q.var(0, ddof=1).sum() > 0.05
    assert active_units(TableGuide(q), x, threshold=0.05) == 1
    assert active_units(TableGuide(np.full((64, 8), 1 / 8)), x) == 0


# --- the bound's terms -------------------------------------------------------------------------------------------


@pytest.mark.row("0.8", "1.15")
def test_terms_of_the_bound_against_the_closed_form():
    model, x = PPCA((2,), 3), torch.randn(5, 2)
    with torch.no_grad():
        model.likelihood.weight.copy_(torch.randn(2, 3))
    weight = torch.randn(3, 2)
    terms = elbo_terms(model, linear_guide(weight), x, num_samples=20_000)
    assert terms.kl_estimator == "closed form"
    covariance = math.exp(-2.0) * np.eye(3)
    kl = [oracles.gaussian_kl(m, covariance) for m in (x @ weight.T).numpy()]
    assert np.allclose(terms.kl.detach(), kl, atol=1e-10)
    p = model.likelihood
    oracle = oracles.LinearModel(p.weight.detach().numpy(), p.loc.detach().numpy(), p.scale.item())
    elbo = oracles.ppca_elbo(x.numpy(), oracle, (x @ weight.T).numpy(), covariance)
    assert np.allclose(terms.elbo.detach(), elbo, atol=0.1)
    assert not np.allclose(elbo + kl, elbo, atol=0.1)
    assert torch.equal(terms.elbo, terms.reconstruction - terms.kl)


def test_terms_without_closed_form_say_so():
    model = LatentVariableModel(StandardNormal((3,)), FixedGaussian((2,), (3,), Linear))
    x = torch.randn(4, 2)
    with torch.no_grad():
        terms = elbo_terms(model, flow_guide(torch.zeros(3, 2)), x, 1000)
    assert terms.kl_estimator == "Monte Carlo"
    assert terms.kl.abs().max() < 1e-10  # q is the prior: every log-ratio is zero


def test_terms_of_programs_with_nested_plates():
    def model(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 3, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(x.mean(1), 0.5))

    x = torch.randn(6, 3)
    terms = elbo_terms(model, guide, x, 50_000)
    expected = norm.logpdf(x, x.mean(1, keepdim=True)).sum(1) - 3 * 0.25 / 2
    assert np.allclose(terms.reconstruction, expected, atol=0.05)


@pytest.mark.row("0.8")
def test_divergences_by_dimension_add_up():
    model = LatentVariableModel(StandardNormal((3,)), FixedGaussian((2,), (3,), Linear))
    x, weight = torch.randn(7, 2), torch.randn(3, 2)
    parts = kl_per_dimension(model, linear_guide(weight), x)
    assert parts.shape == (3,)
    means, variance = (x @ weight.T).numpy(), math.exp(-2.0)
    by_hand = 0.5 * (variance + means**2 - 1 - math.log(variance)).mean(0)
    assert np.allclose(parts.detach(), by_hand, atol=1e-12)
    assert abs(parts.sum() - elbo_terms(model, linear_guide(weight), x).kl.mean()) < 1e-10


def test_divergences_by_dimension_of_a_hierarchy_add_up():
    model, guide, x = HierarchicalModel(), HierarchicalGuide(), torch.randn(7, 5)
    pyro.set_rng_seed(1)
    parts = kl_per_dimension(model, guide, x)
    pyro.set_rng_seed(1)
    whole = particles(model, guide, x).analytic_kl().mean()
    assert parts.shape == (5,)
    assert abs(parts.sum() - whole) < 1e-10


def test_divergences_that_do_not_split_are_not_split():
    model = PPCA((3,), 2)
    assert kl_per_dimension(model, Amortized(ExactPosterior(model)), torch.randn(4, 3)) is None
    upwards = HierarchicalGuide(upwards=True)  # each KL has a closed form, but their sum is not the KL
    assert kl_per_dimension(HierarchicalModel(), upwards, torch.randn(4, 5)) is None
    three = LatentVariableModel(StandardNormal((3,)), FixedGaussian((2,), (3,), Linear))
    assert kl_per_dimension(three, flow_guide(torch.zeros(3, 2)), torch.randn(4, 2)) is None
