"""Likelihoods p(x|z): normalized densities and masses over data, in nats.

``support`` says which data a likelihood is for: ``"binary"`` (zeros and ones), ``"levels"`` (whole numbers
0 ... L-1 held as floats) or ``"real"`` (grey images are then dequantized to [0, 1]).
"""

from collections.abc import Sequence
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from models.conditional import Conditional, NetFactory
from models.distributions import CategoricalLevels, LogisticLevels, ProfiledNormal, optimal_scale
from models.nets import stacked_shape

__all__ = [
    "Bernoulli",
    "Categorical",
    "DiscretizedLogistic",
    "FixedGaussian",
    "LearnedGaussian",
    "Likelihood",
    "OptimalGaussian",
    "optimal_scale",
]


class Likelihood(Conditional):
    """What all likelihoods with one net share.

    Args:
        event_shape: shape of one datum.
        context_shape: shape of one latent.
        net: builds the decoder.
        outputs: how many numbers the decoder gives for each entry of a datum.
    """

    support: ClassVar[str]

    def __init__(
        self, event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory, outputs: int = 1
    ) -> None:
        super().__init__(event_shape, context_shape)
        self.net = net(self.context_shape, stacked_shape(self.event_shape, outputs))

    def initialize(self, x: Tensor) -> None:
        """Start from data ``(N, *event_shape)``: the decoder's output bias predicts their mean.

        A net without an ``output_bias`` is left as it is.
        """
        bias = getattr(self.net, "output_bias", None)
        if bias is not None:
            with torch.no_grad():
                bias[: self.event_shape[0]].copy_(self.to_output(x.mean(0)))

    def to_output(self, mean: Tensor) -> Tensor:
        """The decoder output that predicts ``mean``."""
        return mean


class Bernoulli(Likelihood):
    """Independent binary entries; the decoder gives their logits.

    Args:
        event_shape: shape of one datum.
        context_shape: shape of one latent.
        net: builds the decoder.
    """

    support = "binary"

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory) -> None:
        super().__init__(event_shape, context_shape, net)

    def forward(self, *context: Tensor) -> dist.Distribution:
        return dist.Bernoulli(logits=self.net(*context)).to_event(len(self.event_shape))

    def to_output(self, mean: Tensor) -> Tensor:
        """Logits of the mean, which is kept 0.001 from 0 and 1 (as in the experiments of Burda et al. 2016)."""
        return mean.logit(eps=1e-3)


def _positive_scale(scale: float) -> Tensor:
    if not scale > 0:
        raise ValueError(f"scale is a standard deviation and must be positive, got {scale}")
    return torch.tensor(float(scale))


class FixedGaussian(Likelihood):
    """Normal entries around the decoder's output with one given standard deviation.

    Args:
        event_shape: shape of one datum.
        context_shape: shape of one latent.
        net: builds the decoder.
        scale: standard deviation, in the units of the data.
    """

    support = "real"
    scale: Tensor

    def __init__(
        self, event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory, scale: float = 0.1
    ) -> None:
        super().__init__(event_shape, context_shape, net)
        # A tensor on the device: a Python number would be copied there at every step.
        self.register_buffer("scale", _positive_scale(scale))

    def forward(self, *context: Tensor) -> dist.Distribution:
        return dist.Normal(self.net(*context), self.scale).to_event(len(self.event_shape))


class LearnedGaussian(Likelihood):
    """Normal entries around the decoder's output with one standard deviation, learned by gradient.

    Args:
        event_shape: shape of one datum.
        context_shape: shape of one latent.
        net: builds the decoder.
        scale: the standard deviation to start from, in the units of the data; by default 1 or, after
            :meth:`initialize`, that of the data around their mean. Started far too large, it hides the data from the
            guide, and the posterior collapses before the scale has come down.
    """

    support = "real"

    def __init__(
        self, event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory, scale: float | None = None
    ) -> None:
        super().__init__(event_shape, context_shape, net)
        self.log_scale = nn.Parameter(_positive_scale(1.0 if scale is None else scale).log())
        self._scale_from_data = scale is None

    def initialize(self, x: Tensor) -> None:
        super().initialize(x)
        if self._scale_from_data:
            with torch.no_grad():
                self.log_scale.copy_((x - x.mean(0)).square().mean().sqrt().clamp_min(1e-3).log())

    @property
    def scale(self) -> Tensor:
        """The standard deviation, shape ``()``."""
        return self.log_scale.exp()

    def forward(self, *context: Tensor) -> dist.Distribution:
        return dist.Normal(self.net(*context), self.scale).to_event(len(self.event_shape))


