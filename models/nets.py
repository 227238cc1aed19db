"""Networks from event shape to event shape, for any number of leading batch dimensions.

Every net here is a :class:`~models.conditional.NetFactory` product: ``net(in_shape, out_shape)`` maps
``(*batch, *in_shape)`` to ``(*batch, *out_shape)``. Each has an ``output_bias`` of shape ``out_shape``, which shares
memory with a parameter, so that a likelihood can start its output at the mean of the data.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Name -> (module, gain of the Glorot initialization: sqrt 2 where half of the input is cut away).
ACTIVATIONS: dict[str, tuple[type[nn.Module], float]] = {
    "elu": (nn.ELU, math.sqrt(2)),
    "gelu": (nn.GELU, math.sqrt(2)),
    "leaky_relu": (nn.LeakyReLU, math.sqrt(2)),
    "relu": (nn.ReLU, math.sqrt(2)),
    "silu": (nn.SiLU, math.sqrt(2)),
    "softplus": (nn.Softplus, 1.0),
    "tanh": (nn.Tanh, 1.0),
}


def stacked_shape(event_shape: Sequence[int], count: int) -> torch.Size:
    """The shape of ``count`` outputs for each entry of an event, stacked along its first dimension.

    Images stay images, ``(C, H, W) -> (count C, H, W)``, so that a convolutional net can write them;
    ``tensor.chunk(count, dim=-len(event_shape))`` takes them apart.
    """
    if len(event_shape) == 0:
        raise ValueError("a net writes events of at least one dimension, got event_shape ()")
    return torch.Size((count * event_shape[0], *event_shape[1:]))


def batch_shape(x: Tensor, in_shape: torch.Size) -> torch.Size:
    """The leading dimensions of ``x``, once its trailing ones are known to be ``in_shape``."""
    split = x.dim() - len(in_shape)
    if split < 0 or x.shape[split:] != in_shape:
        raise ValueError(f"expected an input of shape (..., {', '.join(map(str, in_shape))}), got {tuple(x.shape)}")
    return x.shape[:split]


def scaled(x: Tensor, scale: float) -> Tensor:
    """``x / scale``, at no cost where the scale is 1."""
    return x if scale == 1 else x / scale


def _activation(name: str) -> tuple[nn.Module, float]:
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; accepted: {', '.join(ACTIVATIONS)}")
    module, gain = ACTIVATIONS[name]
    return module(), gain


def _positive(option: str, values: Sequence[int]) -> tuple[int, ...]:
    if any(value < 1 for value in values):
        raise ValueError(f"{option} must be positive whole numbers, got {tuple(values)}")
    return tuple(values)


def _image(shape: Sequence[int], owner: str) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise ValueError(f"{owner} needs an image shape (channels, height, width), got {tuple(shape)}")
    return shape[0], shape[1], shape[2]


def _glorot(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    """Glorot and Bengio 2010, equation 16, with zero biases."""
    nn.init.xavier_uniform_(layer.weight, gain)  # type: ignore[arg-type]
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def _he(layer: nn.Module, gain: float, fan_in: float) -> nn.Module:
    """He et al. 2015, equation 10, with zero biases: keeps the signal's size whatever the layer's width."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(fan_in))  # type: ignore[arg-type]
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def _convolution(before: int, after: int, kernel: tuple[int, int], gain: float) -> nn.Module:
    return _he(nn.Conv2d(before, after, kernel, 2, 1), gain, before * math.prod(kernel))


def _transposed_convolution(before: int, after: int, kernel: tuple[int, int], gain: float) -> nn.Module:
    # With stride 2, each output pixel meets a quarter of the kernel.
    layer = nn.ConvTranspose2d(before, after, kernel, 2, 1, bias=False)
    return _he(layer, gain, before * math.prod(kernel) / 4)


