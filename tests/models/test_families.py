"""Every reparameterizable family against scipy: draws, densities, quantiles and pathwise gradients."""

import itertools
import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from scipy import integrate, stats
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from guides.amortized import Amortized
from guides.family import FamilyConditional
from guides.gaussian import DiagonalNormal
from inference.assemble import assemble
from inference.config import ConfigError, load
from inference.objectives import ELBO, IWAE
from models.composition import Erlang
from models.families import FAMILIES, FamilyPrior, families_inside
from models.latent import LatentVariableModel
from models.likelihoods import FixedGaussian
from models.location_scale import Elliptical
from models.nets import MLP, Linear
from models.priors import StandardNormal

# Word -> (parameters of one member, the same member by scipy, the interval of its support).
INF = math.inf
CASES = {
    "exponential": ({"rate": 1.3}, lambda rate: stats.expon(scale=1 / rate), (0, INF)),
    "cauchy": ({"loc": 0.4, "scale": 0.7}, stats.cauchy, (-INF, INF)),
    "logistic": ({"loc": 0.4, "scale": 0.6}, stats.logistic, (-INF, INF)),
    "rayleigh": ({"scale": 0.8}, lambda scale: stats.rayleigh(scale=scale), (0, INF)),
    "pareto": ({"scale": 0.4, "alpha": 3.5}, lambda scale, alpha: stats.pareto(alpha, scale=scale), (0.4, INF)),
    "weibull": (
        {"scale": 0.9, "concentration": 1.7},
        lambda scale, concentration: stats.weibull_min(concentration, scale=scale),
        (0, INF),
    ),
    "reciprocal": ({"low": 0.3, "ratio": 5.0}, lambda low, ratio: stats.loguniform(low, low * ratio), (0.3, 1.5)),
    "gompertz": (
        {"concentration": 0.8, "rate": 1.4},
        lambda concentration, rate: stats.gompertz(concentration, scale=1 / rate),
        (0, INF),
    ),
    "gumbel": ({"loc": -0.3, "scale": 0.8}, stats.gumbel_r, (-INF, INF)),
    "erlang": ({"rate": 1.9}, lambda rate: stats.gamma(2, scale=1 / rate), (0, INF)),
    "laplace": ({"loc": 0.4, "scale": 0.7}, stats.laplace, (-INF, INF)),
    "elliptical": (
        {"loc": 0.5, "scale_tril": 0.8, "power": 0.7},
        lambda loc, scale_tril, power: stats.gennorm(2 * power, loc, scale_tril * 2 ** (1 / (2 * power))),
        (-INF, INF),
    ),
    "student_t": ({"df": 3.0, "loc": 0.7, "scale": 0.8}, stats.t, (-INF, INF)),
    "uniform": ({"loc": -0.3, "width": 1.6}, stats.uniform, (-0.3, 1.3)),
    "triangular": (
        {"loc": -0.4, "width": 2.1, "peak": 0.3},
        lambda loc, width, peak: stats.triang(peak, loc, width),
        (-0.4, 1.7),
    ),
    "gaussian": ({"loc": 0.4, "scale": 0.7}, stats.norm, (-INF, INF)),
    "lognormal": (
        {"loc": -0.4, "scale": 0.7},
        lambda loc, scale: stats.lognorm(scale, scale=np.exp(loc)),
        (0, INF),
    ),
    "gamma": (
        {"concentration": 1.6, "rate": 1.4},
        lambda concentration, rate: stats.gamma(concentration, scale=1 / rate),
        (0, INF),
    ),
    "dirichlet": ({"concentration": [1.3, 0.8, 2.1]}, lambda *c: stats.beta(c[0], sum(c[1:])), (0, 1)),
    "beta": ({"concentration1": 1.6, "concentration0": 2.2}, stats.beta, (0, 1)),
    "chi2": ({"df": 2.3}, stats.chi2, (0, INF)),
    "f": ({"df1": 3.2, "df2": 6.5}, stats.f, (0, INF)),
}
WITH_QUANTILES = sorted(set(CASES) - {"erlang", "elliptical", "student_t", "gamma", "dirichlet", "beta", "chi2", "f"})
every_family = pytest.mark.parametrize("word", CASES)


