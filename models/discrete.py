"""Bits and one-hot vectors: their distributions, and the priors under which all of them are equally likely.

The log-masses are linear in the value. At bits and one-hot vectors that is the mass function; in between, it is its
linear extension, by which a relaxed draw is scored, and along which a straight-through gradient of log q flows.
"""

import itertools
from collections.abc import Sequence
from math import prod
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import register_kl
from torch.nn.functional import logsigmoid, softplus

from models.conditional import Conditional
from models.inverse_cdf import open_uniform

MOST_STATES = 4096  # joint states that are enumerated


class _Hull(constraints.Constraint):
    """Bits, or one-hot vectors, and whatever lies between: the hull of a discrete support."""

    is_discrete = True

    def __init__(self, event_dim: int) -> None:
        self._event_dim = event_dim
        super().__init__()

    @property
    def event_dim(self) -> int:
        return self._event_dim

    def check(self, value: Tensor) -> Tensor:
        inside = (value >= 0) & (value <= 1)
        if self._event_dim == 0:
            return inside
        # Not torch's simplex, whose 1e-6 a softmax over a few dozen classes misses in single precision.
        return inside.all(-1) & ((value.sum(-1) - 1).abs() < 1e-4)

    def __repr__(self) -> str:
        word, what = ("bits", "bits") if self._event_dim == 0 else ("onehot", "one-hot vectors")
        return f"{what} or what lies between them; accepted: guide={word}, concrete, straight_through or enumerated"


def logistic(shape: Sequence[int], like: Tensor) -> Tensor:
    """Standard logistic noise, the difference of two Gumbel draws."""
    return open_uniform(shape, like).logit()


def gumbel(shape: Sequence[int], like: Tensor) -> Tensor:
    """Standard Gumbel noise, -log(-log u): the largest of many exponentials, centred."""
    return -(-open_uniform(shape, like).log()).log()


def largest(scores: Tensor) -> Tensor:
    """The one-hot vector at the largest score along the last dimension; no gradient."""
    return torch.zeros_like(scores).scatter_(-1, scores.detach().argmax(-1, keepdim=True), 1.0)


