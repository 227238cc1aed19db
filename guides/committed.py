"""Guides that cannot fall onto the prior: the KL has a floor by construction (Razavi et al. 2019)."""

import math
from collections.abc import Sequence

import pyro.distributions as dist
from pyro.nn import PyroModule
from scipy.optimize import brentq
from torch import Tensor

from guides.gaussian import DiagonalNormal
from models.conditional import Conditional, NetFactory
from models.priors import StandardNormal


class CommittedNormal(Conditional):
    """A diagonal normal that tells at least so many nats of each datum, whatever its parameters (the delta-VAE).

    A normal of mean zero and standard deviation s has the KL -log s + (s^2 - 1) / 2 from N(0, 1), and any other mean
    has more. The standard deviations are kept below the one at which that is each latent's share of the rate, so that
    KL(q(z|x) || p(z)) is at least ``rate`` for every datum (Razavi, van den Oord, Poole and Vinyals 2019, section 2.1,
    with the variance alone constrained; their correlated form is ``prior=ar1``).

    Args:
        event_shape: shape of one latent.
        context_shape: shape of one datum.
        net: builds the encoder, whose output is the means and then the logits of the scales' part of the largest.
        model: p(x, z), whose prior has to be N(0, I).
        rate: the KL that is committed, in nats for each datum; over all latent dimensions alike.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int],
        net: NetFactory,
        model: PyroModule,
        rate: float = 2.0,
    ) -> None:
        super().__init__(event_shape, context_shape)
        if not isinstance(getattr(model, "prior", None), StandardNormal):
            raise ValueError("the rate is committed against a standard normal prior; accepted: prior=standard")
        self.largest_scale = largest_scale(rate / self.event_shape.numel())
        self.core = DiagonalNormal(event_shape, context_shape, net)

    def forward(self, *context: Tensor) -> dist.Distribution:
        q = self.core(*context).base_dist
        # The core's scale is the exponential of what the net says: sigmoid(log s) = s / (1 + s).
        return dist.Normal(q.loc, self.largest_scale * q.scale.log().sigmoid()).to_event(len(self.event_shape))


def largest_scale(rate: float) -> float:
    """The standard deviation s below 1 at which N(0, s^2) is ``rate`` nats from N(0, 1)."""
    if not (0 < rate < math.inf):
        raise ValueError(f"rate is in nats and must be above 0, got {rate} for each latent")
    # log s is the root; s^2 / 2 is small where the rate is large, so that log s > -rate - 1/2
    return math.exp(brentq(lambda log_s: -log_s + (math.exp(2 * log_s) - 1) / 2 - rate, -rate - 0.5, 0.0))
