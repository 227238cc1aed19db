"""The guide of a VQ-VAE: no randomness, and no entropy."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from models.codebook import Codebook
from models.conditional import Conditional, NetFactory
from models.vq import CodePrior, HardCodes

MOST_INPUTS = 20_000  # that K-means looks at
STARTS = ("kmeans", "data", "uniform")


class Quantized(Conditional):
    """The codes nearest to the encoder's vectors, one for each place of a grid (van den Oord et al. 2017, eq. 1 and 2).

    One-hot at the nearest code, so that H(q) = 0 and the divergence from the uniform prior is the constant H W log K.
    Gradients are copied from the codes' vectors to the encoder's.

    Args:
        event_shape: shape of the vectors on their grid, ``(D, H, W)``.
        context_shape: shape of one datum.
        net: builds the encoder.
        model: its prior has the codebook, which is referred to and not owned.
        start: where codes start: kmeans, at cluster means of the encoder's vectors of training data; data, at some of
            these vectors; uniform, as they are, near zero.
    """

    own_losses = True  # of codebook and commitment, which an objective has to add

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int],
        net: NetFactory,
        model: nn.Module,
        start: str = "kmeans",
    ) -> None:
        super().__init__(event_shape, context_shape)
        check_start(start)
        prior = getattr(model, "prior", None)
        if not isinstance(prior, CodePrior):
            raise ValueError("it chooses codes out of the model's codebook: accepted: model=vq")
        self.start = start
        self.net = net(self.context_shape, self.event_shape)
        object.__setattr__(self, "codebook", prior.codebook)  # not a submodule

    def forward(self, *context: Tensor) -> dist.Distribution:
        return HardCodes(self.net(*context), self.codebook)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start the codebook from the encoder's vectors of data ``(N, *context_shape)``."""
        if self.start != "uniform":
            vectors = torch.cat([self.net(some).movedim(-3, -1) for some in x.split(500)])  # (N, H, W, D)
            start_codebook(self.codebook, vectors, self.start)


def check_start(start: str) -> None:
    """Refuse a word that says nothing of where codes start."""
    if start not in STARTS:
        raise ValueError(f"start={start!r} is not known; accepted: {', '.join(STARTS)}")


def start_codebook(codebook: Codebook, vectors: Tensor, start: str) -> None:
    """Put a codebook where vectors ``(*batch, D)`` are: at their cluster means, or at some of them."""
    flat = vectors.reshape(-1, codebook.dim)
    some = flat[torch.randperm(flat.shape[0], device=flat.device)[:MOST_INPUTS]]
    codebook.start_at(some, iterations=20 if start == "kmeans" else 0)
