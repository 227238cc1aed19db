"""The one type that priors, likelihoods and guide cores share."""

from collections.abc import Sequence
from typing import Protocol

import torch
from pyro.distributions import Distribution
from pyro.nn import PyroModule
from torch import Tensor, nn


class NetFactory(Protocol):
    """Builds a net from shapes: ``(*batch, *in_shape) -> (*batch, *out_shape)`` for any number of batch dimensions."""

    def __call__(self, in_shape: Sequence[int], out_shape: Sequence[int]) -> nn.Module: ...


class Conditional(PyroModule):
    """A module whose ``forward(*context)`` returns a distribution.

    A prior p(z), a likelihood p(x|z) and the core of a guide q(z|x) are all of this type, so that any of them can
    stand where a distribution with its shapes is wanted: a diagonal Gaussian is a guide core over latents, and over
    data it is a likelihood with a learned scale for every pixel.

    Shapes. Each context tensor is ``(*batch, *context_shape)`` with any number of leading batch dimensions
    (particles x data, say). The distribution returned has ``event_shape`` equal to :attr:`event_shape` and a batch
    shape that broadcasts to ``batch``; it is ``()`` where the distribution does not depend on its context, and a
    Pyro plate expands it. Parts that ignore their context accept being called without any.

    Args:
        event_shape: shape of one draw, e.g. ``(50,)`` for latents, ``(1, 28, 28)`` for images.
        context_shape: shape of one context, without batch dimensions; ``()`` when there is none.
    """

    event_shape: torch.Size
    context_shape: torch.Size
    steep: str = ""  # of a prior: the side, left or right, on which -log p(z) grows exponentially
    has_density: bool = True  # False of what puts all its mass on a point
    tail_order: float | None = None  # of a prior: -log p(z) grows no faster than this power of |z|; None if unknown

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int] = ()) -> None:
        super().__init__()
        self.event_shape = torch.Size(event_shape)
        self.context_shape = torch.Size(context_shape)

    def forward(self, *context: Tensor) -> Distribution:
        raise NotImplementedError(f"{type(self).__name__} must define forward(*context) -> Distribution")
