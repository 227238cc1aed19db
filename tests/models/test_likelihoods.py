"""Likelihoods against scipy, enumeration and paper derivations."""

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from models.distributions import LogisticLevels
from models.latent import LatentVariableModel
from models.likelihoods import (
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    FixedGaussian,
    LearnedGaussian,
    OptimalGaussian,
    optimal_scale,
)
from models.nets import MLP, ConvDecoder, Linear
from models.priors import StandardNormal

DISCRETE = [
    (lambda: Bernoulli((1, 2, 2), (3,), Linear), 2),
    (lambda: Categorical((2,), (3,), Linear, levels=5), 5),
    (lambda: Categorical((2, 1, 2), (3,), Linear, levels=3), 3),
    (lambda: DiscretizedLogistic((2,), (3,), Linear, levels=6), 6),
    (lambda: DiscretizedLogistic((1, 2, 1), (3,), Linear, levels=6, shared_scale=True), 6),
]


def all_data(event_shape, levels):
    size = math.prod(event_shape)
    return torch.tensor(list(itertools.product(range(levels), repeat=size)), dtype=torch.float64).view(-1, *event_shape)


@pytest.mark.parametrize(("make", "levels"), DISCRETE)
def test_masses_sum_to_one(make, levels):
    likelihood = make()
    data = all_data(likelihood.event_shape, levels)
    for z in torch.randn(5, 3):
        assert likelihood(z).log_prob(data).logsumexp(0).abs() < 1e-10


@pytest.mark.parametrize(("make", "levels"), DISCRETE)
def test_mean_is_the_enumerated_mean_and_draws_follow_the_masses(make, levels):
    likelihood = make()
    made, data = likelihood(torch.randn(3)), all_data(likelihood.event_shape, levels)
    masses = made.log_prob(data).exp()
    assert torch.allclose(torch.tensordot(masses, data, dims=1), made.mean, atol=1e-10)
    draws = made.sample((5000,)).flatten(1)
    code = (draws * levels ** torch.arange(draws.shape[1]).flip(0)).sum(1).long()
    counts = torch.bincount(code, minlength=len(data))
    expected = 5000 * masses
    big = expected >= 5
    observed = torch.cat([counts[big], counts[~big].sum()[None]]).detach().numpy()
    predicted = torch.cat([expected[big], expected[~big].sum()[None]]).detach().numpy()
    observed, predicted = observed[predicted > 1e-9], predicted[predicted > 1e-9]
    assert stats.chisquare(observed, predicted * observed.sum() / predicted.sum()).pvalue > 1e-3
    assert stats.chisquare(observed, np.full(len(observed), observed.mean())).pvalue < 1e-3  # not merely uniform


def test_bernoulli_is_scipys():
    p = Bernoulli((4,), (3,), MLP)
    z = torch.randn(6, 3)
    x = torch.bernoulli(torch.full((6, 4), 0.5))
    probability = torch.sigmoid(p.net(z)).detach().numpy()
    assert np.allclose(p(z).log_prob(x).detach(), stats.bernoulli.logpmf(x.numpy(), probability).sum(1), atol=1e-10)


def test_categorical_levels_keep_channels_and_pixels_apart():
    p = Categorical((2, 3, 2), (3,), Linear, levels=4)
    z, x = torch.randn(3), torch.randint(4, (2, 3, 2)).double()
    output = p.net(z).detach().numpy().reshape(2, 4, 3, 2)
    log_masses = output - logsumexp(output, axis=1, keepdims=True)
    by_hand = sum(log_masses[c, int(x[c, i, j]), i, j] for c, i, j in itertools.product(range(2), range(3), range(2)))
    assert p(z).log_prob(x).item() == pytest.approx(by_hand, abs=1e-10)


