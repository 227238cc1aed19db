"""Guides for models with two layers of latents."""

from collections.abc import Sequence
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from guides.gaussian import DiagonalNormal
from models.conditional import NetFactory
from models.hierarchical import TwoLayerModel
from models.nets import MLP, stacked_shape


class BottomUp(PyroModule):
    """q(z1|x) q(z2|z1): the layers are inferred in the order in which the data meet them (Burda et al. 2016).

    The model draws them in the other order, so that there is no closed-form KL.

    Args:
        context_shape: shape of one datum.
        net: builds the encoder of z1.
        model: the two-layer model whose latents are inferred.
        hidden: widths of the layers of the net from z1 to z2.
    """

    def __init__(
        self, context_shape: Sequence[int], net: NetFactory, model: TwoLayerModel, hidden: tuple[int, ...] = (100, 100)
    ) -> None:
        super().__init__()
        z1, z2 = _shapes(model, "BottomUp")
        self.first = DiagonalNormal(z1, context_shape, net)
        self.second = DiagonalNormal(z2, z1, partial(MLP, hidden=hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Draw both layers for data ``(N, *context_shape)``; returns z1, ``(..., N, latent_dim)``."""
        with pyro.plate("data", x.shape[0], dim=-1):
            z1 = pyro.sample("z1", self.first(x))
            pyro.sample("z2", self.second(z1))
        return z1


class TopDown(PyroModule):
    """q(z2|x) q(z1|x, z2): the layers are inferred in the model's order, z1 by a net (Tomczak and Welling 2018).

    Args:
        context_shape: shape of one datum.
        net: builds the encoder from a datum to features.
        model: the two-layer model whose latents are inferred.
        features: number of features, which both layers read.
        hidden: widths of the layers of the nets from the features to z2, and from features and z2 to z1.
    """

    def __init__(
        self,
        context_shape: Sequence[int],
        net: NetFactory,
        model: TwoLayerModel,
        features: int = 100,
        hidden: tuple[int, ...] = (100,),
    ) -> None:
        super().__init__()
        z1, z2 = _shapes(model, "TopDown")
        mlp = partial(MLP, hidden=hidden)
        self.encoder = net(context_shape, (features,))
        self.second = DiagonalNormal(z2, (features,), mlp)
        self.first = DiagonalNormal(z1, (features + z2.numel(),), mlp)

    def forward(self, x: Tensor) -> Tensor:
        """Draw both layers for data ``(N, *context_shape)``; returns z1, ``(..., N, latent_dim)``."""
        features = self.encoder(x).tanh()
        with pyro.plate("data", x.shape[0], dim=-1):
            z2 = pyro.sample("z2", self.second(features))
            both = torch.cat([features.expand(*z2.shape[:-1], -1), z2], dim=-1)
            return pyro.sample("z1", self.first(both))


class Ladder(PyroModule):
    """q(z2|x) q(z1|x, z2), where q(z1|x, z2) is a datum's evidence on top of p(z1|z2) (Sønderby et al. 2016).

    The encoder's normal for z1 is multiplied with the model's: precisions add, and means are averaged with them as
    weights. Gradients reach p(z1|z2) through the guide as well.

    Args:
        context_shape: shape of one datum.
        net: builds the encoder from a datum to features, the means and log standard deviations for z1 first.
        model: the two-layer model whose latents are inferred; its p(z1|z2), independent normals, is referred to.
        features: number of features that z2 is inferred from.
        hidden: widths of the layers of the net from the features to z2.
    """

    def __init__(
        self,
        context_shape: Sequence[int],
        net: NetFactory,
        model: TwoLayerModel,
        features: int = 100,
        hidden: tuple[int, ...] = (100,),
    ) -> None:
        super().__init__()
        z1, z2 = _shapes(model, "Ladder")
        if not isinstance(model.middle, DiagonalNormal):
            raise ValueError("Ladder needs a model whose p(z1|z2) is a DiagonalNormal")
        self.sizes = [*stacked_shape(z1, 2), features]
        self.encoder = net(context_shape, (sum(self.sizes),))
        self.second = DiagonalNormal(z2, (features,), partial(MLP, hidden=hidden))
        object.__setattr__(self, "model", model)  # not a submodule

    def forward(self, x: Tensor) -> Tensor:
        """Draw both layers for data ``(N, *context_shape)``; returns z1, ``(..., N, latent_dim)``."""
        own, features = self.encoder(x).split(self.sizes, dim=-1)
        loc, log_scale = own.chunk(2, dim=-1)
        with pyro.plate("data", x.shape[0], dim=-1):
            z2 = pyro.sample("z2", self.second(features.tanh()))
            return pyro.sample("z1", merged(dist.Normal(loc, log_scale.exp()), self.model.middle(z2).base_dist))


def merged(one: dist.Normal, other: dist.Normal) -> dist.Distribution:
    """The normalized product of two diagonal normals; the last dimension becomes the event."""
    precision, other_precision = one.scale**-2, other.scale**-2
    total = precision + other_precision
    loc = (precision * one.loc + other_precision * other.loc) / total
    return dist.Normal(loc, total.rsqrt()).to_event(1)


def _shapes(model: TwoLayerModel, owner: str) -> tuple[torch.Size, torch.Size]:
    """Shapes of z1 and z2."""
    if not isinstance(model, TwoLayerModel):
        raise ValueError(f"{owner} infers the latents z1 and z2 of a two-layer model: accepted: model=two_layer")
    return model.middle.event_shape, model.top.event_shape
