"""The gated PixelCNN over tokens (van den Oord, Kalchbrenner, Vinyals et al. 2016)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.tokens import TokenPrior


class PixelCNN(TokenPrior):
    """Convolutions over what lies above and to the left of each token.

    A vertical stack sees the rows above, a horizontal one the row to the left, so that nothing above is hidden from
    view (van den Oord et al. 2016, section 2.3). Shifting the input once, down and to the right, makes it causal.

    Args:
        event_shape: the grid, ``(H, W)``.
        codes: K.
        context_shape: shape of one context.
        context_codes: number of values of the context; 0 for none.
        channels: of each stack.
        layers: number of gated layers.
        kernel: width of the convolutions, odd.
        dropout: fraction of channels dropped within each layer, in training.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        codes: int,
        context_shape: Sequence[int] = (),
        context_codes: int = 0,
        channels: int = 32,
        layers: int = 4,
        kernel: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(event_shape, codes, context_shape, context_codes)
        if kernel < 3 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 3, got {kernel}")
        if layers < 1 or channels < 1:
            raise ValueError(f"layers and channels must be at least 1, got {layers} and {channels}")
        self.embedding = nn.Embedding(codes, channels)
        self.place = nn.Parameter(0.1 * torch.randn(channels, *self.event_shape))
        self.condition = _Condition(self, channels) if context_codes else None
        self.layers = nn.ModuleList(_GatedLayer(channels, kernel, dropout, bool(context_codes)) for _ in range(layers))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, codes, 1))

    def logits(self, tokens: Tensor, context: Tensor | None) -> Tensor:
        """Causal logits, ``(B, H, W, K)``, of tokens ``(B, H, W)``."""
        embedded = self.embedding(tokens).movedim(-1, 1)  # (B, H, W, C) -> (B, C, H, W)
        vertical = F.pad(embedded, (0, 0, 1, 0))[:, :, :-1] + self.place  # a row sees those above it
        horizontal = F.pad(embedded, (1, 0))[..., :-1] + self.place  # a column sees those to its left
        condition = None if self.condition is None else self.condition(context)
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, condition)
        return self.head(horizontal).movedim(1, -1)


class _GatedLayer(nn.Module):
    """tanh times sigmoid in both stacks, and a residual connection in the horizontal one."""

    def __init__(self, channels: int, kernel: int, dropout: float, conditional: bool) -> None:
        super().__init__()
        half = kernel // 2
        self.vertical_pad, self.horizontal_pad = (half, half, half, 0), (half, 0)
        self.vertical = nn.Conv2d(channels, 2 * channels, (half + 1, kernel))
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, half + 1))
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.output = nn.Conv2d(channels, channels, 1)
        self.condition = nn.Conv2d(channels, 4 * channels, 1) if conditional else None
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, vertical: Tensor, horizontal: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both stacks ``(B, C, H, W)``; the condition is ``(B, C, H, W)`` or ``(B, C, 1, 1)``."""
        v = self.vertical(F.pad(vertical, self.vertical_pad))
        h = self.horizontal(F.pad(horizontal, self.horizontal_pad)) + self.link(v)
        if self.condition is not None and condition is not None:
            for_v, for_h = self.condition(condition).chunk(2, dim=1)
            v, h = v + for_v, h + for_h
        return _gate(v), horizontal + self.output(self.dropout(_gate(h)))


def _gate(both: Tensor) -> Tensor:
    value, gate = both.chunk(2, dim=1)
    return value.tanh() * gate.sigmoid()


class _Condition(nn.Module):
    """A class as one vector for all places, a grid of tokens as a vector for each place around which it lies."""

    def __init__(self, prior: TokenPrior, channels: int) -> None:
        super().__init__()
        self.grid = prior.event_shape
        self.embedding = nn.Embedding(prior.context_codes, channels)
        self.around = nn.Conv2d(channels, channels, 3, padding=1) if prior.context_shape else None

    def forward(self, context: Tensor) -> Tensor:
        """``(B,)`` to ``(B, C, 1, 1)``; ``(B, h, w)`` to ``(B, C, H, W)``."""
        embedded = self.embedding(context)
        if self.around is None:
            return embedded[..., None, None]
        return F.interpolate(self.around(embedded.movedim(-1, 1)), size=self.grid, mode="nearest")