class _Dense(nn.Module):
    """Reads the event as one vector: hidden layers, then an affine output layer."""

    input_scale: float = 1.0  # what inputs are divided by

    def __init__(self, in_shape: Sequence[int], out_shape: Sequence[int], hidden: Sequence[nn.Module], width: int):
        super().__init__()
        self.in_shape, self.out_shape = torch.Size(in_shape), torch.Size(out_shape)
        self.hidden = nn.Sequential(*hidden)
        self.output = nn.Linear(width, self.out_shape.numel())
        _glorot(self.output)

    @property
    def output_bias(self) -> Tensor:
        return self.output.bias.view(self.out_shape)

    def center_input(self, mean: Tensor) -> None:
        """Start the first layer's bias where an input of ``mean``, of shape ``in_shape``, gives zero.

        Inputs all of one sign would otherwise start saturated units and a badly conditioned descent (LeCun et al. 1998,
        section 4.3).
        """
        first = next(layer for layer in self.modules() if isinstance(layer, nn.Linear))
        with torch.no_grad():
            first.bias.copy_(-first.weight @ (mean / self.input_scale).reshape(-1))  # (*in_shape) -> (size,)

    def forward(self, x: Tensor) -> Tensor:
        batch = batch_shape(x, self.in_shape)
        # (*batch, *in_shape) -> (*batch, size)
        x = scaled(x, self.input_scale).reshape((*batch, self.in_shape.numel()))
        return self.output(self.hidden(x)).reshape(batch + self.out_shape)


class Linear(_Dense):
    """One affine map, no hidden layer."""

    def __init__(self, in_shape: Sequence[int], out_shape: Sequence[int]) -> None:
        super().__init__(in_shape, out_shape, [], math.prod(in_shape))


class MLP(_Dense):
    """Fully connected layers.

    Args:
        in_shape: shape of one input.
        out_shape: shape of one output.
        hidden: width of each hidden layer; none makes the net affine.
        activation: one of :data:`ACTIVATIONS`.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        hidden: tuple[int, ...] = (200, 200),
        activation: str = "tanh",
    ) -> None:
        widths = (math.prod(in_shape), *_positive("hidden", hidden))
        nonlinearity, gain = _activation(activation)
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [_glorot(nn.Linear(fan_in, fan_out), gain), nonlinearity]
        super().__init__(in_shape, out_shape, layers, widths[-1])


class _Gated(nn.Module):
    """``(A x + a) * sigmoid(B x + b)`` as one product (Dauphin et al. 2017, equation 1)."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.both = nn.Linear(fan_in, 2 * fan_out)
        nn.init.kaiming_normal_(self.both.weight, nonlinearity="relu")
        nn.init.zeros_(self.both.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.both(x), dim=-1)


class GatedMLP(_Dense):
    """Fully connected layers with gated linear units, as in the VampPrior's experiments (Tomczak and Welling 2018).

    Args:
        in_shape: shape of one input.
        out_shape: shape of one output.
        hidden: width of each hidden layer, after its gate.
    """

    def __init__(self, in_shape: Sequence[int], out_shape: Sequence[int], hidden: tuple[int, ...] = (300, 300)) -> None:
        widths = (math.prod(in_shape), *_positive("hidden", hidden))
        layers = [_Gated(fan_in, fan_out) for fan_in, fan_out in itertools.pairwise(widths)]
        super().__init__(in_shape, out_shape, layers, widths[-1])


