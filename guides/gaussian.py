"""Gaussian families: diagonal, low-rank and full covariance, and one for all data."""

from collections.abc import Sequence
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

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


def vector_size(event_shape: Sequence[int], owner: str) -> int:
    """D of an event shape ``(D,)``.

    Raises:
        ValueError: the events are no vectors.
    """
    if len(event_shape) != 1:
        raise ValueError(f"{owner} is a family over vectors: accepted: event_shape (D,), got {tuple(event_shape)}")
    return event_shape[0]


class FullNormal(Conditional):
    """A normal with full covariance, whose Cholesky factor one net reads off the context.

    The factor is diag(scale) (I + T) with T strictly lower triangular: scale_d is the standard deviation of z_d given
    the entries before it. A net that says nothing of T gives :class:`DiagonalNormal`.

    Args:
        event_shape: shape of one draw, ``(D,)``.
        context_shape: shape of one context.
        net: builds the net, with D means, D log scales and the D (D - 1) / 2 entries of T by rows as output.
    """

    support: ClassVar[str] = "real"
    places: Tensor

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory) -> None:
        super().__init__(event_shape, context_shape)
        dim = vector_size(event_shape, "FullNormal")
        self.sizes = [dim, dim, dim * (dim - 1) // 2]
        self.net = net(self.context_shape, (sum(self.sizes),))
        self.register_buffer("places", torch.tril_indices(dim, dim, -1), persistent=False)

    def forward(self, *context: Tensor) -> dist.Distribution:
        loc, log_scale, below = self.net(*context).split(self.sizes, dim=-1)
        factor = torch.diag_embed(torch.ones_like(loc))
        factor[..., self.places[0], self.places[1]] = below
        return dist.MultivariateNormal(loc, scale_tril=log_scale.exp().unsqueeze(-1) * factor)


class LowRankNormal(Conditional):
    """A normal with covariance F F' + diag(scale^2) and a narrow F, read off the context by one net.

    Few numbers describe it, which is what it is for; it is then a normal like :class:`FullNormal`, with the same
    closed forms, for at the size of a latent its Cholesky factor costs less than a decoder.

    Args:
        event_shape: shape of one draw, ``(D,)``.
        context_shape: shape of one context.
        net: builds the net, with D means, D log scales and the entries of F by rows as output.
        rank: columns of F.
    """

    support: ClassVar[str] = "real"

    def __init__(
        self, event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory, rank: int = 2
    ) -> None:
        super().__init__(event_shape, context_shape)
        dim = vector_size(event_shape, "LowRankNormal")
        if not 1 <= rank <= dim:
            raise ValueError(f"rank must lie between 1 and the number of latents, {dim}, got {rank}")
        self.sizes = [dim, dim, dim * rank]
        self.net = net(self.context_shape, (sum(self.sizes),))

    def forward(self, *context: Tensor) -> dist.Distribution:
        loc, log_scale, factor = self.net(*context).split(self.sizes, dim=-1)
        factor = factor.unflatten(-1, (self.sizes[0], -1))  # (*batch, D rank) -> (*batch, D, rank)
        covariance = factor @ factor.mT + torch.diag_embed((2 * log_scale).exp())
        # The variant of the factorization that does not check its input spares a wait for the device.
        return dist.MultivariateNormal(loc, scale_tril=torch.linalg.cholesky_ex(covariance).L)


class Unconditional(LearnedNormal):
    """One diagonal normal for all data, blind to the context: what amortization is measured against.

    Args:
        event_shape: shape of one latent.
        context_shape: shape of one datum, which is ignored.
    """

    def for_each(self, num_data: int) -> None:
        """Hold a normal for each of ``num_data`` data from now on, all starting as the one: for local inference."""
        self.loc = nn.Parameter(self.loc.detach().expand(num_data, *self.event_shape).clone())
        self.log_scale = nn.Parameter(self.log_scale.detach().expand(num_data, *self.event_shape).clone())