def event_shape(word):
    return (3,) if word == "dirichlet" else (1,)


def leaves(word, count):
    """One copy of each parameter for each draw, so that each draw has a gradient of its own."""
    shapes = FAMILIES[word].shapes(event_shape(word))
    values = {n: torch.tensor(v).expand((count, *shapes[n])).clone() for n, v in CASES[word][0].items()}
    return {name: value.requires_grad_() for name, value in values.items()}


def member(word, count=1):
    return FAMILIES[word].constructor(**leaves(word, count))


def numbers(word):
    """The parameters as a flat vector, in scipy's order too; a Dirichlet has three."""
    return np.concatenate([np.atleast_1d(value) for value in CASES[word][0].values()])


def by_scipy(word, parameters=None):
    return CASES[word][1](*(numbers(word) if parameters is None else parameters))


def draws(word, count=20_000):
    """The first coordinate of independent draws, ``(count,)``."""
    return member(word, count).rsample()[:, 0].detach()


# --- Distributions -----------------------------------------------------------------------------------------------


def test_the_table_is_the_lecture_s():
    inverse = "exponential cauchy logistic rayleigh pareto weibull reciprocal gompertz gumbel"
    shifted = "laplace elliptical student_t logistic uniform triangular gaussian"
    composed = "lognormal gamma dirichlet beta chi2 f erlang"
    for route, words in {"inverse CDF": inverse, "location-scale": shifted, "composition": composed}.items():
        assert {word for word, family in FAMILIES.items() if route in family.routes} == set(words.split())
    assert set(FAMILIES) == set(CASES)
    for word, family in FAMILIES.items():
        assert list(family.parameters) == list(CASES[word][0])


@pytest.mark.row("1.12", "1.13", "1.14")
@every_family
def test_draws_follow_the_distribution(word):
    z = draws(word).numpy()
    wrong = numbers(word)
    wrong[-1] *= 2.0 if word in ("student_t", "f") else 1.3
    assert stats.kstest(z, by_scipy(word, wrong).cdf).pvalue < 1e-4
    assert stats.kstest(z, by_scipy(word).cdf).pvalue > 1e-4


@pytest.mark.row("1.12", "1.13", "1.14")
@every_family
def test_draws_lie_in_the_support(word):
    made, (low, high) = member(word, 20_000), CASES[word][2]
    z = made.rsample()
    assert made.has_rsample
    assert made.support.check(z).all()
    assert ((z >= low) & (z <= high)).all()
    assert z[:, 0].max() > (0.95 * high if high < INF else 0.5)
    assert z[:, 0].min() < (low + 0.1 if low > -INF else 0)
    table = {"real": -INF, "positive": 0, "unit interval": 0, "simplex": 0}
    assert table[FAMILIES[word].support] <= low
    assert FAMILIES[word].moving_support == (low not in (0, -INF))


@every_family
def test_densities_are_scipy_s(word):
    z = torch.as_tensor(by_scipy(word).ppf(np.linspace(0.001, 0.999, 50)))
    if word == "dirichlet":
        rest = torch.rand(50)
        value = torch.stack([z, (1 - z) * rest, (1 - z) * (1 - rest)], 1)
        truth = [stats.dirichlet(numbers(word)).logpdf(row / row.sum()) for row in value.numpy()]
    else:
        value, truth = z[:, None], by_scipy(word).logpdf(z)
    assert np.allclose(member(word).log_prob(value).detach().flatten(), truth, atol=1e-10, rtol=0)


@pytest.mark.parametrize("word", ["pareto", "reciprocal", "uniform", "triangular"])
def test_no_density_outside_a_moving_support(word):
    low, high = CASES[word][2]
    outside = torch.tensor([low - 0.01, min(high, 1e300) + 1e-3])[:, None]
    if word == "pareto":
        outside = outside[:1]
    family = FAMILIES[word]
    parameters = leaves(word, 1)
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="support"):
        family.constructor(**parameters).log_prob(outside)
    with pyro.validation_enabled(False):
        made = family.constructor(**parameters)
        assert (made.log_prob(outside) == -INF).all()
        made.log_prob(torch.cat([outside, torch.full((1, 1), low + 0.1)])).logsumexp(0).sum().backward()
    assert all(value.grad.isfinite().all() for value in parameters.values())


