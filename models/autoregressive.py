"""Distributions of arrays of whole numbers, entry after entry, from a decoder that is told a latent."""

from typing import Any, Protocol

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


class EntryDecoder(Protocol):
    """What scores and draws arrays of whole numbers 0 ... L-1, each entry given those before it and a condition."""

    def log_mass(self, values: Tensor, condition: Tensor) -> Tensor:
        """log p of arrays ``(B, *event_shape)``, whole numbers held as floats, given ``(B, *condition)``: ``(B,)``."""

    def draw(self, condition: Tensor, greedy: bool = False) -> Tensor:
        """Arrays ``(B, *event_shape)``, of the condition's type: each entry drawn, or the likeliest one taken."""


class AutoregressiveLevels(dist.TorchDistribution):
    """Arrays of whole numbers held as floats, drawn entry by entry (ancestrally) and scored all at once.

    A normalized mass function as long as the decoder is one. It knows no mean, which would be a sum over all arrays;
    what can be shown of it are draws and :meth:`greedy`.

    Args:
        decoder: scores and draws.
        condition: ``(*batch, *condition_shape)``.
        event_shape: of one array.
        levels: L.
        condition_dims: number of dimensions of one condition.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012

    def __init__(
        self,
        decoder: EntryDecoder,
        condition: Tensor,
        event_shape: torch.Size,
        levels: int,
        condition_dims: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        self.decoder, self.condition, self.levels, self.condition_dims = decoder, condition, levels, condition_dims
        batch_shape = condition.shape[: condition.dim() - condition_dims]
        super().__init__(batch_shape, torch.Size(event_shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.integer_interval(0, self.levels - 1), len(self.event_shape))

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "AutoregressiveLevels":
        new = self._get_checked_instance(AutoregressiveLevels, _instance)
        new.decoder, new.levels, new.condition_dims = self.decoder, self.levels, self.condition_dims
        new.condition = self._conditions(torch.Size(batch_shape))
        super(AutoregressiveLevels, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        batch = torch.broadcast_shapes(value.shape[: value.dim() - len(self.event_shape)], self.batch_shape)
        values = value.expand(batch + self.event_shape).reshape(-1, *self.event_shape)  # -> (B, *event)
        return self.decoder.log_mass(values, self._flat_conditions(batch)).reshape(batch)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        batch = torch.Size(sample_shape) + self.batch_shape
        return self.decoder.draw(self._flat_conditions(batch)).reshape(batch + self.event_shape)

    @torch.no_grad()
    def greedy(self) -> Tensor:
        """The array, ``(*batch, *event_shape)``, whose every entry is the likeliest given those before it.

        Not the likeliest array, which is hard to find; it has no randomness, and shows what the latent determines.
        """
        return self.decoder.draw(self._flat_conditions(self.batch_shape), greedy=True).reshape(self.shape())

    def _conditions(self, batch: torch.Size) -> Tensor:
        return self.condition.expand(batch + self.condition.shape[self.condition.dim() - self.condition_dims :])

    def _flat_conditions(self, batch: torch.Size) -> Tensor:
        """(*batch, *condition_shape) -> (B, *condition_shape)."""
        conditions = self._conditions(batch)
        return conditions.reshape(batch.numel(), *conditions.shape[len(batch) :])


def choose(logits: Tensor, greedy: bool) -> Tensor:
    """A level for each row of logits ``(B, L)``: drawn, or the likeliest; ``(B,)`` whole numbers."""
    return logits.argmax(-1) if greedy else torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