@pytest.mark.parametrize("shared_scale", [False, True])
def test_discretized_logistic_is_a_difference_of_scipys_cdf(shared_scale):
    p = DiscretizedLogistic((3,), (2,), Linear, levels=8, shared_scale=shared_scale)
    z = torch.randn(2)
    output = p.net(z).detach().numpy()
    centre = 7 * (output[:3] + 0.5)
    scale = 7 * np.exp(p.log_scale.detach().numpy() if shared_scale else output[3:] - 2)
    for level in range(8):
        upper = 1.0 if level == 7 else stats.logistic.cdf(level + 0.5, centre, scale)
        lower = 0.0 if level == 0 else stats.logistic.cdf(level - 0.5, centre, scale)
        log_mass = np.log(upper - lower)
        assert np.allclose(p(z).base_dist.log_prob(torch.full((3,), float(level))).detach(), log_mass, atol=1e-9)


@pytest.mark.parametrize("loc", [-400.0, 3.0, 90.0, 700.0])
def test_discretized_logistic_keeps_its_digits_far_out_in_single_precision(loc):
    levels = torch.arange(256, dtype=torch.float32)
    found = LogisticLevels(torch.tensor(loc, dtype=torch.float32), torch.tensor(0.8), 256).log_prob(levels)
    offset = -np.abs(np.arange(256.0) - loc)  # the density is even: every level from its left tail
    upper, lower = stats.logistic.logcdf((offset + 0.5) / 0.8), stats.logistic.logcdf((offset - 0.5) / 0.8)
    exact = upper + np.log1p(-np.exp(lower - upper))
    exact[0], exact[-1] = stats.logistic.logcdf((0.5 - loc) / 0.8), stats.logistic.logsf((254.5 - loc) / 0.8)
    assert np.allclose(found, exact, rtol=1e-5, atol=1e-5)
    edges = stats.logistic.cdf((np.arange(257.0) - 0.5 - loc) / 0.8)
    naive = np.log(np.maximum(np.diff(edges), 1e-300))
    assert not np.allclose(naive[1:-1], exact[1:-1], rtol=1e-2)


def test_discretized_logistic_has_finite_gradients_far_out():
    loc = torch.tensor([-1e4, 1e4, 50.0], requires_grad=True)
    scale = torch.tensor([0.1, 1e6, 1e-3], requires_grad=True)
    LogisticLevels(loc, scale, 256).log_prob(torch.tensor([100.0, 0.0, 255.0])).sum().backward()
    assert loc.grad.isfinite().all()
    assert scale.grad.isfinite().all()


@pytest.mark.row("0.7")
def test_fixed_gaussian_is_the_squared_error_and_its_constant():
    p = FixedGaussian((1, 2, 3), (2,), MLP, scale=0.3)
    z, x = torch.randn(4, 2), torch.rand(4, 1, 2, 3)
    error = (x - p.net(z)).square().sum((1, 2, 3)) / (2 * 0.3**2)
    constant = 6 / 2 * math.log(2 * math.pi * 0.3**2)
    assert torch.allclose(-p(z).log_prob(x), error + constant, atol=1e-10)
    assert abs(constant) > 1


@pytest.mark.parametrize("kind", [FixedGaussian, LearnedGaussian], ids=lambda kind: kind.__name__)
def test_gaussians_are_scipys(kind):
    p = kind((3,), (2,), MLP, scale=0.7)
    z, x = torch.randn(4, 2), torch.randn(4, 3)
    by_hand = stats.norm.logpdf(x.numpy(), p.net(z).detach().numpy(), 0.7).sum(1)
    assert np.allclose(p(z).log_prob(x).detach(), by_hand, atol=1e-10)


@pytest.mark.row("3.18")
def test_optimal_scale_minimizes_the_loss_at_fixed_nets():
    x, y = np.random.default_rng(0).normal(size=(2, 10, 4))

    def loss(log_scale):  # rate apart: D / 2 sigma^2 + d ln sigma, summed over the batch
        return np.sum((x - y) ** 2) / (2 * np.exp(2 * log_scale)) + x.size * log_scale

    best = np.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-9}).x)
    assert optimal_scale(torch.tensor(x), torch.tensor(y)).item() == pytest.approx(best, rel=1e-6)
    assert np.sqrt(np.mean(np.sum((x - y) ** 2, axis=1))) != pytest.approx(best, rel=0.1)  # not per datum


