"""Distributions drawn as location plus scale times a standard variate (Kingma and Welling 2014, section 2.4)."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from models.inverse_cdf import InverseCDF


class ClosedUniform(dist.Uniform):
    """The uniform distribution on ``[low, high]``, both ends included.

    In single precision a draw can round to the upper end, which torch's own excludes: the density there would be zero
    and the bound infinite.
    """

    score_identity = False  # see models.families.Family

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        z = super().rsample(sample_shape)
        return torch.where(z > self.high, self.high, z)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        inside = (value >= self.low) & (value <= self.high)
        return (-(self.high - self.low).log() + torch.zeros_like(value)).masked_fill(~inside, -torch.inf)


def uniform(loc: Tensor, width: Tensor) -> ClosedUniform:
    """The uniform distribution on ``[loc, loc + width]``."""
    return ClosedUniform(loc, loc + width)


class Triangular(InverseCDF):
    """The triangular density on ``[loc, loc + width]``, z = loc + width e with e triangular on [0, 1].

    Args:
        loc: the least value.
        width: length of the support.
        peak: where along the support the mode is, between 0 and 1.
    """

    arg_constraints = {  # noqa: RUF012
        "loc": constraints.real,
        "width": constraints.positive,
        "peak": constraints.unit_interval,
    }
    loc: Tensor
    width: Tensor
    peak: Tensor

    def __init__(
        self, loc: Tensor | float, width: Tensor | float, peak: Tensor | float, validate_args: bool | None = None
    ) -> None:
        self._start(validate_args, loc=loc, width=width, peak=peak)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.interval(self.loc, self.loc + self.width)

    @property
    def mean(self) -> Tensor:
        return self.loc + self.width * (1 + self.peak) / 3

    @property
    def variance(self) -> Tensor:
        return self.width.square() * (1 - self.peak + self.peak.square()) / 18

    def icdf(self, value: Tensor) -> Tensor:
        rising = (value * self.peak).sqrt()
        falling = 1 - ((1 - value) * (1 - self.peak)).sqrt()
        return self.loc + self.width * torch.where(value < self.peak, rising, falling)

    def cdf(self, value: Tensor) -> Tensor:
        e = ((value - self.loc) / self.width).clamp(0, 1)
        return torch.where(e < self.peak, e.square() / self.peak, 1 - (1 - e).square() / (1 - self.peak))

    def log_density(self, value: Tensor) -> Tensor:
        inside = (value >= self.loc) & (value <= self.loc + self.width)
        eps = torch.finfo(self.loc.dtype).eps
        # The density is zero at both ends, where rounding can put a draw: its logarithm stays finite there.
        e = ((value - self.loc) / self.width).clamp(eps, 1 - eps)
        shape = torch.where(e < self.peak, e.log() - self.peak.log(), torch.log1p(-e) - torch.log1p(-self.peak))
        return (math.log(2) - self.width.log() + shape).masked_fill(~inside, -torch.inf)


class Elliptical(dist.TorchDistribution):
    """An elliptical distribution, the multivariate power exponential (Gomez, Gomez-Villegas and Marin 1998).

    The density depends on z through the Mahalanobis length r of ``scale_tril^-1 (z - loc)`` alone and is proportional
    to ``exp(-r^(2 power) / 2)``: normal for power 1, with heavier tails below and a flatter top above. A draw is
    z = loc + scale_tril (r s), with s uniform on the sphere and ``r^(2 power)`` gamma distributed; unless power is 1
    its coordinates depend on one another even where they are uncorrelated.

    Args:
        loc: mean, shape ``(*batch, D)``.
        scale_tril: lower triangular, ``(*batch, D, D)``; the Cholesky factor of the covariance for power 1, and of a
            multiple of it in general.
        power: shape ``(*batch)``.
    """

    arg_constraints = {  # noqa: RUF012
        "loc": constraints.real_vector,
        "scale_tril": constraints.lower_cholesky,
        "power": constraints.positive,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, scale_tril: Tensor, power: Tensor, validate_args: bool | None = None) -> None:
        batch = torch.broadcast_shapes(loc.shape[:-1], scale_tril.shape[:-2], power.shape)
        self._place(loc, scale_tril, power, batch)
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def _place(self, loc: Tensor, scale_tril: Tensor, power: Tensor, batch: torch.Size) -> None:
        self.loc = loc.expand(batch + loc.shape[-1:])
        self.scale_tril = scale_tril.expand(batch + scale_tril.shape[-2:])
        self.power = power.expand(batch)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Elliptical":
        new = self._get_checked_instance(Elliptical, _instance)
        new._place(self.loc, self.scale_tril, self.power, torch.Size(batch_shape))
        super(Elliptical, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """The diagonal of the covariance ``c L L^T``, with L the ``scale_tril`` and c the mean of r^2 over D."""
        size, half = self.event_shape[0], 0.5 / self.power
        log_c = 2 * half * math.log(2) + torch.lgamma((size + 2) * half) - torch.lgamma(size * half) - math.log(size)
        return log_c.exp().unsqueeze(-1) * self.scale_tril.square().sum(-1)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        noise = torch.randn(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        half = 0.5 / self.power
        shape = half * self.event_shape[0]
        radius = dist.Gamma(shape, torch.full_like(shape, 0.5)).rsample(sample_shape) ** half
        direction = noise / torch.linalg.vector_norm(noise, dim=-1, keepdim=True)
        step = self.scale_tril @ (radius.unsqueeze(-1) * direction).unsqueeze(-1)  # (*batch, D, 1)
        return self.loc + step.squeeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        size = self.event_shape[0]
        difference = (value - self.loc).unsqueeze(-1)
        standard = torch.linalg.solve_triangular(self.scale_tril, difference, upper=False).squeeze(-1)
        squared = standard.square().sum(-1).clamp(min=torch.finfo(self.loc.dtype).tiny)  # a power of 0 has no slope
        shape = 0.5 * size / self.power
        log_volume = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_normalizer = torch.lgamma(shape) + shape * math.log(2) - self.power.log() + log_volume
        return math.lgamma(size / 2) - size / 2 * math.log(math.pi) - log_normalizer - squared**self.power / 2
