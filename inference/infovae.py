"""InfoVAE: the aggregated posterior is held to the prior by a maximum mean discrepancy."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from inference.gradients import GradientEstimator
from inference.objectives import ELBO
from inference.particles import Particles
from inference.structure import StructureError

Kernel = Callable[[Tensor, float], Tensor]


def rbf(squared_distance: Tensor, bandwidth: float) -> Tensor:
    """exp(-d^2 / (2 h^2))."""
    return torch.exp(-squared_distance / (2 * bandwidth**2))


def imq(squared_distance: Tensor, bandwidth: float) -> Tensor:
    """The inverse multiquadric c / (c + d^2) with c = 2 h^2, whose tails are heavy (Tolstikhin et al. 2018)."""
    constant = 2 * bandwidth**2
    return constant / (constant + squared_distance)


KERNELS: dict[str, Kernel] = {"rbf": rbf, "imq": imq}


def mmd2(first: Tensor, second: Tensor, kernel: Kernel = rbf, bandwidth: float = 1.0) -> Tensor:
    """The squared maximum mean discrepancy of two samples, without bias (Gretton et al. 2012, equation 3).

    It estimates E k(a, a') + E k(b, b') - 2 E k(a, b), and may be below zero where that is small.

    Args:
        first: ``(..., n, D)``, n at least 2.
        second: ``(..., m, D)``, m at least 2.
        kernel: of squared distances and bandwidth.
        bandwidth: h, in the units of the samples.
    """
    cross = kernel(_squared_distances(first, second), bandwidth).mean((-2, -1))
    return _mean_off_diagonal(first, kernel, bandwidth) + _mean_off_diagonal(second, kernel, bandwidth) - 2 * cross


def _mean_off_diagonal(sample: Tensor, kernel: Kernel, bandwidth: float) -> Tensor:
    size = sample.shape[-2]
    gram = kernel(_squared_distances(sample, sample), bandwidth)
    return (gram.sum((-2, -1)) - gram.diagonal(dim1=-2, dim2=-1).sum(-1)) / (size * (size - 1))


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    # By products, (a - b)^2 = a^2 + b^2 - 2ab: smooth at zero, where the root in a distance is not.
    square = first.square().sum(-1).unsqueeze(-1) + second.square().sum(-1).unsqueeze(-2)
    return (square - 2 * first @ second.transpose(-2, -1)).clamp(min=0)


class InfoVAE(ELBO):
    """InfoVAE, the aggregated posterior held to the prior by a maximum mean discrepancy (Zhao et al. 2019).

    E_q log p(x|z) - (1 - alpha) KL(q(z|x) || p(z)) - (alpha + scale - 1) MMD^2, the last between the
    latents of a batch and as many draws of the prior. The mutual information of datum and latent has the weight alpha:
    at 1 the KL of each datum is free, and only the aggregated posterior is held to the prior. alpha = 0, scale = 1 is
    the ELBO. A lower bound on log p(x) as long as alpha <= 0 and scale >= 1 - alpha; otherwise none.

    Args:
        alpha: weight of the mutual information.
        scale: lambda in the paper, how much q(z) = p(z) counts.
        kernel: ``"rbf"`` or ``"imq"``.
        bandwidth: h, in the units of the latents; 0 for the root of their number of dimensions.
        particles: draws per datum; the discrepancy is averaged over them.
        kl: see :class:`~inference.objectives.ELBO`.
        max_plate_nesting: see :class:`~inference.objectives.Objective`.
        gradient: see :class:`~inference.objectives.Objective`; reparameterized or stl.
    """

    local = False

    def __init__(
        self,
        alpha: float = 0.0,
        scale: float = 10.0,
        kernel: Literal["rbf", "imq"] = "rbf",
        bandwidth: float = 0.0,
        particles: int = 1,
        kl: Literal["analytic", "monte_carlo"] = "monte_carlo",
        max_plate_nesting: int | None = None,
        gradient: str | GradientEstimator = "reparameterized",
    ) -> None:
        super().__init__(particles, kl, max_plate_nesting, gradient)
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
        for name, value in (("scale", scale), ("bandwidth", bandwidth)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or above and finite, got {value}")
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be finite, got {alpha}")
        self.alpha, self.scale, self.bandwidth = alpha, scale, bandwidth
        self.kernel = KERNELS[kernel]

    def contribution(self, draws: Particles) -> Tensor:
        return draws.log_likelihood - (1 - self.alpha) * self.divergence(draws)

    def from_particles(self, draws: Particles) -> Tensor:
        return super().from_particles(draws) - (self.alpha + self.scale - 1) * self.discrepancy(draws)

    def discrepancy(self, draws: Particles) -> Tensor:
        """MMD^2 of the latents of the batch and draws of the prior, shape ``()``."""
        if len(draws.latents) != 1:
            raise StructureError(
                f"InfoVAE compares one latent site with its prior; the model has {list(draws.latents)}"
            )
        (latent,) = draws.latents.values()
        posterior = self._flat(latent.value, draws)
        if latent.value.numel() != draws.log_q.numel() * latent.q.event_shape.numel():
            raise StructureError(
                "InfoVAE compares latents of the plate over the data; the model has them in plates inside"
            )
        prior = self._flat(latent.p.rsample() if latent.p.has_rsample else latent.p.sample(), draws)
        bandwidth = self.bandwidth or posterior.shape[-1] ** 0.5
        return mmd2(posterior, prior, self.kernel, bandwidth).mean()

    def _flat(self, value: Tensor, draws: Particles) -> Tensor:
        """(K, N, *event) -> (K, N, D)."""
        num_particles, num_data = draws.log_q.shape
        if num_data < 2:
            raise StructureError("InfoVAE compares the latents of a batch with its prior: give it at least 2 data")
        return value.reshape(num_particles, num_data, -1)
