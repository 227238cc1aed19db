"""Gated convolutions that see what lies above and to the left (van den Oord, Kalchbrenner, Vinyals et al. 2016)."""

from torch import Tensor, nn
from torch.nn import functional as F


class GatedLayer(nn.Module):
    """tanh times sigmoid in a vertical and a horizontal stack, and a residual connection in the horizontal one.

    The vertical stack sees the rows above, the horizontal one the row to the left, so that nothing above is hidden
    from view (section 2.3). Both are causal once their input is shifted, down and to the right: :func:`shifted_down`,
    :func:`shifted_right`.

    Args:
        channels: of each stack.
        kernel: width of the convolutions, odd.
        dropout: fraction of channels dropped, in training.
        condition_channels: of a map that both stacks are told; 0 for none.
    """

    def __init__(self, channels: int, kernel: int, dropout: float = 0.0, condition_channels: int = 0) -> None:
        super().__init__()
        half = kernel // 2
        self.vertical_pad, self.horizontal_pad = (half, half, half, 0), (half, 0)
        self.vertical = nn.Conv2d(channels, 2 * channels, (half + 1, kernel))
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, half + 1))
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.output = nn.Conv2d(channels, channels, 1)
        self.condition = nn.Conv2d(condition_channels, 4 * channels, 1) if condition_channels else None
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, vertical: Tensor, horizontal: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both stacks ``(B, C, H, W)``; the condition is ``(B, C', H, W)`` or ``(B, C', 1, 1)``."""
        vertical, from_above = self.look_up(vertical, condition)
        return vertical, self.look_left(horizontal, from_above)

    def look_up(self, vertical: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """The vertical stack's next layer, and all that the horizontal one has to know beside its own row."""
        v = self.vertical(F.pad(vertical, self.vertical_pad))
        from_above = self.link(v)
        if self.condition is not None and condition is not None:
            for_v, for_h = self.condition(condition).chunk(2, dim=1)
            v, from_above = v + for_v, from_above + for_h
        return _gate(v), from_above

    def look_left(self, horizontal: Tensor, from_above: Tensor) -> Tensor:
        """The horizontal stack's next layer; its rows do not see each other, so that one of them can do alone."""
        h = self.horizontal(F.pad(horizontal, self.horizontal_pad)) + from_above
        return horizontal + self.output(self.dropout(_gate(h)))


def check_sizes(channels: int, layers: int, kernel: int) -> None:
    """Refuse sizes of which no causal net can be made."""
    if kernel < 3 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd and at least 3, got {kernel}")
    if layers < 1 or channels < 1:
        raise ValueError(f"layers and channels must be at least 1, got {layers} and {channels}")


def shifted_down(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` with each row in the place of the one below: a row sees those above it."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def shifted_right(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` with each column in the place of the one to its right."""
    return F.pad(x, (1, 0))[..., :-1]


def _gate(both: Tensor) -> Tensor:
    value, gate = both.chunk(2, dim=1)
    return value.tanh() * gate.sigmoid()
