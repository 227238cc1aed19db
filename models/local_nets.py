"""Networks that keep an image an image: what they write at one place is made of what lies around that place."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.nets import batch_shape, scaled


class LocalEncoder(nn.Module):
    """From an image to a smaller one of any depth: strided convolutions, residual blocks, a 1x1 convolution.

    Fully convolutional, so that each place of the output is a local description of the input: the encoder of
    van den Oord et al. (2017, section 4.1), with as many halvings of height and width as lead from one size to the
    other. Its bias is one for each channel, so that no output can be started at a given mean.

    Args:
        in_shape: ``(channels, height, width)``.
        out_shape: ``(depth, h, w)``, the input's height and width halved any number of times, rounded up.
        channels: of all hidden layers.
        blocks: number of residual blocks.
    """

    input_scale: float = 1.0  # what inputs are divided by

    def __init__(self, in_shape: Sequence[int], out_shape: Sequence[int], channels: int = 32, blocks: int = 2) -> None:
        super().__init__()
        _check(channels, blocks)
        self.in_shape, self.out_shape = torch.Size(in_shape), torch.Size(out_shape)
        sizes = halvings(in_shape, out_shape, "LocalEncoder")
        layers: list[nn.Module] = []
        depth = in_shape[0]
        for before, _ in itertools.pairwise(sizes):
            layers += [nn.Conv2d(depth, channels, (_kernel(before[0]), _kernel(before[1])), 2, 1), nn.ReLU()]
            depth = channels
        layers.append(nn.Conv2d(depth, channels, 3, padding=1))
        layers += [_Residual(channels) for _ in range(blocks)]
        self.hidden = nn.Sequential(*layers, nn.ReLU())
        self.output = nn.Conv2d(channels, out_shape[0], 1)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        batch = batch_shape(x, self.in_shape)
        # (*batch, C, H, W) -> (B, C, H, W)
        images = scaled(x, self.input_scale).reshape((batch.numel(), *self.in_shape))
        return self.output(self.hidden(images)).reshape(batch + self.out_shape)


class LocalDecoder(nn.Module):
    """From a small image to a larger one: a convolution, residual blocks, transposed convolutions.

    Fully convolutional but for the output's bias, one for every pixel, so that it can start at the mean image: the
    decoder of van den Oord et al. (2017, section 4.1).

    Args:
        in_shape: ``(depth, h, w)``.
        out_shape: ``(channels, height, width)``; halved any number of times, rounded up, it gives h and w.
        channels: of all hidden layers.
        blocks: number of residual blocks.
    """

    def __init__(self, in_shape: Sequence[int], out_shape: Sequence[int], channels: int = 32, blocks: int = 2) -> None:
        super().__init__()
        _check(channels, blocks)
        self.in_shape, self.out_shape = torch.Size(in_shape), torch.Size(out_shape)
        sizes = halvings(out_shape, in_shape, "LocalDecoder")
        layers: list[nn.Module] = [nn.Conv2d(in_shape[0], channels, 3, padding=1)]
        layers += [_Residual(channels) for _ in range(blocks)]
        for large, _ in reversed(list(itertools.pairwise(sizes))):
            kernel = (_kernel(large[0]), _kernel(large[1]))
            layers += [nn.ReLU(), nn.ConvTranspose2d(channels, channels, kernel, 2, 1)]
        self.hidden = nn.Sequential(*layers, nn.ReLU())
        self.output = nn.Conv2d(channels, out_shape[0], 3, padding=1, bias=False)
        _initialize(self)
        nn.init.xavier_uniform_(self.output.weight)
        self.output_bias = nn.Parameter(torch.zeros(self.out_shape))

    def forward(self, x: Tensor) -> Tensor:
        batch = batch_shape(x, self.in_shape)
        images = x.reshape((batch.numel(), *self.in_shape))  # (*batch, D, h, w) -> (B, D, h, w)
        return (self.output(self.hidden(images)) + self.output_bias).reshape(batch + self.out_shape)


class _Residual(nn.Module):
    """ReLU, 3x3, ReLU, 1x1, added to the input; half as wide inside (van den Oord et al. 2017, section 4.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = max(channels // 2, 1)
        self.look = nn.Conv2d(channels, inside, 3, padding=1)
        self.mix = nn.Conv2d(inside, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.relu(self.look(F.relu(x))))


def halvings(large: Sequence[int], small: Sequence[int], owner: str) -> list[tuple[int, int]]:
    """The sizes between two images ``(C, H, W)``, both included: each half of the one before, rounded up.

    Raises:
        ValueError: no number of halvings leads from one to the other.
    """
    if len(large) != 3 or len(small) != 3:
        raise ValueError(
            f"{owner} goes between images (channels, height, width), as of model=vq and dvae, got {tuple(large)} and "
            f"{tuple(small)}; accepted for others: mlp, gated, conv or linear"
        )
    sizes = [(large[1], large[2])]
    while sizes[-1] != (1, 1):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    if (small[1], small[2]) not in sizes:
        accepted = ", ".join(f"{h}x{w}" for h, w in sizes)
        raise ValueError(
            f"{owner} halves an image of {large[1]}x{large[2]}: accepted: grids of {accepted}; "
            f"got {small[1]}x{small[2]}"
        )
    return sizes[: sizes.index((small[1], small[2])) + 1]


def _kernel(size: int) -> int:
    # With stride 2 and padding 1, a kernel of 4 maps size n to n/2 and back, one of 3 maps n to (n+1)/2 and back.
    return 4 if size % 2 == 0 else 3


def _check(channels: int, blocks: int) -> None:
    if channels < 1 or blocks < 0:
        raise ValueError(f"channels must be at least 1 and blocks at least 0, got {channels} and {blocks}")


def _initialize(net: nn.Module) -> None:
    """He et al. (2015, equation 10); the last layer of a residual block starts at half of that."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            # With stride 2, each output pixel of a transposed convolution meets a quarter of the kernel.
            shared = 4 if isinstance(layer, nn.ConvTranspose2d) else 1
            fan_in = layer.in_channels * math.prod(layer.kernel_size) / shared
            nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_in))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if isinstance(layer, _Residual):
            with torch.no_grad():
                layer.mix.weight.mul_(0.5)
