"""Probabilistic PCA: the linear-Gaussian latent-variable model, in which everything has a closed form."""

from collections.abc import Sequence
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from models.latent import LatentVariableModel
from models.likelihoods import LearnedGaussian
from models.nets import Linear, batch_shape
from models.priors import StandardNormal


class LinearGaussian(LearnedGaussian):
    """An affine decoder and one learned standard deviation: x = W z + mu + noise.

    Args:
        event_shape: shape of one datum; W and mu see it flattened to D numbers.
        context_shape: shape of one latent, flattened to Q numbers.
        scale: the standard deviation to start from, in the units of the data; see :class:`LearnedGaussian`.
    """

    net: Linear

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int], scale: float | None = None) -> None:
        super().__init__(event_shape, context_shape, Linear, scale)

    @property
    def weight(self) -> Tensor:
        """W, shape ``(D, Q)``."""
        return self.net.output.weight

    @property
    def loc(self) -> Tensor:
        """mu, shape ``(D,)``."""
        return self.net.output.bias


class PPCASolution(NamedTuple):
    """Parameters of probabilistic PCA: ``weight`` (D, Q), ``loc`` (D,) and the standard deviation ``scale`` ()."""

    weight: Tensor
    loc: Tensor
    scale: Tensor


def maximum_likelihood(x: Tensor, latent_dim: int) -> PPCASolution:
    """The likeliest parameters for data ``x`` of shape ``(N, D)`` (Tipping and Bishop 1999, equations 7 and 8).

    Eigenvalues are those of the sample covariance with divisor N. W is found up to a rotation of the latents; the
    one returned has orthogonal columns, from the largest eigenvalue on.

    Raises:
        ValueError: where no noise remains: unless ``latent_dim`` is below the rank of the centred data.
    """
    size, total = x.shape
    loc = x.mean(0)
    centred = x - loc
    eigenvalues, eigenvectors = torch.linalg.eigh(centred.T @ centred / size)
    eigenvalues, eigenvectors = eigenvalues.flip(-1), eigenvectors.flip(-1)
    variance = eigenvalues[latent_dim:].clamp(min=0).sum() / max(total - latent_dim, 1)
    if not variance > total * torch.finfo(x.dtype).eps * eigenvalues[0]:
        raise ValueError(
            f"latent_dim must be below the rank of the data, or no noise is left: got latent_dim {latent_dim} for "
            f"{size} data of {total} entries"
        )
    weight = eigenvectors[:, :latent_dim] * (eigenvalues[:latent_dim] - variance).clamp(min=0).sqrt()
    return PPCASolution(weight, loc, variance.sqrt())


class WaterFilling(NamedTuple):
    """What the best linear code spends: ``active`` directions, ``rate`` in nats, ``distortion`` in squared error."""

    active: int
    rate: float
    distortion: float


def reverse_water_filling(eigenvalues: Tensor, level: float, latent_dim: int | None = None) -> WaterFilling:
    """The optimum of the linear beta-VAE (Lucas et al. 2019, section 4), which is that of Gaussian rate-distortion
    theory (Cover and Thomas 2006, theorem 10.3.3).

    With noise of standard deviation s held fixed and beta times the KL, a direction of the data is coded if its
    variance lambda is above the water level beta s^2: R = 1/2 sum log(lambda / level) over those, and
    D = E |x - x'|^2 = sum min(lambda, level).

    Args:
        eigenvalues: of the covariance of the data, ``(D,)``.
        level: beta s^2, in the units of the eigenvalues, positive.
        latent_dim: number of latents, where there are fewer than directions worth coding.
    """
    if not level > 0:
        raise ValueError(f"level must be positive, got {level}")
    ordered = eigenvalues.double().sort(descending=True).values
    ratio = (ordered / level)[: latent_dim or len(ordered)]
    coded = ratio[ratio > 1]
    left = ordered[len(coded) :].sum()
    return WaterFilling(len(coded), float(0.5 * coded.log().sum()), float(level * len(coded) + left))


def _root_of_inverse(matrix: Tensor) -> Tensor:
    """The lower triangular L with ``L L^T`` the inverse of a positive definite matrix."""
    # The Cholesky factor of the matrix read backwards is, read backwards again, upper triangular. The variant that
    # does not check its input spares a wait for the device.
    reversed_root = torch.linalg.cholesky_ex(matrix.flip(-2, -1)).L.flip(-2, -1)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(reversed_root.T, identity, upper=False)


class PPCA(LatentVariableModel):
    """Probabilistic PCA, z ~ N(0, I) and x ~ N(W z + mu, scale^2 I) (Tipping and Bishop 1999, section 3).

    Args:
        event_shape: shape of one datum, D numbers.
        latent_dim: number of latents, Q.
    """

    likelihood: LinearGaussian

    def __init__(self, event_shape: Sequence[int], latent_dim: int = 2) -> None:
        super().__init__(StandardNormal((latent_dim,)), LinearGaussian(event_shape, (latent_dim,)))

    def _flat(self, x: Tensor) -> Tensor:
        event_shape = self.likelihood.event_shape
        return x.reshape((*batch_shape(x, event_shape), event_shape.numel()))  # (*batch, *event) -> (*batch, D)

    def evidence(self) -> dist.Distribution:
        """The marginal of a flattened datum, N(mu, W W^T + scale^2 I)."""
        p = self.likelihood
        variance = p.scale.square().expand(p.loc.shape)
        return dist.LowRankMultivariateNormal(p.loc, p.weight, variance)

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) in nats, ``(N, *event_shape) -> (N,)``."""
        return self.evidence().log_prob(self._flat(x))

    def covariance(self) -> Tensor:
        """W W^T + scale^2 I, shape ``(D, D)``."""
        return self.evidence().covariance_matrix

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """p(z|x) = N(M^-1 W^T (x - mu), scale^2 M^-1), M = W^T W + scale^2 I (Tipping and Bishop 1999, section 3.3).

        Takes data of shape ``(N, *event_shape)``; the batch shape is ``(N,)``.
        """
        p = self.likelihood
        identity = torch.eye(p.weight.shape[1], dtype=p.weight.dtype, device=p.weight.device)
        root = _root_of_inverse(p.weight.T @ p.weight + p.scale.square() * identity)
        loc = (self._flat(x) - p.loc) @ p.weight @ (root @ root.T)
        return dist.MultivariateNormal(loc, scale_tril=p.scale * root)

    def maximum_likelihood(self, x: Tensor) -> PPCASolution:
        """Set the parameters to the likeliest for data ``(N, *event_shape)``, and return them; see the function."""
        p = self.likelihood
        solution = maximum_likelihood(self._flat(x), p.weight.shape[1])
        with torch.no_grad():
            p.weight.copy_(solution.weight)
            p.loc.copy_(solution.loc)
            p.log_scale.copy_(solution.scale.log())
        return solution