@pytest.mark.row("1.12")
@pytest.mark.parametrize("word", WITH_QUANTILES)
def test_quantiles_invert_the_cdf(word):
    made, u = member(word), torch.linspace(0.001, 0.999, 999)[:, None]
    z = made.icdf(u).detach()
    assert np.allclose(z, by_scipy(word).ppf(u), atol=1e-10, rtol=1e-10)
    assert np.allclose(made.cdf(z).detach(), u, atol=1e-10)


@pytest.mark.parametrize("word", ["erlang", "gamma", "chi2"])
def test_cdf_without_quantiles(word):
    z = torch.linspace(0.01, 5, 100)[:, None]
    assert np.allclose(member(word).cdf(z).detach(), by_scipy(word).cdf(z), atol=1e-10)


@every_family
def test_moments(word):
    made = member(word)
    if word in ("gompertz", "cauchy"):
        with pytest.raises(NotImplementedError):
            _ = made.mean  # no elementary form; none at all
        return
    assert made.mean[..., 0].item() == pytest.approx(by_scipy(word).mean(), rel=1e-9)
    assert made.variance[..., 0].item() == pytest.approx(by_scipy(word).var(), rel=1e-9)


@every_family
def test_expanding_repeats(word):
    made = member(word, 4)
    wide = made.expand((5, *made.batch_shape))
    z = wide.rsample((2,))
    assert z.shape == (2, 5, *made.batch_shape, *made.event_shape)
    assert wide.batch_shape == (5, *made.batch_shape)
    assert wide.event_shape == made.event_shape
    assert torch.allclose(wide.log_prob(z), made.log_prob(z), atol=1e-12)
    assert z.flatten().unique().numel() == z.numel()


