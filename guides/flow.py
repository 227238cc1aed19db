"""Posteriors made by pushing a diagonal normal through invertible maps."""

from collections.abc import Iterable, Sequence

import pyro.distributions as dist
from torch import Tensor, nn

from guides.gaussian import vector_size
from models.conditional import Conditional, NetFactory
from models.flows import AutoregressiveLayer, CouplingLayer, Flow, PlanarLayer, SylvesterLayer, spline_layer


class FlowPosterior(Conditional):
    """A diagonal normal and the features of a datum, read off the datum by one net, and a flow on top.

    It starts as the diagonal normal, for the layers of :mod:`models.flows` start as the identity. The density of a
    draw is known from the drawing; see the layers for what it costs to score other values. It has no closed-form KL
    and knows no mean.

    Args:
        event_shape: shape of one latent, ``(D,)``.
        context_shape: shape of one datum.
        net: builds the net, whose output is D means, D log standard deviations and ``context_dim`` features.
        layers: see :mod:`models.flows`; they read the features.
        context_dim: number of features; with 0 the layers are the same for all data.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int],
        net: NetFactory,
        layers: Iterable[nn.Module],
        context_dim: int,
    ) -> None:
        super().__init__(event_shape, context_shape)
        dim = vector_size(event_shape, type(self).__name__)
        self.sizes = [dim, dim, context_dim]
        self.net = net(self.context_shape, (sum(self.sizes),))
        self.layers = nn.ModuleList(layers)
        if not self.layers:
            raise ValueError("transforms must be at least 1, got 0")

    def forward(self, *context: Tensor) -> dist.Distribution:
        loc, log_scale, features = self.net(*context).split(self.sizes, dim=-1)
        base = dist.Normal(loc, log_scale.exp()).to_event(1)
        return Flow(base, [layer(features if self.sizes[2] else None) for layer in self.layers])


class PlanarPosterior(FlowPosterior):
    """A diagonal normal through planar maps (Rezende and Mohamed 2015): cheap, one bend each.

    Args:
        event_shape: shape of one latent, ``(D,)``.
        context_shape: shape of one datum.
        net: builds the encoder.
        transforms: number of maps.
        context_dim: number of features that the maps' parameters are read from; 0 makes them the same for all data.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int],
        net: NetFactory,
        transforms: int = 8,
        context_dim: int = 32,
    ) -> None:
        dim = vector_size(event_shape, "PlanarPosterior")
        layers = (PlanarLayer(dim, context_dim) for _ in range(transforms))
        super().__init__(event_shape, context_shape, net, layers, context_dim)


class SylvesterPosterior(FlowPosterior):
    """A diagonal normal through Sylvester maps (van den Berg et al. 2018): D bends each.

    Args:
        event_shape: shape of one latent, ``(D,)``.
        context_shape: shape of one datum.
        net: builds the encoder.
        transforms: number of maps.
        householder: number of reflections that make each map's orthogonal matrix.
        context_dim: number of features that the maps' parameters are read from; 0 makes them the same for all data.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int],
        net: NetFactory,
        transforms: int = 4,
        householder: int = 4,
        context_dim: int = 32,
    ) -> None:
        dim = vector_size(event_shape, "SylvesterPosterior")
        layers = (SylvesterLayer(dim, context_dim, householder) for _ in range(transforms))
        super().__init__(event_shape, context_shape, net, layers, context_dim)


class CouplingPosterior(FlowPosterior):
    """A diagonal normal through affine couplings (RealNVP; Dinh et al. 2017): fast in both directions.

    Args:
        event_shape: shape of one latent, ``(D,)`` with D at least 2.
        context_shape: shape of one datum.
        net: builds the encoder.
        transforms: number of couplings.
        hidden: widths of the layers of each coupling's network.
        context_dim: number of features that the networks also read; 0 for none.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int],
        net: NetFactory,
        transforms: int = 4,
        hidden: tuple[int, ...] = (64,),
        context_dim: int = 32,
    ) -> None:
        dim = vector_size(event_shape, "CouplingPosterior")
        layers = (CouplingLayer(dim, context_dim, i % 2 == 0, hidden) for i in range(transforms))
        super().__init__(event_shape, context_shape, net, layers, context_dim)


class InverseAutoregressivePosterior(FlowPosterior):
    """A diagonal normal through inverse autoregressive maps (IAF; Kingma et al. 2016): draws in one pass each.

    Args:
        event_shape: shape of one latent, ``(D,)`` with D at least 2.
        context_shape: shape of one datum.
        net: builds the encoder.
        transforms: number of maps; the order of the entries alternates.
        hidden: widths of the layers of each map's masked network.
        context_dim: number of features that the networks also read; 0 for none.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int],
        net: NetFactory,
        transforms: int = 2,
        hidden: tuple[int, ...] = (64,),
        context_dim: int = 32,
    ) -> None:
        dim = vector_size(event_shape, "InverseAutoregressivePosterior")
        layers = (AutoregressiveLayer(dim, context_dim, i % 2 == 1, hidden) for i in range(transforms))
        super().__init__(event_shape, context_shape, net, layers, context_dim)


class SplinePosterior(FlowPosterior):
    """A diagonal normal through spline couplings (Durkan et al. 2019): flexible within [-5, 5], fast both ways.

    Args:
        event_shape: shape of one latent, ``(D,)`` with D at least 2.
        context_shape: shape of one datum.
        net: builds the encoder.
        transforms: number of couplings.
        hidden: widths of the layers of each coupling's network.
        bins: pieces of each spline.
        context_dim: number of features that the networks also read; 0 for none.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int],
        net: NetFactory,
        transforms: int = 4,
        hidden: tuple[int, ...] = (64,),
        bins: int = 8,
        context_dim: int = 32,
    ) -> None:
        dim = vector_size(event_shape, "SplinePosterior")
        layers = (spline_layer(dim, context_dim, i % 2 == 0, hidden, bins) for i in range(transforms))
        super().__init__(event_shape, context_shape, net, layers, context_dim)
