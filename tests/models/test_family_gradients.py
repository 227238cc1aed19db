"""Pathwise gradients, divergences and special cases of reparameterizable families."""

import math
from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import kl_divergence

from guides.amortized import Amortized
from guides.family import FamilyConditional
from models.composition import Erlang
from models.families import FAMILIES
from models.location_scale import Elliptical
from models.nets import MLP
from tests.family_cases import by_scipy, every_family, leaves, member, numbers

NORMAL_GRID = np.linspace(-8, 8, 4001)


def expectation(f, distribution):
    """E f(z) by quadrature over u = F(z), on the scale of normal quantiles, where both tails are smooth."""
    z = distribution.ppf(stats.norm.cdf(NORMAL_GRID))
    return integrate.simpson(stats.norm.pdf(NORMAL_GRID) * f(z), x=NORMAL_GRID)


def slopes(word, step=1e-4):
    """The derivative of E tanh z in each parameter, by central differences of the quadrature."""
    found = []
    for direction in np.eye(len(numbers(word))):
        ends = [expectation(np.tanh, by_scipy(word, numbers(word) + s * step * direction)) for s in (1, -1)]
        found.append((ends[0] - ends[1]) / (2 * step))
    return np.array(found)


def pathwise(constructor, word, count):
    """The gradient of tanh z in each parameter, for each of ``count`` draws."""
    parameters = leaves(word, count)
    z = constructor(**parameters).rsample()[:, 0]
    if z.requires_grad:
        z.tanh().sum().backward()
    grads = [torch.zeros_like(v) if v.grad is None else v.grad for v in parameters.values()]
    return torch.cat([grad.reshape(count, -1) for grad in grads], 1)


def assert_gradient_is_pathwise(constructor, word, count=200_000):
    found, truth = pathwise(constructor, word, count), torch.as_tensor(slopes(word))
    standard_error = found.std(0) / count**0.5
    assert (truth.abs() > 8 * standard_error).all()  # no gradient at all would fail
    assert ((found.mean(0) - truth).abs() < 4 * standard_error + 1e-7).all(), (found.mean(0), truth, standard_error)


@pytest.mark.row("1.7", "1.9", "1.12", "1.13", "1.14", "3.16")
@every_family
def test_the_gradient_of_the_mean_is_the_mean_gradient(word):
    assert_gradient_is_pathwise(FAMILIES[word].constructor, word)


class HalfDetached(dist.StudentT):
    """Its draws forget that the chi-squared in them depends on the degrees of freedom."""

    def rsample(self, sample_shape=()):
        noise = torch.randn(self._extended_shape(sample_shape))
        return self.loc + self.scale * noise * (self.df / self._chi2.rsample(sample_shape).detach()).sqrt()


@pytest.mark.parametrize(
    ("word", "wrong"),
    [
        ("weibull", lambda scale, concentration: dist.Weibull(scale, concentration.detach())),
        ("student_t", HalfDetached),
        ("gaussian", lambda loc, scale: dist.Normal(loc, scale.square())),
        ("dirichlet", lambda concentration: dist.Dirichlet(concentration.detach())),
        ("erlang", lambda rate: dist.Gamma(torch.full_like(rate, 3.0), rate)),
    ],
)
def test_a_wrong_path_fails(word, wrong):
    with pytest.raises(AssertionError):
        assert_gradient_is_pathwise(wrong, word, count=50_000)


@every_family
def test_the_mean_score_is_zero_unless_the_density_jumps_at_a_moving_edge(word):
    count = 100_000
    parameters = leaves(word, count)
    made = FAMILIES[word].constructor(**parameters)
    made.log_prob(made.sample()).sum().backward()
    score = torch.cat([v.grad.reshape(count, -1) for v in parameters.values() if v.grad is not None], 1)
    errors = score.mean(0).abs() / (score.std(0) / count**0.5 + 1e-12)
    if FAMILIES[word].score_identity:
        assert (errors < 5).all()
    else:
        assert errors.max() > 100


@pytest.mark.parametrize("word", ["beta", "exponential", "gamma", "gaussian", "gumbel", "laplace", "pareto", "uniform"])
def test_closed_divergences_from_a_normal(word):
    loc, scale = 0.3, 1.4

    def log_ratio(z):
        return by_scipy(word).logpdf(z) - stats.norm.logpdf(z, loc, scale)

    kl = kl_divergence(member(word), dist.Normal(loc, scale)).item()
    inner = stats.norm.cdf(NORMAL_GRID)  # keeps the ends, where a density may be zero or infinite, out
    z = np.clip(by_scipy(word).ppf(inner), *by_scipy(word).ppf([1e-15, 1 - 1e-15]))
    truth = integrate.simpson(stats.norm.pdf(NORMAL_GRID) * log_ratio(z), x=NORMAL_GRID)
    assert kl == pytest.approx(truth, abs=1e-4)
    assert kl != pytest.approx(kl_divergence(member(word), dist.Normal(loc, scale**2)).item(), abs=1e-2)


# --- Single families ---------------------------------------------------------------------------------------------


