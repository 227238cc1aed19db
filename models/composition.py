"""Distributions drawn by composing other draws (Kingma and Welling 2014, section 2.4, third list)."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from models.inverse_cdf import Elementwise, open_uniform


class Erlang(Elementwise):
    """The sum of ``order`` independent exponentials, z = -(log u_1 + ... + log u_order) / rate.

    Often listed among the distributions with a tractable quantile function, which it lacks for an order above 1. What
    it does have is this sum, and it is the gamma distribution of whole concentration: of no other gamma is it said
    truly that it is a sum of exponentials. The order is a count, and no gradient reaches it.

    Args:
        rate: of each exponential.
        order: how many there are, at least 1.
    """

    arg_constraints = {"rate": constraints.positive}  # noqa: RUF012
    support = constraints.nonnegative
    rate: Tensor

    def __init__(self, rate: Tensor | float, order: int = 2, validate_args: bool | None = None) -> None:
        if isinstance(order, bool) or not isinstance(order, int) or order < 1:
            raise ValueError(
                f"an Erlang distribution sums a whole number of exponentials: order must be an int of at least 1, got "
                f"{order!r}; for other concentrations use the gamma distribution"
            )
        self.order = order
        self._start(validate_args, rate=torch.as_tensor(rate))

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Erlang":
        new = super().expand(batch_shape, _instance)
        new.order = self.order
        return new

    @property
    def mean(self) -> Tensor:
        return self.order / self.rate

    @property
    def variance(self) -> Tensor:
        return self.order / self.rate.square()

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        u = open_uniform((*self._extended_shape(sample_shape), self.order), self.rate)
        return -u.log().sum(-1) / self.rate

    def cdf(self, value: Tensor) -> Tensor:
        return torch.special.gammainc(torch.full_like(self.rate, self.order), self.rate * value.clamp(min=0))

    def log_density(self, value: Tensor) -> Tensor:
        return dist.Gamma(torch.full_like(self.rate, self.order), self.rate, validate_args=False).log_prob(value)