class OptimalGaussian(Likelihood):
    """Normal entries with the standard deviation that maximizes the likelihood (Rybkin et al. 2021).

    In training mode a batch is scored under its own :func:`optimal_scale`, whose gradient vanishes, and a running
    average of the variance is kept. In evaluation mode the scale is the average's root, so that it is a density.

    Args:
        event_shape: shape of one datum.
        context_shape: shape of one latent.
        net: builds the decoder.
        decay: of the running average, per scored batch; the bias towards its start at zero is divided out.
    """

    support = "real"
    weighted_variance: Tensor
    weight: Tensor

    def __init__(
        self, event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory, decay: float = 0.99
    ) -> None:
        super().__init__(event_shape, context_shape, net)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("weighted_variance", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))

    @property
    def scale(self) -> Tensor:
        """The stored standard deviation, shape ``()``; 1 before the first batch."""
        return torch.where(self.weight > 0, self.weighted_variance / self.weight, 1.0).sqrt()

    def forward(self, *context: Tensor) -> dist.Distribution:
        loc, event_dims = self.net(*context), len(self.event_shape)
        if self.training:
            return ProfiledNormal(loc, self.scale, self._observe).to_event(event_dims)
        return dist.Normal(loc, self.scale).to_event(event_dims)

    def _observe(self, scale: Tensor) -> None:
        self.weighted_variance.mul_(self.decay).add_(scale.square(), alpha=1 - self.decay)
        self.weight.mul_(self.decay).add_(1 - self.decay)


def _checked_levels(levels: int) -> int:
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    return levels


class Categorical(Likelihood):
    """Independent entries with a free probability for each level.

    Args:
        event_shape: shape of one datum.
        context_shape: shape of one latent.
        net: builds the decoder.
        levels: number of levels.
    """

    support = "levels"

    def __init__(
        self, event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory, levels: int = 256
    ) -> None:
        super().__init__(event_shape, context_shape, net, outputs=_checked_levels(levels))
        self.levels = levels

    @property
    def values_per_draw(self) -> int:
        """Numbers computed to score one datum: a logit for every level of every entry."""
        return self.event_shape.numel() * self.levels

    def forward(self, *context: Tensor) -> dist.Distribution:
        event_dims = len(self.event_shape)
        # (*batch, d0 L, d1, ...) -> (*batch, d0, L, d1, ...) -> (*batch, d0, d1, ..., L)
        logits = self.net(*context).unflatten(-event_dims, (self.event_shape[0], self.levels))
        return CategoricalLevels(logits=logits.movedim(-event_dims, -1)).to_event(event_dims)

    def initialize(self, x: Tensor) -> None:
        """Leave the decoder as it is: a mean does not say how often each level occurs."""


class DiscretizedLogistic(Likelihood):
    """Independent entries with the mass that a logistic density gives each level (Kingma et al. 2016).

    The decoder gives the centre as a fraction of the highest level, and unless ``shared_scale`` the logarithm of the
    scale in the same unit (Salimans et al. 2017, section 2.1).

    Args:
        event_shape: shape of one datum.
        context_shape: shape of one latent.
        net: builds the decoder.
        levels: number of levels.
        shared_scale: learn one scale for all entries, instead of reading one for each off the latent.
    """

    support = "levels"
    minimum_log_scale = -7.0  # narrower than a level by far: beyond it lie only exploding gradients
    initial_log_scale = -2.0  # spreads over about half of the range

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int],
        net: NetFactory,
        levels: int = 256,
        shared_scale: bool = False,
    ) -> None:
        super().__init__(event_shape, context_shape, net, outputs=1 if shared_scale else 2)
        self.levels = _checked_levels(levels)
        self.log_scale = nn.Parameter(torch.tensor(self.initial_log_scale)) if shared_scale else None

    def forward(self, *context: Tensor) -> dist.Distribution:
        event_dims, top = len(self.event_shape), self.levels - 1
        centre, log_scale = self._read(self.net(*context))
        scale = log_scale.clamp(min=self.minimum_log_scale).exp()
        return LogisticLevels(top * centre, top * scale, self.levels).to_event(event_dims)

    def _read(self, output: Tensor) -> tuple[Tensor, Tensor]:
        # An untrained decoder, with outputs near zero, predicts the middle of the range.
        if self.log_scale is not None:
            return output + 0.5, self.log_scale
        centre, log_scale = output.chunk(2, dim=-len(self.event_shape))
        return centre + 0.5, log_scale + self.initial_log_scale

    def to_output(self, mean: Tensor) -> Tensor:
        """Centres relative to the middle of the range."""
        return mean / (self.levels - 1) - 0.5
