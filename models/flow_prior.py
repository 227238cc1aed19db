"""Priors made by pushing N(0, I) through invertible maps that are the same for all data."""

from collections.abc import Iterable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Transform

from models.conditional import Conditional
from models.flows import AutoregressiveLayer, CouplingLayer, Flow, pull, push, spline_layer


class FlowPrior(Conditional):
    """N(0, I) through a flow: log p(z) = log N(f(z); 0, I) + log |det df/dz|, with f the way back from z to noise.

    It starts as N(0, I), for the layers of :mod:`models.flows` start as the identity. Drawing is what generation
    needs and scoring is what training needs; see the layers for what either costs. No closed-form KL, no mean.

    Args:
        event_shape: shape of one latent, ``(D,)``.
        layers: see :mod:`models.flows`, made without context; the first one meets the noise.
        context_shape: shape of a context to ignore, where one is given.
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self, event_shape: Sequence[int], layers: Iterable[nn.Module], context_shape: Sequence[int] = ()
    ) -> None:
        super().__init__(event_shape, context_shape)
        self.layers = nn.ModuleList(layers)
        if not self.layers:
            raise ValueError("transforms must be at least 1, got 0")
        self.register_buffer("loc", torch.zeros(self.event_shape), persistent=False)
        self.register_buffer("scale", torch.ones(self.event_shape), persistent=False)

    def forward(self, *context: Tensor) -> dist.Distribution:
        base = dist.Normal(self.loc, self.scale).to_event(1)
        return Flow(base, [layer() for layer in self.layers])


class InverseTransform(Transform):
    """A map run the other way: what was fast in one direction is fast in the other.

    Unlike a transform's ``inv``, it takes derivatives from the same network call as the value.

    Args:
        transform: map of vectors.
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform
        self.domain, self.codomain = transform.codomain, transform.domain
        self.bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return pull(self.transform, x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return push(self.transform, y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -push(self.transform, y)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``y = f^-1(x)`` and the log abs det of its Jacobian, ``(..., D) -> (..., D), (...,)``."""
        y, log_det = pull(self.transform, x)
        return y, -log_det

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The way back, with the log abs det of the same Jacobian as :meth:`call_and_ladj`."""
        x, log_det = push(self.transform, y)
        return x, -log_det


class Inverted(nn.Module):
    """A layer whose map is run the other way.

    Args:
        layer: one of :mod:`models.flows`.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, context: Tensor | None = None) -> Transform:
        return InverseTransform(self.layer(context))


def _vector_size(event_shape: Sequence[int], owner: str) -> int:
    if len(event_shape) != 1:
        raise ValueError(f"{owner} is over vectors: accepted: event_shape (D,), got {tuple(event_shape)}")
    return event_shape[0]


class CouplingPrior(FlowPrior):
    """N(0, I) through affine couplings (RealNVP; Dinh et al. 2017): fast to score and to draw from.

    Args:
        event_shape: shape of one latent, ``(D,)`` with D at least 2.
        context_shape: shape of a context to ignore, where one is given.
        transforms: number of couplings.
        hidden: widths of the layers of each coupling's network.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int] = (),
        transforms: int = 4,
        hidden: tuple[int, ...] = (64,),
    ) -> None:
        dim = _vector_size(event_shape, "CouplingPrior")
        layers = (CouplingLayer(dim, 0, i % 2 == 0, hidden) for i in range(transforms))
        super().__init__(event_shape, layers, context_shape)


class AutoregressivePrior(FlowPrior):
    """N(0, I) through masked autoregressive maps (MAF; Papamakarios et al. 2017): scores in one pass, draws in D.

    Args:
        event_shape: shape of one latent, ``(D,)`` with D at least 2.
        context_shape: shape of a context to ignore, where one is given.
        transforms: number of maps; the order of the entries alternates.
        hidden: widths of the layers of each map's masked network.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int] = (),
        transforms: int = 2,
        hidden: tuple[int, ...] = (64,),
    ) -> None:
        dim = _vector_size(event_shape, "AutoregressivePrior")
        layers = (Inverted(AutoregressiveLayer(dim, 0, i % 2 == 1, hidden)) for i in range(transforms))
        super().__init__(event_shape, layers, context_shape)


class InverseAutoregressivePrior(FlowPrior):
    """N(0, I) through inverse autoregressive maps (IAF; Kingma et al. 2016): draws in one pass, scores in D.

    Args:
        event_shape: shape of one latent, ``(D,)`` with D at least 2.
        context_shape: shape of a context to ignore, where one is given.
        transforms: number of maps; the order of the entries alternates.
        hidden: widths of the layers of each map's masked network.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int] = (),
        transforms: int = 2,
        hidden: tuple[int, ...] = (64,),
    ) -> None:
        dim = _vector_size(event_shape, "InverseAutoregressivePrior")
        layers = (AutoregressiveLayer(dim, 0, i % 2 == 1, hidden) for i in range(transforms))
        super().__init__(event_shape, layers, context_shape)


class SplinePrior(FlowPrior):
    """N(0, I) through spline couplings (Durkan et al. 2019): flexible within [-5, 5], fast both ways.

    Args:
        event_shape: shape of one latent, ``(D,)`` with D at least 2.
        context_shape: shape of a context to ignore, where one is given.
        transforms: number of couplings.
        hidden: widths of the layers of each coupling's network.
        bins: pieces of each spline.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int] = (),
        transforms: int = 4,
        hidden: tuple[int, ...] = (64,),
        bins: int = 8,
    ) -> None:
        dim = _vector_size(event_shape, "SplinePrior")
        layers = (spline_layer(dim, 0, i % 2 == 0, hidden, bins) for i in range(transforms))
        super().__init__(event_shape, layers, context_shape)
