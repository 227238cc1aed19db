"""A prior that no independent posterior can match: latents as steps of an autoregression (Razavi et al. 2019)."""

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from scipy.optimize import brentq
from torch import Tensor

from models.conditional import Conditional


class AR1Prior(Conditional):
    """z_1 ~ N(0, 1), z_t ~ N(a z_{t-1}, 1 - a^2): each latent standard normal, neighbours correlated by a.

    The closest diagonal normal is ((D - 2) log(1 + a^2) - log(1 - a^2)) / 2 nats away (Razavi et al. 2019, equation 3),
    so that with a guide of independent latents the KL cannot fall below that; a is chosen for it to be ``rate``.

    Args:
        event_shape: ``(D,)``, D at least 2.
        context_shape: shape of a context to ignore, where one is given.
        rate: the KL in nats that a diagonal guide is committed to.
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int] = (), rate: float = 2.0) -> None:
        super().__init__(event_shape, context_shape)
        if len(event_shape) != 1 or event_shape[0] < 2:
            raise ValueError(f"latents are the steps of a sequence: accepted: (D,), D at least 2, got {event_shape}")
        if not (0 < rate < math.inf):
            raise ValueError(f"rate is in nats and must be above 0, got {rate}")
        steps = event_shape[0]
        self.correlation = correlation_for(rate, steps)
        apart = torch.arange(steps).unsqueeze(1) - torch.arange(steps)  # (D, D)
        # z_t = a^(t-1) e_1 + sqrt(1 - a^2) (e_t + a e_(t-1) + ...), the first column without the root
        factor = torch.where(apart >= 0, self.correlation ** apart.clamp(min=0), 0.0)
        factor[:, 1:] *= math.sqrt(1 - self.correlation**2)
        self.register_buffer("loc", torch.zeros(steps), persistent=False)
        self.register_buffer("scale_tril", factor.to(self.loc), persistent=False)

    def forward(self, *context: Tensor) -> dist.Distribution:
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)


def committed_rate(correlation: float, steps: int) -> float:
    """The smallest KL in nats of a diagonal normal from the autoregression."""
    return ((steps - 2) * math.log1p(correlation**2) - math.log1p(-(correlation**2))) / 2


def correlation_for(rate: float, steps: int) -> float:
    """The correlation of neighbours, between 0 and 1, that commits a diagonal normal to ``rate`` nats.

    Raises:
        ValueError: it would be 1 for all that a computer can tell.
    """
    nearly_one = 1 - 1e-9
    if rate > committed_rate(nearly_one, steps):
        raise ValueError(f"rate={rate} is too much for {steps} latents; accepted: fewer nats or more latents")
    return float(brentq(lambda a: committed_rate(a, steps) - rate, 0.0, nearly_one))