@pytest.mark.row("3.18")
def test_optimal_gaussian_trains_on_the_profiled_likelihood():
    p = OptimalGaussian((4,), (2,), Linear)
    z, x = torch.randn(10, 2), torch.randn(10, 4)
    score = p(z).log_prob(x).sum()
    score.backward()
    profiled = [parameter.grad.clone() for parameter in p.parameters()]

    def full(scale_gradient):  # the same with autograd running through the optimal scale
        p.zero_grad()
        residual = x - p.net(z)
        scale = residual.square().mean().sqrt()
        scale = scale if scale_gradient else torch.ones(())
        value = -residual.square().sum() / (2 * scale**2) - 40 * scale.log() - 20 * math.log(2 * math.pi)
        value.backward()
        return value, [parameter.grad.clone() for parameter in p.parameters()]

    value, gradients = full(scale_gradient=True)
    assert torch.allclose(score, value, atol=1e-10)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(profiled, gradients, strict=True))
    _, wrong = full(scale_gradient=False)
    assert not any(torch.allclose(a, b, rtol=1e-2) for a, b in zip(profiled, wrong, strict=True))


def test_optimal_gaussian_evaluates_under_the_averaged_variance():
    p = OptimalGaussian((3,), (2,), Linear, decay=0.5)
    assert p.scale == 1
    z, batches = torch.randn(5, 2), [scale * torch.randn(5, 3) for scale in (1.0, 3.0, 2.0)]
    for x in batches:
        p(z).log_prob(x)
    variances = [(x - p.net(z)).square().mean() for x in batches]
    average = (0.25 * variances[0] + 0.5 * variances[1] + variances[2]) / 1.75
    p.eval()
    assert torch.allclose(p.scale, average.sqrt(), atol=1e-12)
    by_hand = stats.norm.logpdf(batches[0], p.net(z).detach(), average.sqrt().item()).sum(1)
    assert np.allclose(p(z).log_prob(batches[0]).detach(), by_hand, atol=1e-10)
    assert torch.allclose(p.scale, average.sqrt(), atol=1e-12)  # evaluation leaves it alone


def test_optimal_gaussian_stays_finite_at_a_perfect_reconstruction():
    p = OptimalGaussian((3,), (2,), Linear)
    z = torch.randn(5, 2)
    score = p(z).log_prob(p.net(z).detach())
    score.sum().backward()
    assert score.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in p.parameters())


MEANS = {
    "Bernoulli": (lambda: Bernoulli((1, 2, 2), (3,), MLP), [0.1, 0.9, 0.5, 0.0]),
    "FixedGaussian": (lambda: FixedGaussian((1, 2, 2), (3,), ConvDecoder), [0.1, 0.9, 0.5, 0.0]),
    "DiscretizedLogistic": (lambda: DiscretizedLogistic((1, 2, 2), (3,), Linear, levels=201), [80.0, 120.0, 100, 95]),
}


@pytest.mark.parametrize("name", MEANS)
def test_initialize_starts_at_the_mean_of_the_data(name):
    make, entries = MEANS[name]
    p, mean = make(), torch.tensor(entries).double().view(1, 2, 2)
    with torch.no_grad():
        for key, parameter in p.net.named_parameters():
            if "bias" not in key:
                parameter.zero_()  # leaves the output bias alone in charge
    assert not torch.allclose(p(torch.randn(3)).mean, mean, atol=0.1)
    p.initialize(torch.stack([mean, mean]))
    # The edges of the discretized logistic pull its mean inwards a little.
    assert torch.allclose(p(torch.randn(3)).mean, mean, atol=2e-3 if name != "DiscretizedLogistic" else 2.0)


