"""Likelihoods of lines of text: decoders that read what they have written, and could do without the latent.

A line is T tokens, whole numbers 0 ... V-1 held as floats; token 0 ends it, and nothing but zeros follows. A line of T
tokens without a zero is one that was cut. The mass of all lines is one.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from models.autoregressive import AutoregressiveLevels, choose
from models.conditional import Conditional
from models.transformer import Block

END = 0


def scored(tokens: Tensor) -> Tensor:
    """Which tokens of lines ``(*batch, T)`` carry information: all up to the first that ends its line."""
    ends = (tokens == END).int()
    return (ends.cumsum(-1) - ends) == 0


class LineDecoder(nn.Module):
    """Scores and draws lines ``(B, T)`` given latents ``(B, D)``, token by token; leaves say how one follows another.

    Args:
        length: T.
        levels: V, the size of the vocabulary.
        width: of an embedded token.
        word_dropout: probability that a token is hidden from those after it, in training (Bowman et al. 2016, section
            3.1). Which are is drawn anew at each scoring, so that the score is then one of a weakened decoder.
    """

    head: nn.Linear

    def __init__(self, length: int, levels: int, width: int, word_dropout: float) -> None:
        super().__init__()
        if not 0 <= word_dropout <= 1:
            raise ValueError(f"word_dropout is a probability, from 0 to 1, got {word_dropout}")
        if levels < 2 or width < 1:
            raise ValueError(f"a vocabulary has at least 2 tokens and an embedding 1 dimension, got {levels}, {width}")
        self.length, self.levels, self.word_dropout = length, levels, word_dropout
        self.begin, self.hidden = levels, levels + 1  # tokens that are only ever read
        self.embedding = nn.Embedding(levels + 2, width)

    @abstractmethod
    def read(self, before: Tensor, z: Tensor) -> Tensor:
        """Logits ``(B, T, V)`` of each token, from those before it ``(B, T)`` (the first: ``begin``) and the latent."""

    @abstractmethod
    def follow(self, before: Tensor, z: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits ``(B, V)`` after the token ``(B,)``, and the next state; the first state is None."""

    def log_mass(self, values: Tensor, condition: Tensor) -> Tensor:
        tokens = values.long()
        before = torch.cat([torch.full_like(tokens[:, :1], self.begin), self._worn(tokens[:, :-1])], dim=1)
        log_p = self.read(before, condition).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)  # (B, T)
        after_the_end = torch.where(tokens == END, 0.0, -torch.inf).to(log_p)
        return torch.where(scored(tokens), log_p, after_the_end).sum(-1)

    def draw(self, condition: Tensor, greedy: bool = False) -> Tensor:
        before = torch.full((condition.shape[0],), self.begin, device=condition.device)
        tokens, state, over = [], None, torch.zeros_like(before, dtype=torch.bool)
        for _ in range(self.length):
            logits, state = self.follow(before, condition, state)
            before = torch.where(over, END, choose(logits, greedy))
            over = over | (before == END)
            tokens.append(before)
        return torch.stack(tokens, dim=1).to(condition.dtype)

    def _worn(self, tokens: Tensor) -> Tensor:
        if not (self.training and self.word_dropout):
            return tokens
        return torch.where(torch.rand(tokens.shape, device=tokens.device) < self.word_dropout, self.hidden, tokens)


class LSTMLines(LineDecoder):
    """Long short-term memory, started by the latent and told of it at each token (as in He et al. 2019).

    With ``skip`` the latent also goes into every layer and into the logits (Dieng et al. 2019).
    """

    def __init__(
        self,
        length: int,
        levels: int,
        latent: int,
        width: int,
        hidden: int,
        layers: int,
        word_dropout: float,
        dropout: float,
        skip: bool,
    ) -> None:
        super().__init__(length, levels, width, word_dropout)
        if layers < 1 or hidden < 1:
            raise ValueError(f"layers and hidden must be at least 1, got {layers} and {hidden}")
        self.skip = skip
        told = [latent, *[latent * skip] * (layers - 1)]
        sizes = [width, *[hidden] * (layers - 1)]
        self.layers = nn.ModuleList(nn.LSTM(n + d, hidden, batch_first=True) for n, d in zip(sizes, told, strict=True))
        self.start = nn.Linear(latent, layers * hidden)
        self.head = nn.Linear(hidden + latent * skip, levels)
        self.dropout = nn.Dropout(dropout)

    def read(self, before: Tensor, z: Tensor) -> Tensor:
        return self._run(before, z, None)[0]

    def follow(self, before: Tensor, z: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = self._run(before.unsqueeze(1), z, state)
        return logits.squeeze(1), state

    def _run(self, before: Tensor, z: Tensor, states: Any) -> tuple[Tensor, Any]:
        """Logits after tokens ``(B, t)``, ``(B, t, V)``, and the layers' states after the last."""
        if states is None:  # a cell for each layer, read off the latent
            cells = self.start(z).chunk(len(self.layers), dim=-1)
            states = [(cell.tanh().unsqueeze(0), cell.unsqueeze(0)) for cell in cells]  # (1, B, H) each
        told = z.unsqueeze(1).expand(-1, before.shape[1], -1)  # (B, D) -> (B, t, D)
        x, after = self.dropout(self.embedding(before)), []
        for place, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            x, state = layer(torch.cat([x, told], -1) if self.skip or place == 0 else x, state)
            after.append(state)
        x = self.dropout(x)
        return self.head(torch.cat([x, told], -1) if self.skip else x), after


class TransformerLines(LineDecoder):
    """Attention to all tokens before; the latent is added to every token, and with ``skip`` before every block."""

    def __init__(
        self,
        length: int,
        levels: int,
        latent: int,
        width: int,
        layers: int,
        heads: int,
        word_dropout: float,
        dropout: float,
        skip: bool,
    ) -> None:
        super().__init__(length, levels, width, word_dropout)
        if layers < 1 or heads < 1 or width % heads:
            raise ValueError(f"width must be a multiple of heads, and there must be layers: {width}, {heads}, {layers}")
        self.place = nn.Parameter(0.1 * torch.randn(length, width))
        self.told = nn.ModuleList(nn.Linear(latent, width) for _ in range(layers if skip else 1))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, levels)

    def read(self, before: Tensor, z: Tensor) -> Tensor:
        x = self.embedding(before) + self.place[: before.shape[1]]  # (B, t, C)
        for place, block in enumerate(self.blocks):
            if place < len(self.told):
                x = x + self.told[place](z).unsqueeze(1)
            x = block(x)
        return self.head(self.norm(x))

    def follow(self, before: Tensor, z: Tensor, state: Any) -> tuple[Tensor, Any]:
        prefix = before.unsqueeze(1) if state is None else torch.cat([state, before.unsqueeze(1)], 1)  # (B, t)
        return self.read(prefix, z)[:, -1], prefix


