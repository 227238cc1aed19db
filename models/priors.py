"""Gaussian priors p(z); the flexible ones have files of their own."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import models.distributions  # noqa: F401  (registers the divergence of a full-covariance guide from these priors)
from models.conditional import Conditional


class StandardNormal(Conditional):
    """N(0, I), without parameters.

    Args:
        event_shape: shape of one latent.
        context_shape: shape of a context to ignore, where one is given.
    """

    loc: Tensor
    scale: Tensor

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

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int] = ()) -> None:
        super().__init__(event_shape, context_shape)
        self.loc = nn.Parameter(torch.zeros(self.event_shape))
        self.log_scale = nn.Parameter(torch.zeros(self.event_shape))

    def forward(self, *context: Tensor) -> dist.Distribution:
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(len(self.event_shape))
