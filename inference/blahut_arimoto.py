"""Rate and distortion of a finite source by alternating minimization (Blahut 1972; Arimoto 1972)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, xlogy

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Channel:
    """A point of the rate-distortion curve, and the test channel that attains it."""

    rate: float  # I(y; z), nats
    distortion: float  # E d(y, z)
    posterior: Array  # q(z|y), (M, S)
    marginal: Array  # q(z), (S,)
    gap: float  # nats by which rate + multiplier x distortion can at most exceed its minimum


def blahut_arimoto(
    source: Array, distortion: Array, multiplier: float, tolerance: float = 1e-12, iterations: int = 100_000
) -> Channel:
    """Minimize I(y; z) + multiplier x E d(y, z) over all channels q(z|y).

    Each half step is a closed form: q(z|y) proportional to q(z) exp(-multiplier d(y, z)), and q(z) its average over
    the source. It stops by the certificate of Kuhn and Tucker: with c(z) = E_y exp(-multiplier d(y, z)) / sum_z' q(z')
    exp(-multiplier d(y, z')), the minimum has c(z) <= 1 everywhere, and log max_z c(z) bounds how far off it is.

    Args:
        source: p(y), ``(M,)``.
        distortion: d(y, z), ``(M, S)``.
        multiplier: nats per unit of distortion, at least 0: minus the slope of the curve.
        tolerance: of the certificate, in nats.
        iterations: most of them.

    Raises:
        ValueError: no distribution, or shapes that do not match.
    """
    source, distortion = np.asarray(source, dtype=float), np.asarray(distortion, dtype=float)
    if distortion.ndim != 2 or source.shape != distortion.shape[:1]:
        raise ValueError(f"a source of M symbols goes with distortions (M, S), got {source.shape}, {distortion.shape}")
    if not (source >= 0).all() or not abs(source.sum() - 1) < 1e-9 or not multiplier >= 0:
        raise ValueError("the source holds probabilities that add up to 1, and the multiplier is 0 or above")
    log_kernel = -multiplier * distortion
    log_marginal = np.full(distortion.shape[1], -np.log(distortion.shape[1]))
    for _ in range(iterations):
        log_normalizer = logsumexp(log_marginal + log_kernel, axis=1)  # (M,)
        growth = source @ np.exp(log_kernel - log_normalizer[:, None])  # c(z)
        gap = float(np.log(growth.max()))
        if gap < tolerance:
            break
        with np.errstate(divide="ignore"):
            log_marginal = log_marginal + np.log(growth)
    log_posterior = log_marginal + log_kernel - log_normalizer[:, None]
    posterior = np.exp(log_posterior)
    marginal = source @ posterior
    rate = float(source @ (xlogy(posterior, posterior) - xlogy(posterior, marginal)).sum(1))
    return Channel(rate, float((source[:, None] * posterior * distortion).sum()), posterior, marginal, gap)


def curve(source: Array, distortion: Array, multipliers: Array, tolerance: float = 1e-9) -> Array:
    """Rates and distortions along the curve, ``(len(multipliers), 2)``."""
    found = [blahut_arimoto(source, distortion, float(multiplier), tolerance) for multiplier in multipliers]
    return np.array([(channel.rate, channel.distortion) for channel in found])


def entropy(probabilities: Array) -> float:
    """H(p) in nats."""
    return float(-xlogy(probabilities, probabilities).sum())


def mutual_information(source: Array, posterior: Array) -> float:
    """I(y; z) in nats of a source p(y), ``(M,)``, and a channel q(z|y), ``(M, S)``."""
    marginal = source @ posterior
    return float(source @ (xlogy(posterior, posterior) - xlogy(posterior, marginal)).sum(1))