class ExtremeUniforms(TorchDispatchMode):
    """Every uniform source, in turn, returns the least and the greatest number that its grid has."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name not in ("rand", "uniform_", "exponential_", "cauchy_"):
            return out
        eps = torch.finfo(out.dtype).eps
        ends = torch.tensor([0.0, 1 - eps / 2], dtype=out.dtype)
        if name == "uniform_" and len(args) > 1:
            low, high = args[1], args[2] if len(args) > 2 else 1.0
            ends = low + ends * (high - low)
        if name == "exponential_":
            ends = -torch.log(torch.tensor([eps / 2, 1 - eps / 2], dtype=out.dtype))
        if name == "cauchy_":
            ends = torch.tan(torch.pi * (ends.clamp(min=eps / 2) - 0.5))
        return out.copy_(ends[torch.arange(out.numel()) % 2].view(out.shape))


@pytest.mark.parametrize("loc", [0, 1, 30], ids=lambda loc: f"loc {loc}")
@every_family
def test_extreme_uniforms_in_single_precision(word, loc):
    parameters = {n: v.detach().float().requires_grad_() for n, v in leaves(word, 4).items()}
    if "loc" in parameters:
        parameters["loc"] = (parameters["loc"].detach() + loc).requires_grad_()
    made = FAMILIES[word].constructor(**parameters)
    with ExtremeUniforms():
        z = made.rsample()
    log_q = made.log_prob(z)
    assert z.dtype == torch.float32
    assert z.isfinite().all()
    assert made.support.check(z).all()
    assert log_q.isfinite().all()
    (z.tanh().sum() + log_q.sum()).backward()
    assert all(value.grad.isfinite().all() for value in parameters.values())


def test_the_extremes_catch_an_infinite_draw():
    with ExtremeUniforms():
        assert not dist.Logistic(torch.zeros(4), torch.ones(4)).rsample().isfinite().all()


def test_small_concentrations_keep_a_finite_density_in_single_precision():
    few, many = torch.full((20_000,), 0.02, dtype=torch.float32), torch.full((20_000,), 2.0, dtype=torch.float32)
    for made in (
        FAMILIES["beta"].constructor(many, few),
        FAMILIES["beta"].constructor(few, many),
        FAMILIES["dirichlet"].constructor(torch.stack([few, many, few], 1)),
        FAMILIES["gamma"].constructor(few, many),
    ):
        assert made.log_prob(made.rsample()).isfinite().all()


# --- Pathwise gradients ------------------------------------------------------------------------------------------

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


# --- Guides and priors -------------------------------------------------------------------------------------------


def core_of(word, event=(2,), context=(3,)):
    return FamilyConditional(event, context, Linear, word)


@every_family
def test_a_guide_core_has_the_shapes_of_one(word):
    core = core_of(word)
    for leading in ((), (4,), (2, 3)):
        made = core(torch.randn(*leading, 3))
        assert made.event_shape == (2,)
        assert made.batch_shape == leading
        z = made.rsample((5,))
        assert z.shape == (5, *leading, 2)
        assert made.log_prob(z).shape == (5, *leading)
    context = torch.randn(2, 3, 3)
    made, z = core(context), core(context).sample()
    one_by_one = [core(context[i, j]).log_prob(z[i, j]) for i, j in itertools.product(range(2), range(3))]
    assert torch.allclose(made.log_prob(z).flatten(), torch.stack(one_by_one), atol=1e-10)


@every_family
def test_a_step_never_waits_for_the_device(word):
    # Fake tensors hold no numbers: asking one for its value, as .item() or an if would, raises.
    core, prior = core_of(word), None if FAMILIES[word].moving_support else FamilyPrior((2,), family=word)
    with pyro.validation_enabled(False), FakeTensorMode(allow_non_fake_inputs=True):
        made = core(torch.zeros(4, 3))
        z = made.rsample()
        (made.log_prob(z) if prior is None else made.log_prob(z) - prior().log_prob(z)).sum().backward()


def tiny_pair(word):
    prior = FamilyPrior((2,), family=word) if word in ("dirichlet", "cauchy") else StandardNormal((2,))
    model = LatentVariableModel(prior, FixedGaussian((3,), (2,), Linear))
    return model, Amortized(FamilyConditional((2,), (3,), Linear, word, model))


@pytest.mark.row("1.12", "1.13", "1.14")
@every_family
def test_two_steps_of_training(word):
    model, guide = tiny_pair(word)
    parameters = {**dict(model.named_parameters(prefix="model")), **dict(guide.named_parameters(prefix="guide"))}
    before = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer, x = torch.optim.Adam(parameters.values(), lr=0.01), torch.randn(16, 3)
    for objective in (ELBO(particles=2), IWAE(particles=3)):
        optimizer.zero_grad()
        bound = objective.bound(model, guide, x)
        (-bound.mean()).backward()
        assert bound.isfinite().all()
        for name, value in parameters.items():
            assert value.grad.isfinite().all(), name
            assert value.grad.abs().sum() > 0, name
        optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in parameters.items())
    dead = (guide.core.net.output.weight.grad == 0).all(1)  # of each entry of each parameter of the family
    assert dead.sum() == (1 if word == "elliptical" else 0)  # the net writes the whole matrix, upper triangle and all


def test_pyro_s_own_elbo_trains_it():
    model, guide = tiny_pair("gompertz")
    svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO())
    x = torch.randn(50, 3)
    losses = [svi.step(x) for _ in range(150)]
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:20])


def test_a_positive_guide_under_a_normal_prior_gives_a_bound():
    model = LatentVariableModel(StandardNormal((1,)), FixedGaussian((2,), (1,), Linear))
    x = torch.randn(6, 2)
    weight, loc = model.likelihood.net.output.weight.detach(), model.likelihood.net.output.bias.detach()
    evidence = torch.distributions.MultivariateNormal(loc, weight @ weight.T + torch.eye(2)).log_prob(x)
    core = FamilyConditional((1,), (2,), Linear, "gamma", model)
    with torch.no_grad():
        draws = torch.stack([ELBO(particles=500).bound(model, Amortized(core), x) for _ in range(20)])
    upper = draws.mean(0) + 5 * draws.std(0) / 20**0.5
    assert (upper < evidence).all()


def test_gaussian_is_the_diagonal_guide():
    core, other = core_of("gaussian"), DiagonalNormal((2,), (3,), Linear)
    other.load_state_dict(core.state_dict())
    x, z = torch.randn(4, 3), torch.randn(4, 2)
    assert torch.equal(core(x).log_prob(z), other(x).log_prob(z))


@pytest.mark.parametrize("word", ["laplace", "triangular", "elliptical", "dirichlet"])
def test_events_of_more_dimensions(word):
    core = FamilyConditional((2, 4, 3), (5,), Linear, word)
    made = core(torch.randn(7, 5))
    assert (made.batch_shape, made.event_shape) == ((7,), (2, 4, 3))
    assert made.rsample().shape == (7, 2, 4, 3)
    per_entry = {"laplace": (4, 4, 3), "triangular": (6, 4, 3), "elliptical": (8 * (3 + 9 + 1),), "dirichlet": (24,)}
    assert core.output_shape == per_entry[word]


@pytest.mark.parametrize(
    ("prior", "accepted"),
    [
        ("gaussian", set(FAMILIES) - {"dirichlet", "cauchy"}),
        ("laplace", set(FAMILIES) - {"dirichlet", "cauchy"}),
        ("student_t", set(FAMILIES) - {"dirichlet"}),
        ("cauchy", set(FAMILIES) - {"dirichlet"}),
        ("elliptical", set(FAMILIES) - {"dirichlet", "cauchy", "student_t", "pareto", "f"}),
        ("exponential", set(families_inside("positive"))),
        ("gamma", {"exponential", "rayleigh", "pareto", "reciprocal", "weibull", "gompertz", "erlang", "lognormal"}),
        ("beta", {"beta"}),
        ("dirichlet", {"dirichlet"}),
    ],
)
def test_a_guide_stays_inside_the_prior(prior, accepted):
    model = LatentVariableModel(FamilyPrior((2,), family=prior), FixedGaussian((3,), (2,), Linear))
    if prior == "gamma":
        accepted = accepted | {"gamma", "chi2", "f", "beta"}
    for word in FAMILIES:
        if word in accepted:
            FamilyConditional((2,), (3,), Linear, word, model)
        else:
            with pytest.raises(ValueError, match=f"{word} .*(prior's support|moments up to order).*accepted"):
                FamilyConditional((2,), (3,), Linear, word, model)


POWER_LAWS = {"cauchy": lambda: stats.cauchy(), "student_t": lambda: stats.t(2.01), "f": lambda: stats.f(3, 4.01)}
POWER_LAWS["pareto"] = lambda: stats.pareto(2.01)


@every_family
def test_moments_and_tails_of_the_table_are_scipys(word):
    """Of the heaviest tails the table's moment exists and the next does not; how log-densities fall far out."""
    family, far = FAMILIES[word], np.array([1e3, 1e5])
    if word in POWER_LAWS:
        # z^m p(z) has an integral where it falls faster than 1/z, which its values at two far points tell.
        for order, finite in ((family.moments, True), (family.moments + 1, False)):
            log_integrand = order * np.log(far) + POWER_LAWS[word]().logpdf(far)
            assert (np.diff(log_integrand)[0] / np.log(100) < -1.001) == finite
    else:
        assert family.moments == INF
    with np.errstate(all="ignore"):
        for side in (1, -1):  # the power of |z| in which -log p grows
            near, beyond = -by_scipy(word).logpdf(side * far)
            if np.isfinite([near, beyond]).all():
                assert np.log(beyond / near) / np.log(100) < family.tail_order + 0.2
            elif np.isfinite(near):
                assert family.tail_order == INF