class LineLikelihood(Conditional):
    """What likelihoods of lines share.

    Args:
        event_shape: ``(T,)``.
        context_shape: shape of one latent.
        levels: V, the size of the vocabulary.
    """

    support: ClassVar[str] = "tokens"
    lines: LineDecoder

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int], levels: int) -> None:
        super().__init__(event_shape, context_shape)
        if len(self.event_shape) != 1:
            raise ValueError(
                f"it scores lines of tokens, as of data=shakespeare and data=lines: accepted: event_shape (T,), got "
                f"{tuple(event_shape)}"
            )
        self.levels = levels

    @property
    def values_per_draw(self) -> int:
        """Numbers computed to score one line: a logit for every token of the vocabulary at every place."""
        return self.event_shape.numel() * self.levels

    def forward(self, *context: Tensor) -> dist.Distribution:
        (z,) = context
        flat = z.flatten(z.dim() - len(self.context_shape)) if len(self.context_shape) != 1 else z  # (*batch, D)
        return AutoregressiveLevels(self.lines, flat, self.event_shape, self.levels)

    def token_counts(self, x: Tensor) -> Tensor:
        """How many tokens of each line ``(*batch, T)`` are scored, the end of the line among them: ``(*batch,)``."""
        return scored(x).sum(-1)

    def initialize(self, x: Tensor) -> None:
        """Start from data ``(N, T)``: the output bias predicts how often each token occurs."""
        tokens = x.long()[scored(x)]
        counts = torch.bincount(tokens, minlength=self.levels).to(x.dtype)
        with torch.no_grad():
            self.lines.head.bias.copy_(((counts + 1) / (len(tokens) + self.levels)).log())


class LSTMLikelihood(LineLikelihood):
    """Lines of text from an LSTM that is told of the latent (Bowman et al. 2016).

    Args:
        event_shape: ``(T,)``.
        context_shape: shape of one latent.
        levels: V, the size of the vocabulary.
        width: of an embedded token.
        hidden: of each layer's state.
        layers: number of layers.
        word_dropout: probability that a token is hidden from those after it, in training.
        dropout: fraction of embedded tokens' and of the last layer's entries dropped, in training.
        skip: tell the latent to every layer and to the logits (Dieng et al. 2019), not to the first layer alone.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int],
        levels: int = 2,
        width: int = 64,
        hidden: int = 128,
        layers: int = 1,
        word_dropout: float = 0.0,
        dropout: float = 0.0,
        skip: bool = False,
    ) -> None:
        super().__init__(event_shape, context_shape, levels)
        length, latent = self.event_shape[0], self.context_shape.numel()
        self.lines = LSTMLines(length, levels, latent, width, hidden, layers, word_dropout, dropout, skip)


class TransformerLikelihood(LineLikelihood):
    """Lines of text from a causal transformer that is told of the latent.

    Args:
        event_shape: ``(T,)``.
        context_shape: shape of one latent.
        levels: V, the size of the vocabulary.
        width: of the residual stream; a multiple of the number of heads.
        layers: number of blocks.
        heads: of the attention.
        word_dropout: probability that a token is hidden from those after it, in training.
        dropout: fraction of what each block adds that is dropped, in training.
        skip: tell the latent to every block (Dieng et al. 2019), not with the tokens alone.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int],
        levels: int = 2,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        word_dropout: float = 0.0,
        dropout: float = 0.0,
        skip: bool = False,
    ) -> None:
        super().__init__(event_shape, context_shape, levels)
        length, latent = self.event_shape[0], self.context_shape.numel()
        self.lines = TransformerLines(length, levels, latent, width, layers, heads, word_dropout, dropout, skip)
