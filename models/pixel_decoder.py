"""A likelihood over images that could do without the latent: a PixelCNN told of it (van den Oord et al. 2016)."""

from collections.abc import Sequence
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from models.autoregressive import AutoregressiveLevels, choose
from models.conditional import Conditional, NetFactory
from models.gated import GatedLayer, check_sizes, shifted_down, shifted_right


class PixelCNNLikelihood(Conditional):
    """Pixels in raster order, each given those above and to the left, and what the decoder makes of the latent.

    Every gated layer is told: either a map, pixel by pixel (the PixelVAE of Gulrajani et al. 2017 tells it at the last
    layers alone), or the same few numbers at every place (van den Oord et al. 2016, equation 4). ``layers`` and
    ``kernel`` say how far a pixel sees: ``layers (kernel - 1) / 2`` rows up and as many columns to each side, and to
    the left ``layers (kernel - 1) / 2 + 1``. The further, the less the latent is needed, down to where the posterior
    collapses (Chen et al. 2017).

    Args:
        event_shape: ``(1, H, W)``.
        context_shape: shape of one latent.
        net: builds the decoder, from a latent to the map ``(features, H, W)``, or to ``(features, 1, 1)``.
        levels: L, number of values of a pixel, held as floats 0 ... L-1; 2 for bits.
        channels: of each stack of the PixelCNN.
        layers: its gated layers.
        kernel: width of its convolutions, odd.
        features: channels of the map.
        everywhere: tell all places the same, instead of painting a map.
        dropout: fraction of channels dropped within each layer, in training.
    """

    support: ClassVar[str] = "levels"

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int],
        net: NetFactory,
        levels: int = 2,
        channels: int = 16,
        layers: int = 3,
        kernel: int = 5,
        features: int = 8,
        everywhere: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(event_shape, context_shape)
        if len(self.event_shape) != 3 or self.event_shape[0] != 1:
            raise ValueError(f"accepted: images of one channel, (1, H, W), got {tuple(event_shape)}")
        if levels < 2 or features < 1:
            raise ValueError(f"levels must be at least 2 and features at least 1, got {levels} and {features}")
        grid = torch.Size(self.event_shape[1:])
        self.levels = levels
        self.pixels = _Pixels(grid, levels, channels, layers, kernel, features, dropout)
        self.net = net(self.context_shape, (features, *((1, 1) if everywhere else grid)))

    @property
    def values_per_draw(self) -> int:
        """Numbers computed to score one image: those that the widest convolution writes."""
        return self.event_shape.numel() * self.pixels.widest

    def forward(self, *context: Tensor) -> dist.Distribution:
        return AutoregressiveLevels(self.pixels, self.net(*context), self.event_shape, self.levels, condition_dims=3)

    def initialize(self, x: Tensor) -> None:
        """Start from data ``(N, 1, H, W)``: the output bias predicts how often each pixel has each level."""
        counts = torch.stack([(x == level).sum(0) for level in range(self.levels)]).squeeze(1)  # (L, 1, H, W)
        with torch.no_grad():
            self.pixels.bias.copy_(((counts + 1) / (len(x) + self.levels)).log())


class _Pixels(nn.Module):
    """Scores and draws images ``(B, 1, H, W)`` given maps ``(B, features, H, W)`` or ``(B, features, 1, 1)``."""

    def __init__(
        self, grid: torch.Size, levels: int, channels: int, layers: int, kernel: int, features: int, dropout: float
    ) -> None:
        super().__init__()
        check_sizes(channels, layers, kernel)
        self.grid, self.levels, self.widest = grid, levels, max(4 * channels, levels)
        self.rows_seen = layers * (kernel // 2) + 1  # above each pixel, with the one that a crop cannot tell of
        self.embed = nn.Conv2d(1, channels, 1)
        self.place = nn.Parameter(0.1 * torch.randn(channels, *grid))
        self.layers = nn.ModuleList(GatedLayer(channels, kernel, dropout, features) for _ in range(layers))
        head = nn.Conv2d(channels, levels, 1, bias=False)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 1), nn.ReLU(), head)
        self.bias = nn.Parameter(torch.zeros(levels, *grid))

    def logits(self, values: Tensor, condition: Tensor) -> Tensor:
        """Causal logits, ``(B, L, H, W)``, of images ``(B, 1, H, W)``."""
        embedded = self._embedded(values)
        vertical, horizontal = shifted_down(embedded) + self.place, shifted_right(embedded) + self.place
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, condition)
        return self.head(horizontal) + self.bias

    def log_mass(self, values: Tensor, condition: Tensor) -> Tensor:
        log_p = self.logits(values, condition).log_softmax(1)
        return log_p.gather(1, values.long()).flatten(1).sum(1)  # (B, L, H, W) -> (B, 1, H, W) -> (B,)

    def draw(self, condition: Tensor, greedy: bool = False) -> Tensor:
        """Row by row: what a row has to know of those above is computed once, and anew for each pixel only its row."""
        values = condition.new_zeros(condition.shape[0], 1, *self.grid)
        for row in range(self.grid[0]):
            above = self._seen_from(row, values, condition)
            for column in range(self.grid[1]):
                logits = self._row_logits(row, values[:, :, row : row + 1], above)
                values[:, 0, row, column] = choose(logits[:, :, 0, column], greedy).to(values.dtype)
        return values

    def _seen_from(self, row: int, values: Tensor, condition: Tensor) -> list[Tensor]:
        """For each layer what the horizontal stack in this row has to know beside the row, ``(B, 2 C, 1, W)``."""
        rows = slice(max(0, row - self.rows_seen), row + 1)
        vertical = shifted_down(self._embedded(values[:, :, rows])) + self.place[:, rows]
        told = condition[:, :, rows] if condition.shape[2] == self.grid[0] else condition
        above = []
        for layer in self.layers:
            vertical, from_above = layer.look_up(vertical, told)  # type: ignore[operator]
            above.append(from_above[:, :, -1:])
        return above

    def _row_logits(self, row: int, values: Tensor, above: list[Tensor]) -> Tensor:
        """Logits ``(B, L, 1, W)`` of one row of pixels ``(B, 1, 1, W)``."""
        horizontal = shifted_right(self._embedded(values)) + self.place[:, row : row + 1]
        for layer, from_above in zip(self.layers, above, strict=True):
            horizontal = layer.look_left(horizontal, from_above)  # type: ignore[operator]
        return self.head(horizontal) + self.bias[:, row : row + 1]

    def _embedded(self, values: Tensor) -> Tensor:
        return self.embed(values / (self.levels - 1))