class SkipMLP(_Dense):
    """Fully connected layers, each of which reads the net's input beside the layer before it (Dieng et al. 2019).

    As a decoder it gives the latent a short way to everything that is computed of it, which keeps more of the mutual
    information between them.

    Args:
        in_shape: shape of one input.
        out_shape: shape of one output.
        hidden: width of each hidden layer.
        activation: one of :data:`ACTIVATIONS`.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        hidden: tuple[int, ...] = (200, 200),
        activation: str = "tanh",
    ) -> None:
        size, widths = math.prod(in_shape), _positive("hidden", hidden)
        if not widths:
            raise ValueError("hidden must name at least one layer for the input to skip, got ()")
        nonlinearity, gain = _activation(activation)
        reads = [size, *(size + width for width in widths)]
        layers = [_glorot(nn.Linear(fan_in, fan_out), gain) for fan_in, fan_out in zip(reads, widths, strict=False)]
        super().__init__(in_shape, out_shape, layers, reads[-1])
        self.activation = nonlinearity

    def forward(self, x: Tensor) -> Tensor:
        batch = batch_shape(x, self.in_shape)
        given = scaled(x, self.input_scale).reshape((*batch, self.in_shape.numel()))  # (*batch, size)
        read = given
        for layer in self.hidden:
            read = torch.cat([self.activation(layer(read)), given], dim=-1)
        return self.output(read).reshape(batch + self.out_shape)


def _kernel(size: int) -> int:
    # With stride 2 and padding 1, a kernel of 4 maps size n to n/2 and back, one of 3 maps n to (n+1)/2 and back.
    return 4 if size % 2 == 0 else 3


def _halvings(height: int, width: int, count: int) -> list[tuple[int, int]]:
    """Image sizes before and after each stride-2 layer: ``count + 1`` pairs, rounded up."""
    sizes = [(height, width)]
    for _ in range(count):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes


class ConvEncoder(nn.Module):
    """Strided convolutions from an image to any shape, each halving height and width.

    Args:
        in_shape: ``(channels, height, width)``, any size.
        out_shape: shape of one output.
        channels: channels of each convolution.
        activation: one of :data:`ACTIVATIONS`.
    """

    input_scale: float = 1.0  # what inputs are divided by

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        channels: tuple[int, ...] = (32, 64),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        depth, height, width = _image(in_shape, "ConvEncoder's input")
        self.in_shape, self.out_shape = torch.Size(in_shape), torch.Size(out_shape)
        depths = (depth, *_positive("channels", channels))
        sizes = _halvings(height, width, len(channels))
        nonlinearity, gain = _activation(activation)
        layers: list[nn.Module] = []
        for (h, w), (before, after) in zip(sizes[:-1], itertools.pairwise(depths), strict=True):
            layers += [_convolution(before, after, (_kernel(h), _kernel(w)), gain), nonlinearity]
        self.hidden = nn.Sequential(*layers, nn.Flatten())
        self.output = nn.Linear(depths[-1] * math.prod(sizes[-1]), self.out_shape.numel())
        _glorot(self.output)

    @property
    def output_bias(self) -> Tensor:
        return self.output.bias.view(self.out_shape)

    def forward(self, x: Tensor) -> Tensor:
        batch = batch_shape(x, self.in_shape)
        # (*batch, C, H, W) -> (B, C, H, W)
        images = scaled(x, self.input_scale).reshape((batch.numel(), *self.in_shape))
        return self.output(self.hidden(images)).reshape(batch + self.out_shape)


class ConvDecoder(nn.Module):
    """Transposed convolutions from any shape to an image, each doubling height and width.

    The output has a bias for every pixel rather than for every channel, so that it can start at the mean image.

    Args:
        in_shape: shape of one input.
        out_shape: ``(channels, height, width)``, any size.
        channels: channels that each transposed convolution reads.
        activation: one of :data:`ACTIVATIONS`.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        channels: tuple[int, ...] = (64, 32),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        depth, height, width = _image(out_shape, "ConvDecoder's output")
        if not channels:
            raise ValueError("channels must name at least one layer of ConvDecoder, got ()")
        self.in_shape, self.out_shape = torch.Size(in_shape), torch.Size(out_shape)
        depths = (*_positive("channels", channels), depth)
        sizes = _halvings(height, width, len(channels))[::-1]
        nonlinearity, gain = _activation(activation)
        size = self.in_shape.numel()
        first = _he(nn.Linear(size, depths[0] * math.prod(sizes[0])), 1.0, size)
        layers: list[nn.Module] = [first, nn.Unflatten(-1, (depths[0], *sizes[0]))]
        for (h, w), (before, after) in zip(sizes[1:], itertools.pairwise(depths), strict=True):
            layers += [nonlinearity, _transposed_convolution(before, after, (_kernel(h), _kernel(w)), gain)]
        self.layers = nn.Sequential(*layers)
        self.output_bias = nn.Parameter(torch.zeros(self.out_shape))

    def forward(self, x: Tensor) -> Tensor:
        batch = batch_shape(x, self.in_shape)
        flat = x.reshape((batch.numel(), self.in_shape.numel()))  # (*batch, *in_shape) -> (B, size)
        return (self.layers(flat) + self.output_bias).reshape(batch + self.out_shape)
