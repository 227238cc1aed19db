"""Guides whose discrete draws are given a path: Gumbel-softmax, binary Concrete, straight-through.

The score log q of a draw is that of the discrete distribution, linear in the draw, and never the density of the
relaxation. Relaxed draws of it say nothing of KL(q || p), which bounds take from the discrete distributions themselves.
Straight-through draws do, in value; in gradient where it is taken in closed form, by kl=analytic or trace_mean_field.
In evaluation mode these guides draw bits and one-hot vectors, so that every number of an evaluation is one of the
discrete model.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from torch import Tensor

from guides.discrete import BernoulliBits, IndependentDraws, OneHotCategoricals, kind_of_prior
from models.codebook import straight_through as with_gradient_of
from models.conditional import Conditional, NetFactory
from models.discrete import Bits, OneHots, largest


class RelaxedBits(Bits):
    """A bit drawn as sigmoid((logits + logistic noise) / temperature) (Maddison et al. 2017, section 3.2).

    Args:
        logits: log-odds.
        temperature: above 0; towards 0 the draws become bits, and their gradient noisier.
        hard: draw bits, exactly as :class:`~models.discrete.Bits` does, with the gradient of the relaxation.
    """

    has_rsample = True
    has_enumerate_support = False

    def __init__(self, logits: Tensor, temperature: Tensor, hard: bool, validate_args: bool | None = None) -> None:
        super().__init__(logits, validate_args)
        self.temperature, self.hard = temperature, hard

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "RelaxedBits":
        new = self._get_checked_instance(RelaxedBits, _instance)
        new.temperature, new.hard = self.temperature, self.hard
        return super().expand(batch_shape, _instance=new)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        scores = self.scores(sample_shape)
        soft = (scores / self.temperature).sigmoid()
        return with_gradient_of((scores > 0).to(soft.dtype), soft) if self.hard else soft

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self.rsample(sample_shape)


class RelaxedOneHots(OneHots):
    """A one-hot vector drawn as softmax((logits + Gumbel noise) / temperature) (Jang et al. 2017, eq. 2).

    Args:
        logits: unnormalized log-probabilities of K classes, ``(..., K)``.
        temperature: above 0; towards 0 the draws become one-hot, and their gradient noisier.
        hard: draw one-hot vectors, exactly as :class:`~models.discrete.OneHots` does, with the gradient of the
            relaxation (straight-through Gumbel-softmax).
    """

    has_rsample = True
    has_enumerate_support = False

    def __init__(self, logits: Tensor, temperature: Tensor, hard: bool, validate_args: bool | None = None) -> None:
        super().__init__(logits, validate_args)
        self.temperature, self.hard = temperature, hard

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "RelaxedOneHots":
        new = self._get_checked_instance(RelaxedOneHots, _instance)
        new.temperature, new.hard = self.temperature, self.hard
        return super().expand(batch_shape, _instance=new)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        scores = self.scores(sample_shape)
        soft = (scores / self.temperature).softmax(-1)
        return with_gradient_of(largest(scores), soft) if self.hard else soft

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self.rsample(sample_shape)


class MeanPathBits(RelaxedBits):
    """A bit that is drawn, and has the gradient of its mean: sg(bit - sigmoid(logits)) + sigmoid(logits).

    The straight-through estimator of Bengio, Leonard and Courville (2013); no noise in the gradient.
    """

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(logits, torch.ones(()), True, validate_args)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return with_gradient_of(self.sample(sample_shape), self.logits.sigmoid())

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return Bits.sample(self, sample_shape)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "MeanPathBits":
        return super().expand(batch_shape, _instance=self._get_checked_instance(MeanPathBits, _instance))


class MeanPathOneHots(RelaxedOneHots):
    """A one-hot vector that is drawn, and has the gradient of its mean: sg(hard - softmax(logits)) + softmax(logits).

    The straight-through estimator of Bengio, Leonard and Courville (2013) for classes; no noise in the gradient.
    """

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(logits, torch.ones(()), True, validate_args)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return with_gradient_of(self.sample(sample_shape), self.logits.softmax(-1))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return OneHots.sample(self, sample_shape)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "MeanPathOneHots":
        return super().expand(batch_shape, _instance=self._get_checked_instance(MeanPathOneHots, _instance))


Schedule = Literal["exponential", "linear"]


class _Annealed(IndependentDraws):
    """Draws that are relaxed in training, at a temperature that falls during a run, to a minimum.

    Exponentially, max(minimum, temperature exp(-rate progress)) (Jang et al. 2017, section 4.2), or along a line that
    reaches the minimum when 1/rate of the run is done.
    """

    relaxation: ClassVar[type[RelaxedBits] | type[RelaxedOneHots]]
    temperature: Tensor  # (), changed in place; not saved, for it is a function of progress

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int],
        net: NetFactory,
        hard: bool = True,
        temperature: float = 1.0,
        minimum: float = 0.5,
        rate: float = 1.0,
        schedule: Schedule = "exponential",
        model: Any = None,
    ) -> None:
        super().__init__(event_shape, context_shape, net, model)
        if not temperature > 0 or not 0 < minimum <= temperature:
            raise ValueError(
                f"accepted: a temperature above 0 and a minimum above 0 and no higher, got temperature={temperature} "
                f"and minimum={minimum}"
            )
        if not 0 <= rate < math.inf:
            raise ValueError(f"rate must be 0 or above (0 keeps the temperature), got {rate}")
        if schedule not in ("exponential", "linear"):
            raise ValueError(f"schedule must be 'exponential' or 'linear', got {schedule!r}")
        self.hard, self.schedule = hard, schedule
        self.start, self.minimum, self.rate = float(temperature), float(minimum), float(rate)
        self.register_buffer("temperature", torch.tensor(self.start), persistent=False)

    def draws(self, logits: Tensor) -> Bits | OneHots:
        return self.relaxation(logits, self.temperature, self.hard) if self.training else super().draws(logits)

    def temperature_at(self, progress: float) -> float:
        """The temperature when ``progress`` of the run, from 0 to 1, is done."""
        if self.schedule == "linear":
            return max(self.minimum, self.start - (self.start - self.minimum) * self.rate * progress)
        return max(self.minimum, self.start * math.exp(-self.rate * progress))

    def at(self, progress: float) -> None:
        """Be told how far the run is."""
        self.temperature.fill_(self.temperature_at(progress))

    def info(self) -> dict[str, float]:
        """What the log says of it."""
        return {"train/temperature": float(self.temperature)}


class RelaxedBernoulliBits(_Annealed, BernoulliBits):
    """Independent bits, in training mode relaxed or straight-through, in evaluation mode drawn.

    With ``hard=True`` the forward pass is that of bits: the bound has the right value. Its gradient with respect to
    the guide is biased at every temperature: towards 0, the difference between the bound at 1 and at 0 is replaced by
    the mean of its derivatives there, which is exact for quadratic functions alone.

    With ``hard=False`` the model is given numbers between 0 and 1 during training: the value is then that of the
    relaxed objective, **no bound on log p(x)**, and the gradient is that of this value. It tends to the gradient of
    the bound as the temperature falls, and its variance grows. In evaluation mode both draw as
    :class:`~guides.discrete.BernoulliBits` does.

    Args:
        event_shape: shape of one latent, a bit at each place.
        context_shape: shape of one context.
        net: builds the net, whose output is the log-odds.
        hard: straight-through.
        temperature: at the start.
        minimum: below which the temperature does not fall.
        rate: how fast it falls: by a factor of exp(-rate) over the whole run, or to its minimum in 1/rate of it.
        schedule: ``"exponential"`` or ``"linear"``.
        model: the model whose prior the draws are checked against, where one is given.
    """

    relaxation = RelaxedBits


class RelaxedOneHotCategoricals(_Annealed, OneHotCategoricals):
    """Independent one-hot vectors, in training mode relaxed or straight-through, in evaluation mode drawn.

    What the options mean, ``hard`` above all, is as for :class:`RelaxedBernoulliBits`: **with hard=False the value is
    no bound on log p(x)**. One latent is ``(variables, classes)``, and the net's output the logits of the classes.
    """

    relaxation = RelaxedOneHots


class MeanPathBernoulliBits(BernoulliBits):
    """Independent bits that are drawn, and in training mode have the gradient of their means; biased.

    The bound has the right value. Its gradient in the guide replaces the difference between the bound at 1 and at 0
    by the derivative at the draw.
    """

    def draws(self, logits: Tensor) -> Bits | OneHots:
        return MeanPathBits(logits) if self.training else super().draws(logits)


class MeanPathOneHotCategoricals(OneHotCategoricals):
    """Independent one-hot vectors that are drawn, and in training mode have the gradient of their means; biased."""

    def draws(self, logits: Tensor) -> Bits | OneHots:
        return MeanPathOneHots(logits) if self.training else super().draws(logits)


def concrete(
    event_shape: Sequence[int],
    context_shape: Sequence[int],
    net: NetFactory,
    model: Any,
    temperature: float = 1.0,
    minimum: float = 0.5,
    rate: float = 1.0,
    schedule: Schedule = "exponential",
) -> Conditional:
    """Bits or one-hot vectors, relaxed in training to lie between (Gumbel-softmax, Concrete): no bound until drawn."""
    return _relaxing(model)(event_shape, context_shape, net, False, temperature, minimum, rate, schedule)


def straight_through(
    event_shape: Sequence[int],
    context_shape: Sequence[int],
    net: NetFactory,
    model: Any,
    temperature: float = 1.0,
    minimum: float = 0.5,
    rate: float = 1.0,
    schedule: Schedule = "exponential",
) -> Conditional:
    """Bits or one-hot vectors that are drawn, with the biased gradient of their relaxation (straight-through)."""
    return _relaxing(model)(event_shape, context_shape, net, True, temperature, minimum, rate, schedule)


def straight_through_mean(
    event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory, model: Any
) -> Conditional:
    """Bits or one-hot vectors that are drawn, with the biased gradient of their mean: sg(hard - soft) + soft."""
    core = MeanPathBernoulliBits if _over_bits(model) else MeanPathOneHotCategoricals
    return core(event_shape, context_shape, net, model)


def _relaxing(model: Any) -> type[_Annealed]:
    return RelaxedBernoulliBits if _over_bits(model) else RelaxedOneHotCategoricals


def _over_bits(model: Any) -> bool:
    """Whether the prior of a model is over bits; if not, it is over one-hot vectors."""
    found = kind_of_prior(model)
    if not isinstance(found, dist.Bernoulli | dist.OneHotCategorical):
        raise ValueError("it relaxes discrete latents: accepted: prior=bits or prior=onehot")
    return isinstance(found, dist.Bernoulli)