def test_initialize_leaves_alone_what_it_cannot_set():
    bare = Bernoulli((2,), (3,), lambda i, o: torch.nn.Linear(3, 2))
    levels = Categorical((2,), (3,), Linear, levels=3)
    for p in (bare, levels):
        before = [parameter.clone() for parameter in p.parameters()]
        p.initialize(torch.tensor([[0.2, 0.7]]))
        assert all(torch.equal(a, b) for a, b in zip(before, p.parameters(), strict=True))


@pytest.mark.parametrize(("given", "expected"), [(None, 2.0), (0.3, 0.3)])
def test_the_learned_scale_starts_from_the_data_unless_it_is_given(given, expected):
    x = torch.tensor([[5.0, -1.0], [9.0, -5.0]])  # two numbers either side of their means: deviations of 2
    p = LearnedGaussian((2,), (3,), Linear, scale=given)
    p.initialize(x)
    assert torch.allclose(p.scale, torch.tensor(expected))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="scale is a standard deviation and must be positive, got 0"):
        FixedGaussian((2,), (3,), Linear, scale=0.0)
    with pytest.raises(ValueError, match="decay must lie in"):
        OptimalGaussian((2,), (3,), Linear, decay=1.0)
    for kind in (Categorical, DiscretizedLogistic):
        with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
            kind((2,), (3,), Linear, levels=1)


def test_support_is_named():
    kinds = {"binary": [Bernoulli], "levels": [Categorical, DiscretizedLogistic]}
    kinds["real"] = [FixedGaussian, LearnedGaussian, OptimalGaussian]
    assert all(kind.support == support for support, some in kinds.items() for kind in some)


def test_validation_refuses_data_outside_the_support():
    with pyro.validation_enabled(True):
        for p in (Categorical((2,), (3,), Linear, levels=4), DiscretizedLogistic((2,), (3,), Linear, levels=4)):
            made = p(torch.zeros(3))
            made.log_prob(torch.tensor([0.0, 3.0]))
            for bad in ([0.0, 4.0], [0.5, 1.0]):
                with pytest.raises(ValueError, match="support"):
                    made.log_prob(torch.tensor(bad))


def curve_model():
    """x = f(z) + noise in one dimension, f a net: log p(x) needs one integral."""
    model = LatentVariableModel(StandardNormal((1,)), FixedGaussian((1,), (1,), MLP, scale=0.25))
    with torch.no_grad():
        for parameter in model.likelihood.net.parameters():
            parameter.mul_(1.5)
    return model


def quadrature_density(model, x):
    """p(x) for ``x`` (N,) as the trapezoid sum over 4001 latents in [-8, 8]."""
    z = np.linspace(-8, 8, 4001)
    centres = model.likelihood.net(torch.tensor(z)[:, None]).detach().numpy()[:, 0]
    integrand = stats.norm.pdf(x[:, None], centres, 0.25) * stats.norm.pdf(z)
    return np.trapezoid(integrand, z, axis=1)


@pytest.mark.row("1.1", "2.1", "2.3", "2.4")
def test_ancestral_draws_follow_the_marginal_by_quadrature():
    model, count = curve_model(), 20_000
    grid = np.linspace(-6, 6, 2401)
    density = quadrature_density(model, grid)
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-4)
    with torch.no_grad():
        trace = poutine.trace(poutine.uncondition(model)).get_trace(torch.zeros(count, 1))
    x = trace.nodes["x"]["value"].numpy()[:, 0]
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid))])
    edges = np.interp(np.linspace(0, 1, 21), cumulative / cumulative[-1], grid)
    edges[0], edges[-1] = -np.inf, np.inf
    counts = np.histogram(x, edges)[0]
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.chisquare(np.histogram(x + 0.05, edges)[0]).pvalue < 1e-3