def test_a_cauchy_guide_has_no_bound_under_a_normal_prior():
    """What is refused: the mean of log p(z) is minus infinity, and averages of draws run away."""
    z = FAMILIES["cauchy"].constructor(torch.zeros(100_000), torch.ones(100_000)).rsample()
    log_p = StandardNormal((1,))().log_prob(z.unsqueeze(-1))
    assert float(log_p.mean()) < -1000
    with pytest.raises(ConfigError, match=r"cauchy has absolute moments up to order 0.*prior.family=cauchy"):
        assemble(load(["guide=family", "guide.family=cauchy"]))
    assemble(load(["guide=family", "guide.family=cauchy", "prior=family", "prior.family=cauchy"]))


def test_discrete_priors_have_no_family():
    class Counts(StandardNormal):
        def forward(self, *context):
            return dist.Poisson(self.scale).to_event(1)

    model = LatentVariableModel(Counts((2,)), FixedGaussian((3,), (2,), Linear))
    with pytest.raises(ValueError, match="no family under that prior"):
        FamilyConditional((2,), (3,), Linear, "gamma", model)


def test_a_prior_of_every_fixed_support():
    for word, family in FAMILIES.items():
        if family.moving_support:
            with pytest.raises(ValueError, match=f"support of {word} moves"):
                FamilyPrior((2,), family=word)
            continue
        prior = FamilyPrior((2,), family=word)
        z = prior().sample((5,))
        assert z.shape == (5, 2)
        prior().log_prob(z).sum().backward()
        assert prior.unconstrained.grad.abs().sum() > 0
    z = torch.randn(5, 2)
    assert torch.equal(FamilyPrior((2,))().log_prob(z), StandardNormal((2,))().log_prob(z))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"unknown family 'normal'; accepted: beta, .*weibull"):
        core_of("normal")
    with pytest.raises(ValueError, match="last dimension of at least 2"):
        core_of("dirichlet", event=(1,))
    with pytest.raises(ValueError, match="at least one dimension"):
        core_of("laplace", event=())


