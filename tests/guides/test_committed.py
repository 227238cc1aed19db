"""The committed rate: no parameters whatever bring the KL below it."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import toeplitz
from scipy.optimize import minimize
from torch.distributions import kl_divergence

from guides.committed import CommittedNormal, largest_scale
from guides.gaussian import DiagonalNormal
from inference.assemble import assemble
from inference.config import ConfigError, load
from inference.diagnostics import elbo_terms
from models.autoregressive_prior import AR1Prior, committed_rate, correlation_for
from models.nets import MLP
from models.priors import StandardNormal

NET = partial(MLP, hidden=(4,))
DIM = 3


def committed(rate):
    return CommittedNormal((DIM,), (2,), NET, SimpleNamespace(prior=StandardNormal((DIM,))), rate)


@pytest.mark.parametrize("rate", [0.1, 2.0, 30.0])
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0])
def test_no_parameters_fall_below_the_rate(rate, size):
    guide, x = committed(rate), torch.randn(50, 2)
    prior = StandardNormal((DIM,))()
    plain = DiagonalNormal((DIM,), (2,), NET)
    for part in (guide, plain):
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.copy_(size * torch.randn_like(parameter))
    assert (kl_divergence(guide(x), prior) >= rate * (1 - 1e-9)).all()
    assert size != 0 or (kl_divergence(plain(x), prior) < 0.1).all()


def test_the_rate_is_reached_where_the_kl_is_smallest():
    guide, x = committed(2.0), torch.randn(1, 2)
    output = guide.core.net.output
    with torch.no_grad():
        output.weight.zero_()
        output.bias.copy_(torch.cat([torch.zeros(DIM), torch.full((DIM,), 50.0)]))  # mean zero, the largest scale
    assert kl_divergence(guide(x), StandardNormal((DIM,))()).item() == pytest.approx(2.0, rel=1e-9)
    for nats in (1e-3, 1.0, 50.0):
        scale = largest_scale(nats)
        assert scale < 1
        assert -np.log(scale) + (scale**2 - 1) / 2 == pytest.approx(nats, rel=1e-7)


@pytest.mark.parametrize(("steps", "rate"), [(2, 0.5), (5, 2.0), (16, 10.0)])
def test_no_diagonal_normal_is_nearer_to_the_autoregression(steps, rate):
    prior = AR1Prior((steps,), rate=rate)
    a = prior.correlation
    covariance = toeplitz(a ** np.arange(steps))
    assert np.allclose(prior().covariance_matrix.numpy(), covariance, atol=1e-10)
    precision, log_det = np.linalg.inv(covariance), np.linalg.slogdet(covariance)[1]

    def kl(log_scale):  # of N(0, diag s^2)
        variance = np.exp(2 * log_scale)
        return 0.5 * (np.diag(precision) @ variance - steps + log_det - 2 * log_scale.sum())

    found = minimize(kl, np.zeros(steps), method="BFGS")
    assert found.fun == pytest.approx(rate, abs=1e-6)
    assert kl(np.zeros(steps)) > rate + 0.1
    assert committed_rate(correlation_for(rate, steps), steps) == pytest.approx(rate, rel=1e-9)
    guide = DiagonalNormal((steps,), (2,), NET)
    for size in (0.1, 1.0, 5.0):
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.copy_(size * torch.randn_like(parameter))
        assert (kl_divergence(guide(torch.randn(20, 2)), prior()) >= rate).all()


def test_as_parts_of_a_run():
    for words in (["guide=committed", "guide.rate=3"], ["prior=ar1", "prior.rate=3"]):
        setup = assemble(load([*words, "objective=elbo", "objective.kl=analytic"]))
        terms = elbo_terms(setup.model, setup.guide, setup.source("test").fixed())
        assert terms.kl_estimator == "closed form"
        assert (terms.kl >= 3 * (1 - 1e-6)).all()
    with pytest.raises(ConfigError, match="accepted: prior=standard"):
        assemble(load(["guide=committed", "prior=mixture"]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: committed(0.0), "above 0"),
        (lambda: AR1Prior((1,)), "at least 2"),
        (lambda: AR1Prior((3,), rate=-1.0), "above 0"),
        (lambda: AR1Prior((2,), rate=50.0), "fewer nats or more latents"),
    ],
)
def test_rates_that_cannot_be_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
