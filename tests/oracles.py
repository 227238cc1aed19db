"""Closed forms and brute force: the answers that tests compare with.

Plain numpy and scipy, independent of the packages under test. Arrays are float64, logarithms natural.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp
from scipy.stats import multivariate_normal

Array = NDArray[np.float64]

# --- Gaussians ---------------------------------------------------------------------------------------------------


def negative_entropy(scale: Array) -> float:
    """The integral of q log q for q = N(., diag scale^2), shape ``(d,)``."""
    return float(-0.5 * np.sum(np.log(2 * math.pi) + 2 * np.log(scale) + 1))


def standard_normal_expectation(loc: Array, scale: Array) -> float:
    """The integral of q log p for q = N(loc, diag scale^2) and p = N(0, I)."""
    return float(-0.5 * np.sum(np.log(2 * math.pi) + loc**2 + scale**2))


def gaussian_kl(loc: Array, covariance: Array, other_loc: Array | None = None, other: Array | None = None) -> float:
    """KL(N(loc, covariance) || N(other_loc, other)) for full covariances; the second is N(0, I) unless given."""
    size = len(loc)
    other_loc = np.zeros(size) if other_loc is None else other_loc
    other = np.eye(size) if other is None else other
    difference = other_loc - loc
    quadratic = np.trace(np.linalg.solve(other, covariance)) + difference @ np.linalg.solve(other, difference)
    return float(0.5 * (quadratic - size + np.linalg.slogdet(other)[1] - np.linalg.slogdet(covariance)[1]))


def diagonal_kl(loc: Array, scale: Array) -> float:
    """KL(N(loc, diag scale^2) || N(0, I)), as the slides write it."""
    return float(-0.5 * np.sum(1 + np.log(scale**2) - loc**2 - scale**2))


def normal_expectations(f, loc: float, scale: float, points: int = 60) -> Array:
    """E f(z) for scalar z ~ N(loc, scale^2) by Gauss-Hermite quadrature; ``f`` takes all points at once."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    return np.tensordot(weights / weights.sum(), f(loc + scale * nodes), axes=1)


# --- Probabilistic PCA -------------------------------------------------------------------------------------------


class LinearModel(NamedTuple):
    """x = weight z + loc + scale noise: ``weight`` (D, Q), ``loc`` (D,), ``scale`` a standard deviation."""

    weight: Array
    loc: Array
    scale: float


def ppca_covariance(model: LinearModel) -> Array:
    return model.weight @ model.weight.T + model.scale**2 * np.eye(len(model.loc))


def ppca_log_evidence(x: Array, model: LinearModel) -> Array:
    """log p(x) of each row."""
    return np.atleast_1d(multivariate_normal(model.loc, ppca_covariance(model)).logpdf(x))


def ppca_posterior(x: Array, model: LinearModel) -> tuple[Array, Array]:
    """Means (N, Q) and the covariance (Q, Q) of z given x, by conditioning the joint Gaussian of (z, x) in blocks."""
    gain = np.linalg.solve(ppca_covariance(model), model.weight).T  # cov(z, x) cov(x, x)^-1
    return (x - model.loc) @ gain.T, np.eye(model.weight.shape[1]) - gain @ model.weight


def ppca_elbo(x: Array, model: LinearModel, loc: Array, covariance: Array) -> Array:
    """The ELBO of each row of ``x`` under q = N(loc, covariance), ``loc`` (N, Q): exact, with no sampling."""
    size = x.shape[1]
    residual = x - model.loc - loc @ model.weight.T
    spread = np.trace(model.weight @ covariance @ model.weight.T)
    distortion = (np.sum(residual**2, axis=1) + spread) / (2 * model.scale**2)
    rate = np.array([gaussian_kl(row, covariance) for row in loc])
    return -distortion - size / 2 * math.log(2 * math.pi * model.scale**2) - rate


