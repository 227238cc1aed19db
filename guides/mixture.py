"""Mixtures of normals as posteriors, with gradients through their draws."""

from collections.abc import Sequence

import pyro.distributions as dist
from torch import Tensor

from guides.gaussian import vector_size
from models.conditional import Conditional, NetFactory
from models.normal_mixture import ReparameterizedMixture


class NormalMixture(Conditional):
    """A mixture of diagonal normals, for posteriors with several modes; read off the context by one net.

    Args:
        event_shape: shape of one draw, ``(D,)``.
        context_shape: shape of one context.
        net: builds the net, whose output is, for each component, its logit, D means and D log standard deviations.
        components: number of components.
    """

    support = "real"

    def __init__(
        self, event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory, components: int = 5
    ) -> None:
        super().__init__(event_shape, context_shape)
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}")
        dim = vector_size(event_shape, "NormalMixture")
        self.components, self.sizes = components, [1, dim, dim]
        self.net = net(self.context_shape, (components * sum(self.sizes),))

    def forward(self, *context: Tensor) -> dist.Distribution:
        output = self.net(*context).unflatten(-1, (self.components, -1))  # (*batch, C (1 + 2 D)) -> (*batch, C, ...)
        logits, loc, log_scale = output.split(self.sizes, dim=-1)
        parts = dist.Normal(loc, log_scale.exp()).to_event(1)
        return ReparameterizedMixture(dist.Categorical(logits=logits.squeeze(-1)), parts)
