"""Quadrature and enumeration for the tests of the inference package.

Plain numpy and scipy, independent of the packages under test. Arrays are float64, logarithms natural.
"""

import itertools
import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import norm

Array = NDArray[np.float64]


def iwae_by_quadrature(log_weight, loc: float, scale: float, particles: int, points: int = 60) -> float:
    """The importance-weighted bound for one scalar latent, by K-dimensional Gauss-Hermite quadrature.

    Args:
        log_weight: log p(x, z) - log q(z|x) as a function of an array of z.
        loc: mean of q(z|x).
        scale: standard deviation of q(z|x).
        particles: K; the sum has ``points^K`` terms.
        points: nodes in each dimension.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    log_w, weights = log_weight(loc + scale * nodes), weights / weights.sum()
    total = 0.0
    for index in itertools.combinations_with_replacement(range(points), particles):
        counts = np.bincount(index, minlength=points)
        orders = math.factorial(particles) / np.prod([math.factorial(c) for c in counts[counts > 0]])
        chosen = list(index)
        total += orders * np.prod(weights[chosen]) * (logsumexp(log_w[chosen]) - math.log(particles))
    return float(total)


def _grid(loc: Array, scale: Array, points: int) -> tuple[Array, float]:
    low, high = np.min(loc - 12 * scale), np.max(loc + 12 * scale)
    grid = np.linspace(low, high, points)
    return grid, float(grid[1] - grid[0])


def scalar_surgery(loc: Array, scale: Array, points: int = 40_001) -> tuple[float, float, float]:
    """ELBO surgery of n scalar Gaussian posteriors against N(0, 1), by the trapezoidal rule on a wide grid.

    Returns the mean of KL(q_i || p), the mutual information of index and latent, and KL(q_agg || p).
    """
    grid, step = _grid(loc, scale, points)
    log_q = norm.logpdf(grid[:, None], loc, scale)  # (points, n)
    log_aggregate = logsumexp(log_q, axis=1) - math.log(len(loc))
    log_p = norm.logpdf(grid)
    q, aggregate = np.exp(log_q), np.exp(log_aggregate)
    kl = np.sum(q * (log_q - log_p[:, None])) * step / len(loc)
    information = np.sum(q * (log_q - log_aggregate[:, None])) * step / len(loc)
    marginal = np.sum(aggregate * (log_aggregate - log_p)) * step
    return float(kl), float(information), float(marginal)


def table_surgery(q: Array, prior: Array) -> tuple[float, float, float]:
    """The same for a table of discrete posteriors, ``(n, S)`` rows of positive probabilities."""
    aggregate = q.mean(0)
    kl = np.sum(q * (np.log(q) - np.log(prior)), axis=1).mean()
    information = np.sum(q * (np.log(q) - np.log(aggregate)), axis=1).mean()
    marginal = np.sum(aggregate * (np.log(aggregate) - np.log(prior)))
    return float(kl), float(information), float(marginal)


def best_diagonal_normal(precision: Array) -> tuple[Array, float]:
    """The diagonal normal closest to N(m, precision^-1) in KL(q || p): its standard deviations, and that divergence.

    Its mean is m and its precisions are the diagonal of the precision matrix.
    """
    diagonal = np.diag(precision)
    return 1 / np.sqrt(diagonal), float(0.5 * (np.log(diagonal).sum() - np.linalg.slogdet(precision)[1]))


def principal_angles(first: Array, second: Array) -> Array:
    """Angles between the column spaces of two matrices, in radians, by the sine, which resolves small ones."""
    a, b = np.linalg.qr(first)[0], np.linalg.qr(second)[0]
    return np.arcsin(np.clip(np.linalg.svd(b - a @ (a.T @ b), compute_uv=False), 0, 1))
