"""P(y|x): a latent-variable model of one part of a datum given the rest."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from models.conditional import Conditional

SIDES = ("first", "last")


class Partial(dist.TorchDistribution):
    """Independent entries of which some are given: they are neither scored nor drawn.

    Args:
        base: entries that are independent given their parameters, in its event dimensions.
        given: which entries are, a mask of the event's shape.
        value: data whose given entries count, ``(..., N, *event_shape)``.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, base: dist.Independent, given: Tensor, value: Tensor) -> None:
        if not isinstance(base, dist.Independent) or base.base_dist.event_shape:
            raise ValueError("only a likelihood of independent entries can leave some of them out of its score")
        self.base, self.given, self.value = base, given, value
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.base.support

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Partial":
        return Partial(self.base.expand(batch_shape), self.given, self.value)

    @property
    def mean(self) -> Tensor:
        return torch.where(self.given, self.value, self.base.mean)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return torch.where(self.given, self.value, self.base.sample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        scores = self.base.base_dist.log_prob(value).masked_fill(self.given, 0.0)
        return scores.flatten(-len(self.event_shape)).sum(-1)  # (..., N, *event) -> (..., N)


class ConditionalModel(PyroModule):
    """P(y|x) = sum over z of P(z|x) P(y|z, x), for data that are x and y side by side (Sohn, Lee and Yan 2015).

    A datum holds both: some of its entries are given, the context x, and the others are scored, the target y. So it is
    a Pyro program of the data alone, with a latent site ``z`` and an observed site ``x`` whose given entries have no
    part in the log-likelihood, and everything that takes such programs takes it: a guide reads q(z|x, y) off the whole
    datum, log p(x) is log P(y|x), and draws keep what is given. A number per entry counts the given ones too.

    Args:
        prior: P(z|x), its context the given entries in order, ``(G,)``; or P(z), without context.
        likelihood: P(y|z, x) over whole data, of independent entries; its context is the latent, flat, and, unless it
            is to see the latent alone, the given entries after it.
        given: which entries are, a mask of the datum's shape.
    """

    given: Tensor
    given_places: Tensor
    context_loc: Tensor
    context_scale: Tensor

    def __init__(self, prior: Conditional, likelihood: Conditional, given: Tensor) -> None:
        super().__init__()
        count, latent = int(given.sum()), prior.event_shape.numel()
        if given.shape != likelihood.event_shape or not 0 < count < given.numel():
            raise ValueError(
                f"a mask over data of shape {tuple(likelihood.event_shape)} leaves something to predict and something "
                f"to predict it from; {count} of {given.numel()} entries are given"
            )
        wide = torch.Size((latent + count,))
        if likelihood.context_shape not in (wide, torch.Size((latent,))):
            raise ValueError(
                f"the likelihood's context is the latent, ({latent},), or that and the given entries, {tuple(wide)}; "
                f"got {tuple(likelihood.context_shape)}"
            )
        if prior.context_shape not in (torch.Size(()), torch.Size((count,))):
            raise ValueError(f"the prior's context is the {count} given entries, got {tuple(prior.context_shape)}")
        self.prior, self.likelihood = prior, likelihood
        self.decoder_sees_context = likelihood.context_shape == wide
        self.register_buffer("given", given, persistent=False)
        self.register_buffer("given_places", given.flatten().nonzero().squeeze(1), persistent=False)
        self.register_buffer("context_loc", torch.zeros(count))
        self.register_buffer("context_scale", torch.ones(count))

    def context(self, x: Tensor) -> Tensor:
        """The given entries of data ``(N, *event_shape)``, standardized, ``(N, G)``."""
        flat = x.flatten(x.dim() - self.given.dim())  # (N, *event) -> (N, D)
        # by places: how many a mask chooses is known to its values alone, for which a GPU would have to be asked
        return (flat.index_select(-1, self.given_places) - self.context_loc) / self.context_scale

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Standardize the given entries by those of training data ``(N, *event_shape)``."""
        self.context_loc.zero_(), self.context_scale.fill_(1.0)
        context = self.context(x)
        scale = context.std(0, correction=0)
        self.context_loc.copy_(context.mean(0))
        self.context_scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)))

    def p_latent(self, x: Tensor) -> dist.TorchDistribution:
        """P(z|x) for the given entries of data ``(N, *event_shape)``."""
        return self.prior(self.context(x)) if self.prior.context_shape else self.prior()

    def p_data(self, z: Tensor, x: Tensor) -> Partial:
        """P(y|z, x) for latents ``(..., N, *latent_shape)`` and data ``(N, *event_shape)``."""
        seen = z.flatten(z.dim() - len(self.prior.event_shape))  # (..., N, *latent) -> (..., N, L)
        if self.decoder_sees_context:
            context = self.context(x)
            batch = torch.broadcast_shapes(seen.shape[:-1], context.shape[:-1])
            seen = torch.cat([part.expand(*batch, -1) for part in (seen, context)], -1)
        return Partial(self.likelihood(seen), self.given, x)

    def forward(self, x: Tensor) -> Tensor:
        """Run the program on data ``(N, *event_shape)``; returns the latents, ``(..., N, *latent_shape)``."""
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", self.p_latent(x))
            pyro.sample("x", self.p_data(z, x), obs=x)
        return z


def given_entries(event_shape: Sequence[int], count: int, side: str) -> Tensor:
    """A mask of ``count`` rows of an image ``(C, H, W)``, or entries of a vector ``(D,)``, at one side.

    Raises:
        ValueError: no such side, or nothing left of one of the two parts.
    """
    if side not in SIDES:
        raise ValueError(f"side must be one of {', '.join(SIDES)}, got {side!r}")
    if len(event_shape) not in (1, 3):
        raise ValueError(f"a datum is an image (C, H, W) or a vector (D,), got shape {tuple(event_shape)}")
    places = event_shape[-2] if len(event_shape) == 3 else event_shape[0]
    if not 0 < count < places:
        what = "rows of the image" if len(event_shape) == 3 else "entries"
        raise ValueError(f"given must be between 1 and {places - 1} of the {places} {what}, got {count}")
    place = torch.arange(places)
    chosen = place < count if side == "first" else place >= places - count
    shape = (1, places, 1) if len(event_shape) == 3 else (places,)
    return chosen.reshape(shape).expand(*event_shape).clone()
