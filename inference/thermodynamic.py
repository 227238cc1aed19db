"""The thermodynamic variational objective."""

import math
from typing import Literal

import torch
from torch import Tensor

from inference.gradients import GradientEstimator
from inference.objectives import Objective


class TVO(Objective):
    """The thermodynamic objective, a Riemann sum over tempered posteriors (Masrani et al. 2019, section 3).

    log p(x) is the integral over b from 0 to 1 of the mean log-weight under pi_b, proportional to
    q(z|x)^(1-b) p(x, z)^b, which rises with b. The left sum is therefore a lower bound, the ELBO with one partition;
    the right sum is an upper bound. Means under pi_b are taken with normalized powers of the weights of K draws; that
    is exact for b = 0, and biased downwards for larger b and few draws.

    Args:
        particles: K.
        partitions: P; their boundaries are 0 and P numbers evenly spaced in logarithm from ``first`` to 1.
        first: the smallest boundary above 0.
        side: ``"left"`` for the lower bound, ``"right"`` for the upper one.
        max_plate_nesting: see :class:`Objective`.
        gradient: ``"covariance"``, the paper's, needs no reparameterization; or any of :class:`Objective` but dreg,
            which take the gradient of the finite sample's expectation.
    """

    temperatures: Tensor
    widths: Tensor

    def __init__(
        self,
        particles: int = 50,
        partitions: int = 5,
        first: float = 0.1,
        side: Literal["left", "right"] = "left",
        max_plate_nesting: int | None = None,
        gradient: str | GradientEstimator = "covariance",
    ) -> None:
        super().__init__(particles, max_plate_nesting, gradient)
        if partitions < 1:
            raise ValueError(f"partitions must be at least 1, got {partitions}")
        if not 0 < first < 1:
            raise ValueError(f"first must lie between 0 and 1, got {first}")
        if side not in ("left", "right"):
            raise ValueError(f"side must be 'left' or 'right', got {side!r}")
        spaced = [math.exp((1 - i / max(partitions - 1, 1)) * math.log(first)) for i in range(partitions - 1)]
        boundaries = torch.tensor([0.0, *spaced, 1.0])
        ends = boundaries[:-1] if side == "left" else boundaries[1:]
        self.register_buffer("temperatures", ends, persistent=False)
        self.register_buffer("widths", boundaries.diff(), persistent=False)

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.num_particles == 1

    def tempered(self, log_weight: Tensor) -> Tensor:
        """Normalized weights of draws from q under each pi_b: ``(K, *rest)`` to ``(P, K, *rest)``."""
        return (_along(self.temperatures, log_weight) * log_weight).softmax(1)

    def combine(self, contributions: Tensor) -> Tensor:
        means = (self.tempered(contributions) * contributions).sum(1)  # (P, *rest)
        return (_along(self.widths, means[0]) * means).sum(0)


def _along(values: Tensor, rest: Tensor) -> Tensor:
    """(P,) -> (P, 1, ...), to multiply a stack of tensors like ``rest``."""
    return values.reshape(-1, *(1,) * rest.dim())