@pytest.mark.row("1.11")
def test_the_draws_of_a_gaussian_guide_are_gaussian():
    core, count = FamilyConditional((3,), (2,), partial(MLP, hidden=(8,))), 20_000
    context = torch.randn(2)
    loc, log_scale = core.net(context).detach().chunk(2)
    z = Amortized(core)(context.expand(count, 2)).detach()
    standard = (z - loc) / log_scale.exp()
    for column in standard.T:
        assert stats.kstest(column, stats.norm(scale=1.1).cdf).pvalue < 1e-3
        assert stats.kstest(column, stats.norm.cdf).pvalue > 1e-3
    assert (standard.mean(0).abs() < 4 / count**0.5).all()
    # The variance of a product of two standard normals is 1, that of a square 2.
    allowed = 4 / count**0.5 * (1 + torch.eye(3) * (2**0.5 - 1))
    assert ((standard.T @ standard / count - torch.eye(3)).abs() < allowed).all()
    assert ((1.1 * standard).square().mean(0) - 1 > allowed.diagonal()).all()


@pytest.mark.row("1.12", "4.17")
def test_gumbel():
    count = 20_000
    made = FAMILIES["gumbel"].constructor(torch.zeros(count), torch.ones(count))
    for z in (made.rsample(), -torch.log(-torch.log(torch.rand(count)))):
        assert stats.kstest(z, stats.norm(np.euler_gamma, math.pi / 6**0.5).cdf).pvalue < 1e-3
        assert stats.kstest(z, stats.gumbel_r.cdf).pvalue > 1e-3
        errors = [(z.mean() - np.euler_gamma).abs() / (z.std() / count**0.5)]
        centred = (z - z.mean()).square()
        errors.append((centred.mean() - math.pi**2 / 6).abs() / (centred.std() / count**0.5))
        assert max(errors) < 4
        assert (centred.mean() - math.pi / 6).abs() / (centred.std() / count**0.5) > 4
    assert made.mean[0].item() == pytest.approx(np.euler_gamma, abs=1e-12)
    assert made.variance[0].item() == pytest.approx(math.pi**2 / 6, abs=1e-12)


@pytest.mark.row("1.12", "1.14")
def test_only_a_whole_concentration_is_a_sum_of_exponentials():
    for order in (1, 3):
        z = Erlang(torch.tensor(1.9), order).sample((20_000,))
        assert stats.kstest(z, stats.gamma(order, scale=1 / 1.9).cdf).pvalue > 1e-4
        for other in (order - 0.5, order + 0.5):
            assert stats.kstest(z, stats.gamma(other, scale=1 / 1.9).cdf).pvalue < 1e-4
    for order in (2.5, 2.0, 0, -1, True):
        with pytest.raises(ValueError, match="whole number of exponentials"):
            Erlang(torch.tensor(1.9), order)
    with pytest.raises(NotImplementedError):
        Erlang(torch.tensor(1.9), 2).icdf(torch.tensor(0.5))


PLANE = {"loc": [0.3, -0.2], "scale_tril": [[0.8, 0.0], [0.5, 0.6]]}


def in_the_plane(power):
    return Elliptical(*(torch.tensor(value) for value in PLANE.values()), torch.tensor(power))


@pytest.mark.row("1.13")
@pytest.mark.parametrize("power", [0.6, 1.0, 2.5])
def test_elliptical_in_the_plane(power):
    made = in_the_plane(power)
    line = torch.linspace(-14, 14, 701)
    grid = torch.cartesian_prod(line, line)
    density = made.log_prob(grid).exp() * (line[1] - line[0]) ** 2
    assert density.sum().item() == pytest.approx(1, abs=1e-3)
    centred = grid - made.mean
    covariance = centred.T @ (density[:, None] * centred)
    assert torch.allclose(covariance.diagonal(), made.variance, rtol=1e-3)
    full = torch.distributions.MultivariateNormal(made.mean, scale_tril=made.scale_tril)
    assert torch.allclose(made.log_prob(grid[:99]), full.log_prob(grid[:99]), atol=1e-10) == (power == 1)
    z = made.sample((20_000,))
    length = torch.linalg.solve_triangular(made.scale_tril, (z - made.mean).T, upper=False).norm(dim=0)
    assert stats.kstest(length ** (2 * power), stats.gamma(1 / power, scale=2).cdf).pvalue > 1e-4
    assert stats.kstest(length ** (2 * power), stats.gamma(0.8 / power, scale=2).cdf).pvalue < 1e-4
    deviation = (torch.cov(z.T) - covariance).abs()
    assert (deviation < 0.05 * covariance.diagonal().max()).all()


def test_elliptical_gradients_in_the_plane():
    count = 100_000
    parameters = [torch.tensor(value).expand(count, *np.shape(value)).clone() for value in PLANE.values()]
    parameters = [value.requires_grad_() for value in (*parameters, torch.full((count,), 0.7))]
    z = Elliptical(*parameters).rsample()
    (z[:, 0] * z[:, 1]).tanh().sum().backward()
    line = torch.linspace(-14, 14, 701)
    grid = torch.cartesian_prod(line, line)
    single = [value[0].detach().clone().requires_grad_() for value in parameters]
    density = Elliptical(*single).log_prob(grid).exp() * (line[1] - line[0]) ** 2
    (density * grid.prod(1).tanh()).sum().backward()
    for each, one in zip(parameters, single, strict=True):
        found, error = each.grad.mean(0), each.grad.std(0) / count**0.5
        close = (found - one.grad).abs() < 5 * error + 1e-4
        assert (close.tril() == torch.ones_like(close).tril() if close.dim() == 2 else close).all()
        assert one.grad.abs().max() > 10 * error.max()