class Bits(dist.Bernoulli):
    """A bit, 1 with log-odds ``logits``; drawn as whether they exceed logistic noise."""

    support = _Hull(0)

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Bits":
        return super().expand(batch_shape, _instance=self._get_checked_instance(Bits, _instance))

    def scores(self, sample_shape: torch.Size) -> Tensor:
        """Log-odds plus noise, positive where a bit is drawn 1."""
        return self.logits + logistic(self._extended_shape(sample_shape), self.logits)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return (self.scores(sample_shape) > 0).to(self.logits.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return value * self.logits + logsigmoid(-self.logits)


class OneHots(dist.OneHotCategorical):
    """A one-hot vector of K classes with unnormalized log-probabilities ``logits``, ``(..., K)``.

    Drawn as the argmax of logits plus Gumbel noise (the Gumbel-max theorem; Maddison et al. 2014, eq. 1).
    """

    support = _Hull(1)

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "OneHots":
        return super().expand(batch_shape, _instance=self._get_checked_instance(OneHots, _instance))

    def scores(self, sample_shape: torch.Size) -> Tensor:
        """Log-probabilities plus noise, ``(..., K)``: the class with the largest is drawn."""
        return self.logits + gumbel(self._extended_shape(sample_shape), self.logits)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return largest(self.scores(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return (value * self.logits).sum(-1)


def scores_given(value: Tensor, q: Bits | OneHots) -> Tensor:
    """Scores, log-odds or log-probabilities plus noise, that draw just this ``value`` (Tucker et al. 2017).

    Distributed as ``q.scores`` given what was drawn; differentiable in the logits, the value and the noise held still.
    """
    if isinstance(q, OneHots):
        # The largest score is that of all classes together; the others are Gumbel draws cut off there.
        waits = (-open_uniform(value.shape, value).log()).log()
        drawn = (waits * value).sum(-1, keepdim=True)
        others = -torch.logaddexp(waits - q.logits, drawn)
        return torch.where(value > 0.5, -drawn, others)
    noise = logistic(value.shape, value)
    return torch.where(value > 0.5, softplus(noise + softplus(q.logits)), -softplus(noise + softplus(-q.logits)))


class Joint(dist.Independent):
    """Independent bits or one-hot vectors as one event, whose joint states can be listed where they are few."""

    @property
    def has_enumerate_support(self) -> bool:
        return self.base_dist.has_enumerate_support and self.num_states <= MOST_STATES

    @property
    def num_states(self) -> int:
        """2 for each bit, K for each one-hot vector, multiplied up."""
        classes = self.base_dist.event_shape[0] if self.base_dist.event_shape else 2
        return classes ** prod(self.event_shape[: self.reinterpreted_batch_ndims])

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All joint states, ``(S, *batch, *event_shape)``, or with 1s for the batch where not expanded.

        Raises:
            ValueError: they are more than :data:`MOST_STATES`.
        """
        check_states(self.num_states)
        single = self.base_dist.enumerate_support(expand=False)  # (K, *1s, *event of one)
        single = single.reshape(single.shape[0], *self.base_dist.event_shape)
        variables = prod(self.event_shape[: self.reinterpreted_batch_ndims])
        codes = torch.tensor(list(itertools.product(range(len(single)), repeat=variables)), device=single.device)
        shape = (len(codes), *(1,) * len(self.batch_shape), *self.event_shape)
        states = single[codes].reshape(shape)  # (S, V, *event of one) -> (S, *1s, *event)
        return states.expand(-1, *self.batch_shape, *self.event_shape) if expand else states


def base_of(distribution: Any) -> Any:
    """The distribution of single entries behind an event of independent ones."""
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    return distribution


def extended(distribution: Any) -> Joint:
    """The same bits or one-hot vectors, scored by the linear extension of their log-mass, whatever class they are of.

    Raises:
        ValueError: it is a distribution of something else.
    """
    base = base_of(distribution)
    if isinstance(base, dist.Bernoulli):
        return joint(Bits(base.logits, validate_args=False), len(distribution.event_shape))
    if isinstance(base, dist.OneHotCategorical):
        return joint(OneHots(base.logits, validate_args=False), len(distribution.event_shape))
    raise ValueError(f"accepted: independent bits or one-hot vectors, got {type(base).__name__}")


def check_states(count: int) -> None:
    """Raise a ValueError where there are too many joint states to list."""
    if count > MOST_STATES:
        raise ValueError(
            f"{count:,} joint states are too many to sum over; accepted: up to {MOST_STATES:,}, such as 12 bits or 3 "
            "variables of 10 classes"
        )


def joint(distribution: Bits | OneHots, event_dim: int) -> Joint:
    """A distribution whose last ``event_dim`` dimensions, those of single vectors included, are one event."""
    return Joint(distribution, event_dim - len(distribution.event_shape))


@register_kl(Bits, Bits)
def _kl_bits(q: Bits, p: Bits) -> Tensor:
    on = q.logits.sigmoid() * (logsigmoid(q.logits) - logsigmoid(p.logits))
    return on + (-q.logits).sigmoid() * (logsigmoid(-q.logits) - logsigmoid(-p.logits))


@register_kl(OneHots, OneHots)
def _kl_one_hots(q: OneHots, p: OneHots) -> Tensor:
    return (q.logits.exp() * (q.logits - p.logits)).sum(-1)


class UniformBits(Conditional):
    """Independent fair bits, without parameters.

    Args:
        event_shape: shape of one latent, a bit at each place.
        context_shape: shape of a context to ignore, where one is given.
    """

    logits: Tensor

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int] = ()) -> None:
        super().__init__(event_shape, context_shape)
        self.register_buffer("logits", torch.zeros(self.event_shape), persistent=False)

    def forward(self, *context: Tensor) -> dist.Distribution:
        return joint(Bits(self.logits), len(self.event_shape))


class UniformOneHots(Conditional):
    """Independent one-hot vectors, all classes equally likely, without parameters.

    Args:
        event_shape: shape of one latent, ``(variables, classes)``.
        context_shape: shape of a context to ignore, where one is given.
    """

    logits: Tensor

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int] = ()) -> None:
        super().__init__(event_shape, context_shape)
        if len(self.event_shape) < 2 or self.event_shape[-1] < 2:
            raise ValueError(
                f"accepted: event_shape (variables, classes) with at least 2 classes, got {tuple(event_shape)}"
            )
        self.register_buffer("logits", torch.zeros(self.event_shape), persistent=False)

    def forward(self, *context: Tensor) -> dist.Distribution:
        return joint(OneHots(self.logits), len(self.event_shape))


def uniform_one_hots(event_shape: Sequence[int], classes: int = 10) -> UniformOneHots:
    """A one-hot vector of ``classes`` entries for each latent, all classes equally likely, without parameters."""
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}")
    return UniformOneHots((*event_shape, classes))
