"""Distributions of grids of whole numbers, place after place: priors over the codes of a tokenizer."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from models.conditional import Conditional

Logits = Callable[[Tensor, Tensor | None], Tensor]


class Autoregressive(dist.TorchDistribution):
    """Grids of whole numbers 0 ... K-1, each given those before it in raster order: left to right, then down.

    A normalized mass function on K^(H W) grids as long as ``logits`` is causal. Scoring takes one call of it, drawing
    one for each place.

    Args:
        logits: of grids ``(B, H, W)`` and contexts ``(B, *context_shape)`` the unnormalized log-probabilities
            ``(B, H, W, K)``, which at each place may depend on earlier places and the context alone.
        grid: ``(H, W)``.
        context: ``(*batch, *context_shape)``, or None.
        context_dims: number of dimensions of one context.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    support = constraints.independent(constraints.nonnegative_integer, 2)

    def __init__(
        self,
        logits: Logits,
        grid: Sequence[int],
        context: Tensor | None = None,
        context_dims: int = 0,
        validate_args: bool | None = None,
    ) -> None:
        self.logits, self.context, self.context_dims = logits, context, context_dims
        batch_shape = torch.Size() if context is None else context.shape[: context.dim() - context_dims]
        super().__init__(batch_shape, torch.Size(grid), validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Autoregressive":
        new = self._get_checked_instance(Autoregressive, _instance)
        batch_shape = torch.Size(batch_shape)
        new.logits, new.context_dims = self.logits, self.context_dims
        new.context = self._contexts(batch_shape)
        super(Autoregressive, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        batch = torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        grids = value.long().expand(batch + self.event_shape)
        grids = grids.reshape(-1, *self.event_shape)  # (*batch, H, W) -> (B, H, W)
        log_p = self.logits(grids, self._flat_contexts(batch)).log_softmax(-1)
        return log_p.gather(-1, grids.unsqueeze(-1)).flatten(1).sum(-1).reshape(batch)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        batch = torch.Size(sample_shape) + self.batch_shape
        contexts = self._flat_contexts(batch)
        grids = torch.zeros(batch.numel(), *self.event_shape, dtype=torch.long, device=self._device(contexts))
        for row in range(self.event_shape[0]):
            for column in range(self.event_shape[1]):
                here = self.logits_at(grids, contexts, row, column)
                grids[:, row, column] = torch.multinomial(here.softmax(-1), 1).squeeze(-1)
        return grids.reshape(batch + self.event_shape)

    def logits_at(self, grids: Tensor, contexts: Tensor | None, row: int, column: int) -> Tensor:
        """Of one place alone, ``(B, K)``: what is asked for as a grid grows; later tokens may be anything."""
        return self.logits(grids, contexts)[:, row, column]

    def _device(self, contexts: Tensor | None) -> torch.device:
        owner = getattr(self.logits, "__self__", None)
        parameter = next(owner.parameters(), None) if isinstance(owner, nn.Module) else None
        if parameter is not None:
            return parameter.device
        return torch.device("cpu") if contexts is None else contexts.device

    def _contexts(self, batch: torch.Size) -> Tensor | None:
        if self.context is None:
            return None
        return self.context.expand(batch + self.context.shape[self.context.dim() - self.context_dims :])

    def _flat_contexts(self, batch: torch.Size) -> Tensor | None:
        """(*batch, *context_shape) -> (B, *context_shape)."""
        contexts = self._contexts(batch)
        return None if contexts is None else contexts.reshape(batch.numel(), *contexts.shape[len(batch) :])


class TokenPrior(Conditional):
    """What all distributions of tokens share; leaves define :meth:`logits`, and see to it that they are causal.

    A context is a whole number for each grid, such as a class (``context_shape=()``), or a grid of other tokens, such
    as the top level of two (``context_shape=(h, w)``).

    Args:
        event_shape: the grid, ``(H, W)``.
        codes: K, the number of values of a token.
        context_shape: shape of one context.
        context_codes: number of values of the context; 0 where there is no context.
    """

    def __init__(
        self, event_shape: Sequence[int], codes: int, context_shape: Sequence[int] = (), context_codes: int = 0
    ) -> None:
        super().__init__(event_shape, context_shape)
        if len(self.event_shape) != 2 or min(self.event_shape) < 1:
            raise ValueError(f"tokens lie on a grid: accepted: event_shape (H, W), got {tuple(event_shape)}")
        if codes < 2:
            raise ValueError(f"tokens need at least 2 values, got codes={codes}")
        if len(self.context_shape) not in (0, 2) or (self.context_shape and not context_codes):
            raise ValueError(
                f"a context is one whole number or a grid of them, below context_codes: got context_shape "
                f"{tuple(context_shape)} with context_codes={context_codes}"
            )
        self.codes, self.context_codes = codes, context_codes

    @property
    def places(self) -> int:
        """H W."""
        return self.event_shape.numel()

    @abstractmethod
    def logits(self, tokens: Tensor, context: Tensor | None) -> Tensor:
        """Unnormalized log-probabilities ``(B, H, W, K)`` of each token given those before it in ``(B, H, W)``."""

    def forward(self, *context: Tensor) -> dist.Distribution:
        self.check_context(context)
        given = context[0] if context else None
        return Autoregressive(self.logits, self.event_shape, given, len(self.context_shape))

    def check_context(self, context: Sequence[Tensor]) -> None:
        """Refuse a missing context, and one too many."""
        if len(context) != bool(self.context_codes):
            shape = f"one, of shape (..., {', '.join(map(str, self.context_shape))})"
            wants = shape if self.context_codes else "none"
            raise ValueError(f"{type(self).__name__} reads contexts: accepted: {wants}; got {len(context)}")


class PositionTable(TokenPrior):
    """Independent tokens, each with probabilities of its own place: the baseline that knows no neighbours.

    Args:
        event_shape: the grid, ``(H, W)``.
        codes: K.
        context_codes: number of classes with tables of their own; 0 for one table.
    """

    def __init__(self, event_shape: Sequence[int], codes: int, context_codes: int = 0) -> None:
        super().__init__(event_shape, codes, (), context_codes)
        self.table = nn.Parameter(torch.zeros(max(context_codes, 1), *self.event_shape, codes))

    def logits(self, tokens: Tensor, context: Tensor | None) -> Tensor:
        return self.table[_classes(tokens, context)]

    def fit(self, tokens: Tensor, context: Tensor | None = None, smoothing: float = 1.0) -> None:
        """The relative frequencies in ``(N, H, W)``, as if each value had been seen ``smoothing`` times before."""
        flat = tokens.flatten(1)  # (N, H, W) -> (N, T)
        place = torch.arange(self.places, device=flat.device).expand_as(flat)
        which = _classes(tokens, context).unsqueeze(-1).expand_as(flat)
        _fit(self.table, (which, place, flat), smoothing)


class MarkovTable(TokenPrior):
    """Each token given the one before it in raster order, by a table: for each place one, or one for all.

    Args:
        event_shape: the grid, ``(H, W)``.
        codes: K.
        context_codes: number of classes with tables of their own; 0 for one.
        positional: whether each place has a table of its own.
    """

    def __init__(self, event_shape: Sequence[int], codes: int, context_codes: int = 0, positional: bool = True) -> None:
        super().__init__(event_shape, codes, (), context_codes)
        self.positional = positional
        # Before the first token stands the value K.
        tables = self.places if positional else 1
        self.table = nn.Parameter(torch.zeros(max(context_codes, 1), tables, codes + 1, codes))

    def logits(self, tokens: Tensor, context: Tensor | None) -> Tensor:
        flat = tokens.flatten(1)  # (B, H, W) -> (B, T)
        here = self.table[(*self._place(flat, _classes(tokens, context)), self._before(flat))]
        return here.unflatten(1, self.event_shape)

    def fit(self, tokens: Tensor, context: Tensor | None = None, smoothing: float = 1.0) -> None:
        """The relative frequencies in ``(N, H, W)``, as if each transition had been seen ``smoothing`` times before."""
        flat = tokens.flatten(1)
        _fit(self.table, (*self._place(flat, _classes(tokens, context)), self._before(flat), flat), smoothing)

    def _before(self, flat: Tensor) -> Tensor:
        return torch.cat([torch.full_like(flat[:, :1], self.codes), flat[:, :-1]], dim=1)

    def _place(self, flat: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.arange(self.places, device=flat.device) if self.positional else flat.new_zeros(self.places)
        return which.unsqueeze(-1).expand_as(flat), place.expand_as(flat)


class TwoLevelTokens(nn.Module):
    """p(top) p(bottom|top): the codes of a two-level tokenizer (Razavi, van den Oord and Vinyals 2019, section 3.2).

    Args:
        top: of grids ``(h, w)``, without context.
        bottom: of grids ``(H, W)`` in the context of a top grid.
    """

    def __init__(self, top: TokenPrior, bottom: TokenPrior) -> None:
        super().__init__()
        if bottom.context_shape != top.event_shape or bottom.context_codes != top.codes:
            raise ValueError(
                f"the bottom reads grids {tuple(bottom.context_shape)} of {bottom.context_codes} codes, "
                f"the top makes grids {tuple(top.event_shape)} of {top.codes}"
            )
        self.top, self.bottom = top, bottom

    def log_prob(self, top: Tensor, bottom: Tensor) -> Tensor:
        """log p(top) + log p(bottom|top) in nats, ``(*batch,)``."""
        return self.top().log_prob(top) + self.bottom(top).log_prob(bottom)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> tuple[Tensor, Tensor]:  # noqa: B008
        """Both levels, ``(*sample_shape, h, w)`` and ``(*sample_shape, H, W)``."""
        top = self.top().sample(sample_shape)
        return top, self.bottom(top).sample()


def _classes(tokens: Tensor, context: Tensor | None) -> Tensor:
    """The class of each of B grids, ``(B,)``; 0 without classes."""
    return tokens.new_zeros(tokens.shape[0]) if context is None else context.long()


@torch.no_grad()
def _fit(table: Tensor, index: tuple[Tensor, ...], smoothing: float) -> None:
    """Set log-probabilities to those of how often each index occurs."""
    if not smoothing > 0:
        raise ValueError(f"smoothing must be above 0, or unseen tokens would be impossible, got {smoothing}")
    counts = torch.full_like(table, smoothing)
    shaped = counts.flatten(1, 2) if table.dim() > len(index) else counts  # (S, H, W, K) -> (S, T, K), a view
    shaped.index_put_(index, torch.ones_like(index[0], dtype=table.dtype), accumulate=True)
    table.copy_((counts / counts.sum(-1, keepdim=True)).log())
