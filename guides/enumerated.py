"""Guides of one categorical latent whose states are summed over, not drawn."""

from collections.abc import Sequence
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from guides.discrete import summable
from guides.exact import ExactPosterior
from models.conditional import Conditional, NetFactory


class DiscreteModel(Protocol):
    """A model with one categorical latent."""

    num_states: int
    event_shape: torch.Size


class Enumerated(PyroModule):
    """A guide that lets ``TraceEnum_ELBO`` sum over the states of ``z``, so that the bound has no sampling noise.

    In evaluation mode it draws instead, as any other guide, so that everything that takes draws takes it.

    Args:
        core: q(z|x), a categorical for each datum.
    """

    def __init__(self, core: Conditional) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor) -> Tensor:
        """The states of data ``(N, *event_shape)``: ``(K, 1)`` when enumerated, drawn ``(..., N)`` when not."""
        infer = {"enumerate": "parallel"} if self.training else {}
        with pyro.plate("data", x.shape[0], dim=-1):
            return pyro.sample("z", self.core(x), infer=infer)


class AmortizedCategorical(Conditional):
    """q(z|x) categorical, its logits from one net for all data.

    Args:
        model: says how many states.
        context_shape: shape of one datum.
        net: builds the encoder.
    """

    def __init__(self, model: DiscreteModel, context_shape: Sequence[int], net: NetFactory) -> None:
        super().__init__((), context_shape)
        self.net = net(self.context_shape, (_states(model),))

    def forward(self, *context: Tensor) -> dist.Categorical:
        return dist.Categorical(logits=self.net(*context))


class UniformCategorical(Conditional):
    """q(z|x) = 1/K whatever the datum: nothing to learn, and the widest gap that ignorance alone makes.

    Args:
        model: says how many states.
        context_shape: shape of one datum.
    """

    zeros: Tensor

    def __init__(self, model: DiscreteModel, context_shape: Sequence[int] = ()) -> None:
        super().__init__((), context_shape)
        self.register_buffer("zeros", torch.zeros(_states(model)))

    def forward(self, *context: Tensor) -> dist.Categorical:
        batch = [x.shape[: x.dim() - len(self.context_shape)] for x in context]
        return dist.Categorical(logits=self.zeros.expand(*(batch[0] if batch else ()), -1))


class HardPosterior(ExactPosterior):
    """q(z|x) all on the likeliest state, the E step of hard EM and of K-means; see :class:`ExactPosterior`."""

    def forward(self, *context: Tensor) -> dist.Categorical:
        logits = super().forward(*context).logits
        return dist.Categorical(probs=nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype))


class FreeCategorical(Conditional):
    """q(z|x_n) with logits of its own for each of N data, in their order: the max-max of EM without a network.

    Args:
        num_data: N; it is always called with all of them.
        num_states: K.
    """

    def __init__(self, num_data: int, num_states: int) -> None:
        super().__init__(())
        self.logits = nn.Parameter(torch.zeros(num_data, num_states))

    def forward(self, *context: Tensor) -> dist.Categorical:
        return dist.Categorical(logits=self.logits)


class SummedOut(PyroModule):
    """No guide: in training the model sums its own latents out, in evaluation they come from its exact posterior.

    For models whose latents are summed by ``TraceEnum_ELBO`` (mixtures, hidden Markov chains); the bound is log p(x).

    Args:
        model: its ``sample_posterior(x)`` is a guide program of the exact posterior.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not hasattr(model, "sample_posterior"):
            raise ValueError(
                "only a model with discrete latents and an exact posterior sums its latents out; accepted: model=gmm, "
                "model=tabular, model=hmm"
            )
        object.__setattr__(self, "model", model)  # not a submodule: its parameters are the model's

    def forward(self, x: Tensor) -> Any:
        if self.training:
            return None
        with torch.no_grad():
            return self.model.sample_posterior(x)


def exact(model: Any) -> Enumerated:
    """q(z|x) = p(z|x), its states summed over: TraceEnum_ELBO is then log p(x), the E step of EM."""
    _states(model)
    return Enumerated(ExactPosterior(model, (), model.event_shape))


def hard(model: Any) -> Enumerated:
    """q(z|x) all on the likeliest state: the E step of hard EM and of K-means."""
    _states(model)
    return Enumerated(HardPosterior(model, (), model.event_shape))


def amortized(model: Any, context_shape: Sequence[int], net: NetFactory) -> Enumerated:
    """A categorical q(z|x) from an encoder, or one over a few bits or one-hot vectors, its states summed over."""
    return Enumerated(summable(model, context_shape, net) or AmortizedCategorical(model, context_shape, net))


def uniform(model: Any, context_shape: Sequence[int]) -> Enumerated:
    """q(z|x) = 1/K, its states summed over."""
    return Enumerated(UniformCategorical(model, context_shape))


def _states(model: Any) -> int:
    """How many states the one latent of a model has."""
    states = getattr(model, "num_states", None)
    if states is None or getattr(model, "num_steps", 1) != 1:
        raise ValueError(
            "an enumerated guide needs a model with discrete latents; accepted: model=gmm, model=tabular, or "
            "guide=enumerated with prior=bits or prior=onehot and few latents"
        )
    return int(states)
