"""The guide of a VQ-VAE: no randomness, and no entropy."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from models.conditional import Conditional, NetFactory
from models.vq import CodePrior, HardCodes

MOST_INPUTS = 20_000  # that K-means looks at


class Quantized(Conditional):
    """The codes nearest to the encoder's vectors, one for each place of a grid (van den Oord et al. 2017, eq. 1 and 2).

    One-hot at the nearest code, so that H(q) = 0 and the divergence from the uniform prior is the constant H W log K.
    Gradients are copied from the codes' vectors to the encoder's.

    Args:
        event_shape: shape of the vectors on their grid, ``(D, H, W)``.
        context_shape: shape of one datum.
        net: builds the encoder.
        model: its prior has the codebook, which is referred to and not owned.
    """

    def __init__(
        self, event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory, model: nn.Module
    ) -> None:
        super().__init__(event_shape, context_shape)
        prior = getattr(model, "prior", None)
        if not isinstance(prior, CodePrior):
            raise ValueError("it chooses codes out of the model's codebook: accepted: model=vq")
        self.net = net(self.context_shape, self.event_shape)
        object.__setattr__(self, "codebook", prior.codebook)  # not a submodule

    def forward(self, *context: Tensor) -> dist.Distribution:
        return HardCodes(self.net(*context), self.codebook)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start the codebook at the cluster means of the encoder's vectors of data ``(N, *context_shape)``."""
        vectors = self.net(x).movedim(-3, -1).reshape(-1, self.codebook.dim)  # (N, D, H, W) -> (N H W, D)
        some = torch.randperm(vectors.shape[0], device=x.device)[:MOST_INPUTS]
        self.codebook.start_at(vectors[some])
