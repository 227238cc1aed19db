"""How like data are samples? Numbers on arrays alone, for densities and for models that have none."""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import laplace
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture


class Yardstick:
    """A Gaussian mixture of the principal components of data, under which samples of any model are scored.

    It knows nothing of the models, and is no truth either: it is good for comparing models on the same data.

    Args:
        x: training data, ``(N, D)``.
        components: principal components kept; at most what the data have.
        clusters: of the mixture; at most a tenth of the data.
    """

    def __init__(self, x: np.ndarray, components: int = 12, clusters: int = 10) -> None:
        components = min(components, x.shape[1], len(x) - 1)
        self.pca = PCA(components, random_state=0).fit(x)
        clusters = max(1, min(clusters, len(x) // 10))
        self.mixture = GaussianMixture(clusters, random_state=0, reg_covar=1e-4).fit(self.pca.transform(x))

    def nll(self, x: np.ndarray) -> float:
        """Mean -log density of ``(n, D)``, in nats."""
        return -float(self.mixture.score(self.pca.transform(x)))


@dataclass(frozen=True)
class TwoSample:
    """A two-sample test: the statistic, and what it is below in 95 of 100 relabellings of the pooled samples."""

    statistic: float
    threshold: float


def energy_distance(first: np.ndarray, second: np.ndarray) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of ``(n, D)`` and ``(m, D)``, without bias (Szekely and Rizzo 2013).

    Zero on average if and only if both have one distribution, and then below zero half of the time.
    """
    return _energy(cdist(np.concatenate([first, second]), np.concatenate([first, second])), np.arange(len(first)))


def energy_test(first: np.ndarray, second: np.ndarray, relabellings: int = 200, seed: int = 0) -> TwoSample:
    """The energy distance of two samples and its threshold at 95 % under random relabelling."""
    pooled = np.concatenate([first, second])
    distance, rng = cdist(pooled, pooled), np.random.default_rng(seed)
    null = [_energy(distance, rng.permutation(len(pooled))[: len(first)]) for _ in range(relabellings)]
    return TwoSample(_energy(distance, np.arange(len(first))), float(np.quantile(null, 0.95)))


def _energy(distance: np.ndarray, first: np.ndarray) -> float:
    """From all distances of the pooled sample, and the places of the first one in it."""
    mine = np.zeros(len(distance), dtype=bool)
    mine[first] = True
    n, m = int(mine.sum()), int((~mine).sum())
    within = distance[mine][:, mine].sum() / (n * (n - 1)) + distance[~mine][:, ~mine].sum() / (m * (m - 1))
    return float(2 * distance[mine][:, ~mine].mean() - within)


def sharpness(images: np.ndarray) -> float:
    """Mean square of the Laplacian over pixels of images ``(n, C, H, W)``: the less, the more blurred."""
    return float(np.mean([np.square(laplace(channel)) for image in images for channel in image]))


def normal_kl(codes: np.ndarray) -> float:
    """KL(N(mean, covariance) || N(0, I)) of a normal fitted to codes ``(N, D)``, in nats."""
    loc, covariance = codes.mean(0), np.atleast_2d(np.cov(codes.T))
    _, log_det = np.linalg.slogdet(covariance)
    return float(0.5 * (np.trace(covariance) + loc @ loc - codes.shape[1] - log_det))
