"""The guide of a VQ-VAE with several levels."""

from collections.abc import Sequence

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from guides.quantized import check_start, start_codebook
from models.conditional import NetFactory
from models.vq import HardCodes
from models.vq_levels import LevelledCodes, spread


class QuantizedLevels(PyroModule):
    """An encoder for each level, the coarsest quantized first; finer ones see what was chosen above them.

    As in Razavi et al. (2019, section 3.1), except that each level's encoder reads the image itself. The finer level is
    quantized after a linear map of the coarser one's codes is added, so that it can describe what they leave out.

    Args:
        context_shape: shape of one datum.
        net: builds the encoders.
        model: whose levels have the codebooks, which are referred to and not owned.
        start: where codes start; see :class:`~guides.quantized.Quantized`.
    """

    own_losses = True  # of codebooks and commitment, which an objective has to add

    def __init__(self, context_shape: Sequence[int], net: NetFactory, model: nn.Module, start: str = "kmeans") -> None:
        super().__init__()
        if not isinstance(model, LevelledCodes):
            raise ValueError("it quantizes the levels of a model: accepted: model=vq_levels")
        check_start(start)
        self.start, self.names = start, model.names
        self.nets = nn.ModuleList(net(context_shape, level.event_shape) for level in model.priors)
        depths = [level.event_shape[0] for level in model.priors]
        self.links = nn.ModuleList(nn.Conv2d(depth, depth, 1) for depth in depths[:-1])
        object.__setattr__(self, "codebooks", [level.codebook for level in model.priors])  # not submodules

    def forward(self, x: Tensor) -> None:
        """Sample ``zL``, ..., ``z1`` for data of shape ``(N, *context_shape)``."""
        above: Tensor | None = None
        with pyro.plate("data", x.shape[0], dim=-1):
            for level in reversed(range(len(self.nets))):
                inputs = self.inputs(level, x, above)
                above = pyro.sample(self.names[level], HardCodes(inputs, self.codebooks[level]))

    def inputs(self, level: int, x: Tensor, above: Tensor | None) -> Tensor:
        """What a level quantizes, ``(*batch, D, H, W)``, given the vectors of the level above it."""
        inputs = self.nets[level](x)
        if above is None:
            return inputs
        wide = spread(above, inputs.shape[-2:])
        batch = wide.shape[:-3]
        seen = self.links[level](wide.reshape(batch.numel(), *wide.shape[-3:]))  # (*batch, D, H, W) -> (B, D, H, W)
        return inputs + seen.reshape(*batch, *seen.shape[1:])

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start the codebooks from the encoders' vectors of data ``(N, *context_shape)``, the coarsest first."""
        if self.start == "uniform":
            return
        above: list[Tensor | None] = [None] * len(x.split(500))
        for level in reversed(range(len(self.nets))):
            inputs = [self.inputs(level, some, up) for some, up in zip(x.split(500), above, strict=True)]
            start_codebook(self.codebooks[level], torch.cat(inputs).movedim(-3, -1), self.start)
            above = [HardCodes(some, self.codebooks[level]).mean for some in inputs]
