"""Implicit models: draws without a density, for contrast with all the others (Goodfellow et al. 2014)."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from models.conditional import NetFactory
from models.likelihoods import Likelihood

NO_DENSITY = (
    "an implicit model draws data and has no density: log p(x), bounds on it and their gradients cannot be computed; "
    "accepted: a likelihood with a density, such as likelihood=gaussian, or adversarial training (study adversarial)"
)


class DrawsOnly(dist.TorchDistribution):
    """A value that can be drawn and not scored: the image of a latent under a generator.

    Args:
        value: ``(*batch, *event_shape)``.
        event_dims: number of dimensions of the event.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, value: Tensor, event_dims: int, validate_args: bool | None = None) -> None:
        self.value, self.event_dims = value, event_dims
        split = value.dim() - event_dims
        super().__init__(value.shape[:split], value.shape[split:], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.event_dims)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "DrawsOnly":
        return DrawsOnly(self.value.expand(torch.Size(batch_shape) + self.event_shape), self.event_dims, False)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.value.expand(self._extended_shape(sample_shape))

    @property
    def mean(self) -> Tensor:
        return self.value

    def log_prob(self, value: Tensor) -> Tensor:
        """Refused.

        Raises:
            ValueError: always; there is no density.
        """
        raise ValueError(NO_DENSITY)


class Implicit(Likelihood):
    """x = G(z), pixels in [0, 1]: the decoder alone makes the data, and p(x) has no density.

    Args:
        event_shape: shape of one datum.
        context_shape: shape of one latent.
        net: builds the decoder.
    """

    support = "real"
    refusal = NO_DENSITY  # to whoever would score data by it

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory) -> None:
        super().__init__(event_shape, context_shape, net)

    def forward(self, *context: Tensor) -> dist.Distribution:
        return DrawsOnly(self.net(*context).sigmoid(), len(self.event_shape))

    def to_output(self, mean: Tensor) -> Tensor:
        """Logits of the mean, which is kept 0.001 from 0 and 1."""
        return mean.logit(eps=1e-3)
