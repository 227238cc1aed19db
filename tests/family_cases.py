"""One member of every reparameterizable family, and the same by scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from models.families import FAMILIES

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
