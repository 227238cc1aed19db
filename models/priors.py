"""Priors p(z) made of normals; those made of a guide or of a flow have files of their own."""

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import models.distributions  # noqa: F401  (registers the divergence of a full-covariance guide from these priors)
from models.conditional import Conditional
from models.normal_mixture import mixture_of


class StandardNormal(Conditional):
    """N(0, I), without parameters.

    Args:
        event_shape: shape of one latent.
        context_shape: shape of a context to ignore, where one is given.
    """

    loc: Tensor
    scale: Tensor
    tail_order = 2.0

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int] = ()) -> None:
        super().__init__(event_shape, context_shape)
        self.register_buffer("loc", torch.zeros(self.event_shape), persistent=False)
        self.register_buffer("scale", torch.ones(self.event_shape), persistent=False)

    def forward(self, *context: Tensor) -> dist.Distribution:
        return dist.Normal(self.loc, self.scale).to_event(len(self.event_shape))


class LearnedNormal(Conditional):
    """N(loc, scale^2) with learned mean and standard deviations, starting at N(0, I).

    Fixing it at N(0, I) loses nothing as long as the first layer of the decoder and the last of the encoder are
    affine: they absorb both parameters.

    Args:
        event_shape: shape of one latent.
        context_shape: shape of a context to ignore, where one is given.
    """

    tail_order = 2.0

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int] = ()) -> None:
        super().__init__(event_shape, context_shape)
        self.loc = nn.Parameter(torch.zeros(self.event_shape))
        self.log_scale = nn.Parameter(torch.zeros(self.event_shape))

    def forward(self, *context: Tensor) -> dist.Distribution:
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(len(self.event_shape))


class MixturePrior(Conditional):
    """A mixture of diagonal normals with learned weights, means and standard deviations.

    The means start at random, drawn from N(0, I / 2), and all variances at 1/2: averaged over these draws, the
    mixture starts as N(0, I).

    Args:
        event_shape: shape of one latent.
        context_shape: shape of a context to ignore, where one is given.
        components: number of components.
    """

    tail_order = 2.0

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int] = (), components: int = 10) -> None:
        super().__init__(event_shape, context_shape)
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}")
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, *self.event_shape) / math.sqrt(2))
        self.log_scale = nn.Parameter(torch.full((components, *self.event_shape), -math.log(2) / 2))

    def component(self, c: Tensor) -> dist.TorchDistribution:
        """p(z|c) of components ``(*batch)``: batch shape ``batch``, event shape :attr:`event_shape`."""
        return dist.Normal(self.loc[c], self.log_scale[c].exp()).to_event(len(self.event_shape))

    def responsibilities(self, z: Tensor) -> Tensor:
        """log p(c|z) of latents ``(*batch, *event_shape)``, ``(*batch, C)``."""
        parts = dist.Normal(self.loc, self.log_scale.exp()).to_event(len(self.event_shape))
        log_joint = parts.log_prob(z.unsqueeze(-1 - len(self.event_shape))) + self.logits.log_softmax(0)
        return log_joint.log_softmax(-1)

    @torch.no_grad()
    def become(self, logits: Tensor, loc: Tensor, scale: Tensor) -> None:
        """Take the parameters of a mixture: ``(C,)`` and twice ``(C, *event_shape)``."""
        self.logits.copy_(logits)
        self.loc.copy_(loc.reshape(self.loc.shape))
        self.log_scale.copy_(scale.reshape(self.loc.shape).log())

    def forward(self, *context: Tensor) -> dist.Distribution:
        parts = dist.Normal(self.loc, self.log_scale.exp()).to_event(len(self.event_shape))
        return mixture_of(parts, self.logits)
