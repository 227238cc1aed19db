"""Probabilistic PCA: the linear-Gaussian latent-variable model, in which everything has a closed form."""

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from models.latent import LatentVariableModel
from models.likelihoods import LearnedGaussian
from models.nets import Linear, batch_shape
from models.priors import StandardNormal
from models.tractable import DegenerateError, Statistics, check_finite, check_overflow


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
        DegenerateError: where no noise remains: unless ``latent_dim`` is below the rank of the centred data.
    """
    size, total = x.shape
    loc = x.mean(0)
    centred = x - loc
    eigenvalues, eigenvectors = torch.linalg.eigh(centred.T @ centred / size)
    eigenvalues, eigenvectors = eigenvalues.flip(-1), eigenvectors.flip(-1)
    variance = eigenvalues[latent_dim:].clamp(min=0).sum() / max(total - latent_dim, 1)
    if not variance > total * torch.finfo(x.dtype).eps * eigenvalues[0]:
        raise DegenerateError(
            f"latent_dim must be below the rank of the data, or no noise is left: got latent_dim {latent_dim} for "
            f"{size} data of {total} entries; try a smaller one, or data that vary in more directions"
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


def _entropy(factor: Tensor) -> Tensor:
    """Of Gaussians with these Cholesky factors, ``(*batch, Q, Q) -> (*batch,)`` nats."""
    size = factor.shape[-1]
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * size * (1 + math.log(2 * math.pi))


class PPCA(LatentVariableModel):
    """Probabilistic PCA, z ~ N(0, I) and x ~ N(W z + mu, scale^2 I) (Tipping and Bishop 1999, section 3).

    Args:
        event_shape: shape of one datum, D numbers.
        latent_dim: number of latents, Q.
    """

    e_step_guide: ClassVar[str] = "exact"
    likelihood: LinearGaussian
    shift: Tensor

    def __init__(self, event_shape: Sequence[int], latent_dim: int = 2) -> None:
        super().__init__(StandardNormal((latent_dim,)), LinearGaussian(event_shape, (latent_dim,)))
        # Moments are taken about this point: near the data, so that variances do not cancel.
        self.register_buffer("shift", torch.zeros(self.likelihood.event_shape.numel()))

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
        p, root = self.likelihood, self._posterior_root()
        loc = (self._flat(x) - p.loc) @ p.weight @ (root @ root.T)
        return dist.MultivariateNormal(loc, scale_tril=p.scale * root)

    def _posterior_root(self) -> Tensor:
        """The lower triangular L with ``L L^T`` = M^-1, ``(Q, Q)``."""
        p = self.likelihood
        identity = torch.eye(p.weight.shape[1], dtype=p.weight.dtype, device=p.weight.device)
        return _root_of_inverse(p.weight.T @ p.weight + p.scale.square() * identity)

    # --- EM (Tipping and Bishop 1999, appendix B) --------------------------------------------------------------------

    @property
    def numbers_per_datum(self) -> int:
        """About how many numbers an E step makes for each datum."""
        return 2 * sum(self.likelihood.weight.shape)

    @torch.no_grad()
    def e_step(self, x: Tensor, hard: bool = False) -> tuple[Statistics, Tensor]:
        """See :class:`models.tractable.EMModel`; moments of (z, 1) with itself and with x, about :attr:`shift`."""
        p, root = self.likelihood, self._posterior_root()
        centred = self._flat(x) - p.loc
        z, zero = centred @ p.weight @ (root @ root.T), torch.zeros_like(p.log_scale)
        if hard:
            return self._statistics(x, z, zero, zero), self._log_mode(centred, z)
        factor = p.scale * root
        covariance, entropy = z.shape[0] * factor @ factor.T, z.shape[0] * _entropy(factor)
        return self._statistics(x, z, covariance, entropy), self.log_evidence(x)

    def statistics(self, x: Tensor, loc: Tensor, scale_tril: Tensor) -> Statistics:
        """Statistics of data under any Gaussian q(z|x), with its gradient: ``loc`` (N, Q), factors (N, Q, Q)."""
        covariance = torch.einsum("nij,nkj->ik", scale_tril, scale_tril)
        return self._statistics(x, loc, covariance, _entropy(scale_tril).sum())

    def _statistics(self, x: Tensor, z: Tensor, covariance: Tensor, entropy: Tensor) -> Statistics:
        """Of means ``z`` (N, Q), and covariances and entropies summed over the data."""
        around, width = self._flat(x) - self.shift, z.shape[1]
        ones = torch.cat([z, z.new_ones(z.shape[0], 1)], 1)  # (N, Q + 1)
        own = ones.T.double() @ ones.double()
        own[:width, :width] += covariance.double()
        return {
            "own": own,
            "cross": (ones.T @ around).double(),
            "square": around.square().sum(1).double().sum(),
            "entropy": entropy.double().squeeze(),
        }

    def _log_mode(self, centred: Tensor, z: Tensor) -> Tensor:
        """log p(x, z), ``(N,)`` nats, of data less mu."""
        p = self.likelihood
        standard = (centred - z @ p.weight.T) / p.scale
        size = z.shape[1] + centred.shape[1]
        squares = standard.square().sum(1) + z.square().sum(1)
        return -0.5 * (squares + size * math.log(2 * math.pi)) - centred.shape[1] * p.log_scale

    def expected_log_joint(self, statistics: Statistics) -> Tensor:
        """See :class:`models.tractable.EMModel`."""
        p, own = self.likelihood, statistics["own"]
        count, (size, width) = own[-1, -1], p.weight.shape
        affine = torch.cat([p.weight, (p.loc - self.shift).unsqueeze(1)], 1).double().T  # (Q + 1, D)
        residual = statistics["square"] - 2 * (affine * statistics["cross"]).sum() + (affine * (own @ affine)).sum()
        log_scale = p.log_scale.double()
        fit = -0.5 * residual * (-2 * log_scale).exp() - count * size * (log_scale + 0.5 * math.log(2 * math.pi))
        return (fit - 0.5 * own.diagonal()[:-1].sum() - 0.5 * count * width * math.log(2 * math.pi)).squeeze()

    @torch.no_grad()
    def m_step(self, statistics: Statistics) -> None:
        """The regression of x on the latents, and its residual; see :class:`models.tractable.EMModel`.

        Raises:
            DegenerateError: the regression leaves no residual, or the latents do not vary.
        """
        p, own, cross = self.likelihood, statistics["own"], statistics["cross"]
        size, width = p.weight.shape
        affine, failed = torch.linalg.solve_ex(own, cross)  # (Q + 1, D)
        variance = (statistics["square"] - (affine * cross).sum()) / (own[-1, -1] * size)
        noise = 10 * torch.finfo(p.weight.dtype).eps * statistics["square"] / (own[-1, -1] * size)
        if not bool((variance > noise) & (failed == 0)):
            raise DegenerateError(
                f"no noise is left around the {width} latents: the {float(own[-1, -1]):.0f} data lie in a space of so "
                "few dimensions; try a smaller model.latent_dim, or leave out columns that repeat others"
            )
        p.weight.copy_(affine[:-1].T)
        p.loc.copy_(affine[-1] + self.shift)
        p.log_scale.copy_(variance.log() / 2)

    @torch.no_grad()
    def initialize(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        """The data's mean, and as much of their variance in random directions as in the noise.

        Raises:
            DegenerateError: data in a space of no more dimensions than there are latents.
        """
        check_finite(x)
        check_overflow(x.square().sum())
        p, x = self.likelihood, self._flat(x)
        maximum_likelihood(x, p.weight.shape[1])  # says whether there is one
        mean = x.mean(0)
        variance = (x - mean).square().mean()
        noise = torch.randn(p.weight.shape, generator=generator, device=x.device, dtype=x.dtype)
        p.weight.copy_(noise * (variance / (2 * noise.shape[1])).sqrt())
        p.loc.copy_(mean)
        self.shift.copy_(mean)
        p.log_scale.copy_((variance / 2).log() / 2)

    def maximum_likelihood(self, x: Tensor) -> PPCASolution:
        """Set the parameters to the likeliest for data ``(N, *event_shape)``, and return them; see the function."""
        p = self.likelihood
        solution = maximum_likelihood(self._flat(x), p.weight.shape[1])
        with torch.no_grad():
            p.weight.copy_(solution.weight)
            p.loc.copy_(solution.loc)
            p.log_scale.copy_(solution.scale.log())
        return solution