def ppca_maximum(x: Array, latent_dim: int) -> tuple[LinearModel, float]:
    """The likeliest parameters by singular values, and the mean log-likelihood there (Tipping and Bishop 1999)."""
    size, total = x.shape
    loc = x.mean(0)
    _, singular, vectors = np.linalg.svd(x - loc, full_matrices=False)
    eigenvalues = np.zeros(total)
    eigenvalues[: len(singular)] = singular**2 / size
    variance = eigenvalues[latent_dim:].mean()
    weight = vectors[:latent_dim].T * np.sqrt(eigenvalues[:latent_dim] - variance)
    log_determinant = np.log(eigenvalues[:latent_dim]).sum() + (total - latent_dim) * math.log(variance)
    log_likelihood = -0.5 * (total * math.log(2 * math.pi) + log_determinant + total)
    return LinearModel(weight, loc, math.sqrt(variance)), log_likelihood


# --- A tiny discrete VAE -----------------------------------------------------------------------------------------


def binary_table(bits: int) -> Array:
    """All ``2^bits`` binary vectors, one a row, counting upwards with the first bit the most significant."""
    return np.array(list(itertools.product([0.0, 1.0], repeat=bits)))


class DiscreteVAE(NamedTuple):
    """Every p(x, z) for S latent states and all data of a few binary pixels.

    ``prior`` (S,) are probabilities; ``pixel_logits`` (S, pixels) are the Bernoulli logits of p(x|z).
    """

    prior: Array
    pixel_logits: Array

    def data(self) -> Array:
        """All possible data, ``(2^pixels, pixels)``."""
        return binary_table(self.pixel_logits.shape[1])

    def log_likelihood(self, x: Array) -> Array:
        """log p(x|z), ``(N, S)``, for data ``(N, pixels)``."""
        log_one, log_zero = -np.logaddexp(0, -self.pixel_logits), -np.logaddexp(0, self.pixel_logits)
        return x @ log_one.T + (1 - x) @ log_zero.T

    def log_joint(self, x: Array) -> Array:
        """log p(x, z), ``(N, S)``."""
        return self.log_likelihood(x) + np.log(self.prior)

    def log_evidence(self, x: Array) -> Array:
        """log p(x), ``(N,)``."""
        return logsumexp(self.log_joint(x), axis=1)

    def posterior(self, x: Array) -> Array:
        """p(z|x), ``(N, S)``."""
        return np.exp(log_softmax(self.log_joint(x), axis=1))

    def elbo(self, x: Array, q: Array) -> Array:
        """The ELBO of each datum as the expected log-ratio under ``q`` (N, S), rows of probabilities, ``(N,)``."""
        return np.sum(q * (self.log_joint(x) - _log(q)), axis=1)

    def elbo_as_reconstruction_minus_kl(self, x: Array, q: Array) -> Array:
        return np.sum(q * self.log_likelihood(x), axis=1) - discrete_kl(q, self.prior)

    def elbo_as_evidence_minus_kl(self, x: Array, q: Array) -> Array:
        return self.log_evidence(x) - discrete_kl(q, self.posterior(x))


def _log(p: Array) -> Array:
    return np.log(np.where(p > 0, p, 1.0))  # 0 log 0 = 0 in the products above


def discrete_kl(q: Array, p: Array) -> Array:
    """KL(q || p) along the last axis, in nats."""
    return np.sum(q * (_log(q) - np.log(p)), axis=-1)


def tiny_discrete_vae(seed: int = 0, bits: int = 3, pixels: int = 6) -> DiscreteVAE:
    """A random :class:`DiscreteVAE` of ``2^bits`` states."""
    rng = np.random.default_rng(seed)
    return DiscreteVAE(rng.dirichlet(np.ones(2**bits)), rng.normal(scale=1.5, size=(2**bits, pixels)))


def random_tables(count: int, states: int, seed: int = 0) -> Array:
    """``count`` random probability vectors, ``(count, states)``."""
    return np.random.default_rng(seed).dirichlet(np.ones(states), size=count)


def iwae_by_enumeration(log_weights: Array, q: Array, particles: int) -> float:
    """The importance-weighted bound by summing over all K-tuples of states (Burda et al. 2016, equation 8).

    Args:
        log_weights: log p(x, z) - log q(z|x) of one datum for each of S states, ``(S,)``.
        q: q(z|x), ``(S,)``.
        particles: K; the sum has S^K terms.
    """
    tuples = np.array(list(itertools.product(range(len(q)), repeat=particles)))
    probability = np.prod(q[tuples], axis=1)
    return float(probability @ (logsumexp(log_weights[tuples], axis=1) - math.log(particles)))
