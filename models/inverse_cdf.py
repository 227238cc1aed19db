"""Distributions drawn by their quantile function, z = F^-1(u) with u uniform: those that no library has right.

The draw is a differentiable function of every parameter, with no rejection and no correction term (Kingma and Welling
2014, section 2.4, first list).
"""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all


def open_uniform(shape: Sequence[int], like: Tensor) -> Tensor:
    """Uniform draws strictly between 0 and 1, with the type and the device of ``like``.

    ``torch.rand`` lies on a grid that has 0, where quantiles are infinite; half of a step replaces it.
    """
    eps = torch.finfo(like.dtype).eps
    return torch.rand(shape, dtype=like.dtype, device=like.device).clamp(eps / 4, 1 - eps / 2)


class Elementwise(dist.TorchDistribution):
    """A univariate distribution whose parameters, named in ``arg_constraints``, broadcast against one another.

    A leaf's constructor hands them to :meth:`_start`; the leaf defines ``rsample``, ``log_density`` and a support.
    """

    has_rsample = True

    def _start(self, validate_args: bool | None, **parameters: Any) -> None:
        for name, value in zip(parameters, broadcast_all(*parameters.values()), strict=True):
            setattr(self, name, value)
        super().__init__(self._first().shape, validate_args=validate_args)

    def _first(self) -> Tensor:
        return getattr(self, next(iter(self.arg_constraints)))

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Elementwise":
        new = self._get_checked_instance(type(self), _instance)
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(batch_shape))
        dist.TorchDistribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_density(self, value: Tensor) -> Tensor:
        """The log-density at values of the distribution's batch shape, in nats, unchecked."""
        raise NotImplementedError

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.log_density(value)


class InverseCDF(Elementwise):
    """An :class:`Elementwise` distribution drawn by its ``icdf``, which the leaf defines."""

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.icdf(open_uniform(self._extended_shape(sample_shape), self._first()))


class Cauchy(dist.Cauchy):
    """The Cauchy distribution, z = loc + scale tan(pi (u - 1/2)), which says that it has no mean.

    torch's gives nan for it, which is then taken for a number.

    Args:
        loc: median.
        scale: half of the distance between the quartiles.
    """

    @property
    def mean(self) -> Tensor:
        raise NotImplementedError("the Cauchy distribution has no mean")

    @property
    def variance(self) -> Tensor:
        raise NotImplementedError("the Cauchy distribution has no variance")


class Logistic(dist.Logistic):
    """The logistic distribution, without the infinite draw that Pyro's gives for a uniform of zero.

    Args:
        loc: mean and median.
        scale: scale s; the standard deviation is ``pi s / sqrt(3)``.
    """

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.icdf(open_uniform(self._extended_shape(sample_shape), self.loc))


class Rayleigh(InverseCDF):
    """The length of a two-dimensional normal vector, z = scale sqrt(-2 log(1 - u)).

    Args:
        scale: standard deviation of each coordinate of that vector, and the mode of its length.
    """

    arg_constraints = {"scale": constraints.positive}  # noqa: RUF012
    support = constraints.positive
    scale: Tensor

    def __init__(self, scale: Tensor | float, validate_args: bool | None = None) -> None:
        self._start(validate_args, scale=torch.as_tensor(scale))

    @property
    def mean(self) -> Tensor:
        return self.scale * (torch.pi / 2) ** 0.5

    @property
    def variance(self) -> Tensor:
        return self.scale.square() * (2 - torch.pi / 2)

    def icdf(self, value: Tensor) -> Tensor:
        return self.scale * (-2 * torch.log1p(-value)).sqrt()

    def cdf(self, value: Tensor) -> Tensor:
        return -torch.expm1(-(value.clamp(min=0) / self.scale).square() / 2)

    def log_density(self, value: Tensor) -> Tensor:
        return value.log() - 2 * self.scale.log() - (value / self.scale).square() / 2


class Pareto(dist.Pareto):
    """The Pareto distribution, z = scale (1 - u)^(-1/alpha), whose density is zero below ``scale``.

    torch's own scores a value there as if the density went on, unless arguments are validated, which a training step
    and an evaluation do without.

    Args:
        scale: the least value.
        alpha: exponent of the tail, P(z > t) = (scale / t)^alpha.
    """

    score_identity = False  # see models.families.Family

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        inside = value >= self.scale
        excess = torch.where(inside, value / self.scale, torch.ones_like(value)).log()
        density = self.alpha.log() - self.scale.log() - (self.alpha + 1) * excess
        return density.masked_fill(~inside, -torch.inf)


class Reciprocal(InverseCDF):
    """The log-uniform distribution, density proportional to 1/z, z = low ratio^u.

    Args:
        low: the least value.
        ratio: of the greatest value to the least, above 1.
    """

    score_identity = False  # see models.families.Family
    arg_constraints = {"low": constraints.positive, "ratio": constraints.greater_than(1.0)}  # noqa: RUF012
    low: Tensor
    ratio: Tensor

    def __init__(self, low: Tensor | float, ratio: Tensor | float, validate_args: bool | None = None) -> None:
        self._start(validate_args, low=low, ratio=ratio)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.interval(self.low, self.low * self.ratio)

    @property
    def mean(self) -> Tensor:
        return self.low * (self.ratio - 1) / self.ratio.log()

    @property
    def variance(self) -> Tensor:
        return self.low.square() * (self.ratio.square() - 1) / (2 * self.ratio.log()) - self.mean.square()

    def icdf(self, value: Tensor) -> Tensor:
        z, high = self.low * self.ratio**value, self.low * self.ratio
        return torch.where(z > high, high, z)  # rounding must not carry a draw out of the support

    def cdf(self, value: Tensor) -> Tensor:
        return ((value / self.low).log() / self.ratio.log()).clamp(0, 1)

    def log_density(self, value: Tensor) -> Tensor:
        inside = (value >= self.low) & (value <= self.low * self.ratio)
        density = -torch.where(inside, value, self.low).log() - self.ratio.log().log()
        return density.masked_fill(~inside, -torch.inf)


class Gompertz(InverseCDF):
    """Life spans under a hazard that grows exponentially, F(z) = 1 - exp(-concentration (exp(rate z) - 1)).

    The mean has no elementary form, and is left to draws.

    Args:
        concentration: the hazard at zero, over ``rate``.
        rate: the exponent at which the hazard grows.
    """

    arg_constraints = {"concentration": constraints.positive, "rate": constraints.positive}  # noqa: RUF012
    support = constraints.nonnegative
    concentration: Tensor
    rate: Tensor

    def __init__(self, concentration: Tensor | float, rate: Tensor | float, validate_args: bool | None = None) -> None:
        self._start(validate_args, concentration=concentration, rate=rate)

    def icdf(self, value: Tensor) -> Tensor:
        return torch.log1p(-torch.log1p(-value) / self.concentration) / self.rate

    def cdf(self, value: Tensor) -> Tensor:
        return -torch.expm1(-self.concentration * torch.expm1(self.rate * value.clamp(min=0)))

    def log_density(self, value: Tensor) -> Tensor:
        growth = self.rate * value
        return self.concentration.log() + self.rate.log() + growth - self.concentration * torch.expm1(growth)