def test_by_name():
    setup = assemble(load(["guide=family", "guide.family=laplace", "encoder.hidden=[4]", "decoder.hidden=[4]"]))
    assert isinstance(setup.guide.core(torch.zeros(2, *setup.dataset.shape)).base_dist, dist.Laplace)
    setup = assemble(load(["guide=family", "guide.family=dirichlet", "prior=family", "prior.family=dirichlet"]))
    assert setup.guide.core.family == "dirichlet"
    with pytest.raises(ConfigError, match=r"guide=family: KL.* draws of dirichlet .*prior.family=dirichlet"):
        assemble(load(["guide=family", "guide.family=dirichlet"]))


STEEP = {"gompertz": "right", "gumbel": "left"}


@pytest.mark.parametrize("word", sorted(FAMILIES))
def test_tails_that_an_exponential_outgrows_are_scipys(word):
    """Far out, -log p that grows faster than |z| leaves exponentials a mean."""
    family = FAMILIES[word]
    assert family.steep == STEEP.get(word, "")
    if word in ("dirichlet", "elliptical", "weibull", "laplace"):  # on a simplex; of any power; scipy underflows
        assert word == "dirichlet" or not family.is_light("right")
        return
    with np.errstate(all="ignore"):
        for side, where in ((1, "right"), (-1, "left")):
            far, beyond = -by_scipy(word).logpdf(side * np.array([1e4, 1e5]))
            outgrows = not np.isfinite(beyond) or beyond / far > 20  # faster than a line
            assert family.is_light(where) == outgrows, where


@pytest.mark.parametrize(
    ("prior", "q", "finite"),
    [
        *(("gompertz", q, False) for q in ("lognormal", "gamma", "exponential", "erlang", "chi2", "weibull", "f")),
        *(("gompertz", q, True) for q in ("rayleigh", "gompertz", "reciprocal", "beta")),
        *(("gumbel", q, False) for q in ("laplace", "logistic", "student_t", "elliptical", "cauchy")),
        *(("gumbel", q, True) for q in ("gaussian", "uniform", "triangular", "gumbel", "gamma", "lognormal")),
    ],
)
def test_priors_that_fall_exponentially_ask_for_means_of_exponentials(prior, q, finite):
    words = ["data=iris", "device=cpu", "prior=family", f"prior.family={prior}", "guide=family", f"guide.family={q}"]
    if finite:
        assemble(load(words))
    else:
        with pytest.raises(ConfigError, match=r"KL\(q \|\| p\) is infinite.*accepted: "):
            assemble(load(words))


def test_what_is_refused_has_means_that_run_away():
    """log p of a Gompertz prior under a log-normal: finite at every draw, and without a mean."""
    z = FAMILIES["lognormal"].constructor(torch.zeros(100_000), torch.ones(100_000)).rsample()
    log_p = FAMILIES["gompertz"].constructor(torch.ones(()), torch.ones(())).log_prob(z)
    assert float(log_p.mean()) < -1e6
    assert float(log_p.median()) > -20
