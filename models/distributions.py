"""Distributions that neither Pyro nor PyTorch has, and one Kullback-Leibler divergence."""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import register_kl
from torch.distributions.utils import broadcast_all
from torch.nn import functional as F


def optimal_scale(value: Tensor, mean: Tensor) -> Tensor:
    """The standard deviation under which ``value`` is likeliest: the root mean square of ``value - mean``.

    The mean is over all entries, of every datum and every dimension (Rybkin, Daniilidis and Levine 2021).
    Returns a tensor of shape ``()``, in the units of the data.
    """
    return (value - mean).square().mean().sqrt()


class ProfiledNormal(dist.TorchDistribution):
    """Independent normals that score any value under the one scale that suits that value best.

    ``log_prob`` is the Gaussian log-likelihood at :func:`optimal_scale`, which is taken over everything scored at
    once and held constant in the gradient: the scale maximizes the sum of the scores, so by the envelope theorem
    that gradient is the one of the profiled likelihood. It is a training criterion and no density, for it reads its
    scale off the value.

    Args:
        loc: means.
        scale: the standard deviation that draws are made with, shape ``()``.
        observe: called with the optimal scale, shape ``()``, at each scoring.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    support = constraints.real
    has_rsample = True

    def __init__(
        self, loc: Tensor, scale: Tensor, observe: Callable[[Tensor], None], validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale, self.observe = loc, scale, observe
        super().__init__(loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "ProfiledNormal":
        new = self._get_checked_instance(ProfiledNormal, _instance)
        new.loc, new.scale, new.observe = self.loc.expand(batch_shape), self.scale, self.observe
        super(ProfiledNormal, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.scale.square().expand(self.loc.shape)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        loc = self.loc.expand(self._extended_shape(sample_shape))
        return loc + self.scale * torch.randn_like(loc)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        # The floor keeps a perfect reconstruction finite.
        scale = optimal_scale(value.detach(), self.loc.detach()).clamp(min=torch.finfo(self.loc.dtype).eps)
        self.observe(scale)
        return dist.Normal(self.loc, scale, validate_args=False).log_prob(value)


class CategoricalLevels(dist.Categorical):
    """A categorical over the levels 0 ... L-1, which are whole numbers held as floats.

    Args:
        logits: unnormalized log-probabilities, shape ``(*batch, L)``.
    """

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return super().sample(sample_shape).to(self.logits.dtype)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        return super().enumerate_support(expand).to(self.logits.dtype)

    @property
    def mean(self) -> Tensor:
        """The expected level, not the likeliest one."""
        return self.probs @ torch.arange(self.logits.shape[-1], dtype=self.logits.dtype, device=self.logits.device)


class LogisticLevels(dist.TorchDistribution):
    """A logistic density gathered into the levels 0 ... L-1 (Kingma et al. 2016; Salimans et al. 2017, equation 2).

    Level k has the mass between k - 1/2 and k + 1/2; the first and the last level take the tails beyond them, so
    that the L masses sum to one. Levels are whole numbers held as floats.

    Args:
        loc: centre of the logistic, in levels.
        scale: scale parameter s of the logistic, in levels; its standard deviation is ``pi s / sqrt(3)``.
        levels: L, at least 2.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012

    def __init__(self, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "LogisticLevels":
        new = self._get_checked_instance(LogisticLevels, _instance)
        new.loc, new.scale, new.levels = self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.levels
        super(LogisticLevels, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The expected level: the sum of P(level >= k) over k > 0, one level at a time to spare memory."""
        total = torch.zeros_like(self.loc)
        for level in range(1, self.levels):
            total = total + torch.sigmoid((self.loc - (level - 0.5)) / self.scale)
        return total

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            loc = self.loc.expand(self._extended_shape(sample_shape))
            return (loc + self.scale * torch.rand_like(loc).logit()).round().clamp(0, self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        below = F.logsigmoid((value + 0.5 - self.loc) / self.scale)  # log P(level <= k)
        above = F.logsigmoid((self.loc - value + 0.5) / self.scale)  # log P(level >= k)
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)): no cancellation, even in the far tails.
        between = below + above + torch.log(-torch.expm1(-1 / self.scale))
        return torch.where(value <= 0, below, torch.where(value >= self.levels - 1, above, between))


@register_kl(torch.distributions.MultivariateNormal, torch.distributions.Independent)
def _kl_full_normal_to_diagonal(p: Any, q: Any) -> Tensor:
    """KL(N(m, S) || N(a, diag b^2)) in nats: the direction that Pyro's registry lacks."""
    base = q.base_dist
    if not isinstance(base, torch.distributions.Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    precision = base.scale.square().reciprocal()
    quadratic = ((p.variance + (p.loc - base.loc).square()) * precision).sum(-1)
    log_determinants = p.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) - base.scale.log().sum(-1)
    return 0.5 * (quadratic - p.event_shape[0]) - log_determinants
