"""Gaussian families with diagonal covariance."""

from collections.abc import Sequence
from typing import ClassVar

import pyro.distributions as dist
from torch import Tensor

from models.conditional import Conditional, NetFactory
from models.nets import stacked_shape
from models.priors import LearnedNormal


class DiagonalNormal(Conditional):
    """Independent normals whose means and standard deviations one net reads off the context.

    The usual q(z|x) (Kingma and Welling 2014, equation 9). Over data it is a likelihood with a scale for every
    entry; between latents it is the prior of a hierarchy.

    Args:
        event_shape: shape of one draw.
        context_shape: shape of one context.
        net: builds the net, whose output is the means and then the log standard deviations.
    """

    support: ClassVar[str] = "real"

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory) -> None:
        super().__init__(event_shape, context_shape)
        self.net = net(self.context_shape, stacked_shape(self.event_shape, 2))

    def forward(self, *context: Tensor) -> dist.Distribution:
        loc, log_scale = self.net(*context).chunk(2, dim=-len(self.event_shape))
        return dist.Normal(loc, log_scale.exp()).to_event(len(self.event_shape))


class Unconditional(LearnedNormal):
    """One diagonal normal for all data, blind to the context: what amortization is measured against.

    Args:
        event_shape: shape of one latent.
        context_shape: shape of one datum, which is ignored.
    """
