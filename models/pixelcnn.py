"""The gated PixelCNN over tokens (van den Oord, Kalchbrenner, Vinyals et al. 2016)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.gated import GatedLayer, check_sizes, shifted_down, shifted_right
from models.tokens import TokenPrior


class PixelCNN(TokenPrior):
    """Gated convolutions over what lies above and to the left of each token, :class:`models.gated.GatedLayer`.

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
        check_sizes(channels, layers, kernel)
        self.embedding = nn.Embedding(codes, channels)
        self.place = nn.Parameter(0.1 * torch.randn(channels, *self.event_shape))
        self.condition = _Condition(self, channels) if context_codes else None
        told = channels if context_codes else 0
        self.layers = nn.ModuleList(GatedLayer(channels, kernel, dropout, told) for _ in range(layers))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, codes, 1))

    def logits(self, tokens: Tensor, context: Tensor | None) -> Tensor:
        """Causal logits, ``(B, H, W, K)``, of tokens ``(B, H, W)``."""
        embedded = self.embedding(tokens).movedim(-1, 1)  # (B, H, W, C) -> (B, C, H, W)
        vertical, horizontal = shifted_down(embedded) + self.place, shifted_right(embedded) + self.place
        condition = None if self.condition is None else self.condition(context)
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, condition)
        return self.head(horizontal).movedim(1, -1)


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
