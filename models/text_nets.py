"""Encoders that read lines of tokens (see :mod:`models.text`)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from models.nets import batch_shape
from models.text import scored


class LineEncoder(nn.Module):
    """Embedded tokens through a recurrent net, whose states are made one vector, and an affine output layer.

    Leaves say which recurrent net, ``cell``.

    Args:
        in_shape: ``(T,)``.
        out_shape: shape of one output.
        levels: V, the size of the vocabulary.
        width: of an embedded token.
        hidden: of the state.
        pool: ``"last"`` reads the state after the end of the line, ``"mean"`` and ``"max"`` all of them up to there,
            which lets words far from the end be felt (Long, Cao and Cheung 2019).
    """

    cell: ClassVar[type[nn.GRU] | type[nn.LSTM]]
    reads_tokens: ClassVar[bool] = True  # no gradient reaches its input

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        levels: int,
        width: int = 64,
        hidden: int = 128,
        pool: Literal["last", "mean", "max"] = "last",
    ) -> None:
        super().__init__()
        if len(in_shape) != 1:
            raise ValueError(f"it reads lines of tokens: accepted: in_shape (T,), got {tuple(in_shape)}")
        if pool not in ("last", "mean", "max"):
            raise ValueError(f"pool must be 'last', 'mean' or 'max', got {pool!r}")
        if width < 1 or hidden < 1:
            raise ValueError(f"width and hidden must be at least 1, got {width} and {hidden}")
        self.in_shape, self.out_shape, self.pool = torch.Size(in_shape), torch.Size(out_shape), pool
        self.embedding = nn.Embedding(levels, width)
        self.recurrent = self.cell(width, hidden, batch_first=True)
        self.output = nn.Linear(hidden, self.out_shape.numel())

    @property
    def output_bias(self) -> Tensor:
        return self.output.bias.view(self.out_shape)

    def forward(self, x: Tensor) -> Tensor:
        batch = batch_shape(x, self.in_shape)
        tokens = x.reshape(-1, *self.in_shape).long()  # (*batch, T) -> (B, T)
        states, _ = self.recurrent(self.embedding(tokens))  # (B, T, H)
        return self.output(self._pooled(states, scored(tokens))).reshape(batch + self.out_shape)

    def _pooled(self, states: Tensor, used: Tensor) -> Tensor:
        """States ``(B, T, H)`` of the places in use ``(B, T)`` as one vector, ``(B, H)``."""
        length = used.sum(1, keepdim=True)  # at least 1
        if self.pool == "last":
            return states.gather(1, (length - 1).unsqueeze(-1).expand(-1, -1, states.shape[-1])).squeeze(1)
        used = used.unsqueeze(-1)
        if self.pool == "mean":
            return torch.where(used, states, 0.0).sum(1) / length
        return torch.where(used, states, -torch.inf).amax(1)


class GRUEncoder(LineEncoder):
    """Lines of tokens through gated recurrent units (Cho et al. 2014); options as of :class:`LineEncoder`."""

    cell = nn.GRU


class LSTMEncoder(LineEncoder):
    """Lines of tokens through long short-term memory (Hochreiter and Schmidhuber 1997); see :class:`LineEncoder`."""

    cell = nn.LSTM
