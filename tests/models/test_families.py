"""Every reparameterizable family against scipy: draws, densities, quantiles and moments."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from models.families import FAMILIES
from tests.family_cases import CASES, INF, WITH_QUANTILES, by_scipy, draws, every_family, leaves, member, numbers


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
