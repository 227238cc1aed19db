"""Vector quantization: a codebook, the straight-through gradient, and the losses between codes and inputs."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.kmeans import KMeans
from models.tractable import spread_rows


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard``, bit for bit, with the gradient of ``soft`` (Bengio, Leonard and Courville 2013).

    With a one-hot ``hard`` and its softmax this is sg(hard - soft) + soft; with a code and the vector it is nearest to,
    the copied gradient of the VQ-VAE.
    """
    return hard.detach() + (soft - soft.detach())


class QuantizationLosses(NamedTuple):
    """Two losses of the same value, the squared distance of inputs and codes, that move one of the two each.

    A codebook rate g and a commitment weight b, ``g * codebook + b * commitment``, are two independent knobs: (1, b)
    is the loss of van den Oord et al. (2017, equation 3), (1, 1) has the gradient of the plain squared distance, and
    (b, b) that of b times the squared distance.
    """

    codebook: Tensor  # moves the codes towards the inputs
    commitment: Tensor  # moves the inputs towards the codes


def quantization_losses(inputs: Tensor, codes: Tensor, event_dims: int = 1) -> QuantizationLosses:
    """||sg(inputs) - codes||^2 and ||inputs - sg(codes)||^2, summed over the last ``event_dims`` dimensions.

    The gradients are 2 (codes - inputs) for the codes, and 2 (inputs - codes) for the inputs.
    """
    dims = tuple(range(-event_dims, 0))
    return QuantizationLosses(
        (inputs.detach() - codes).square().sum(dims), (inputs - codes.detach()).square().sum(dims)
    )


class Codebook(nn.Module):
    """K vectors of D numbers, one of which stands for each input.

    Learned by gradient, from :func:`quantization_losses`, or as moving averages of the inputs that each code stands
    for (van den Oord et al. 2017, appendix A.1): counts and sums are averaged with one decay, from zero, so that the
    bias of the start divides out of their ratio, and counts are not smoothed; a code without inputs stays where it is.

    Args:
        size: K.
        dim: D.
        ema: whether :meth:`update` sets the vectors to moving averages; they are then no parameters.
        decay: of the moving averages, per step.
        restart_below: a code that stands for fewer inputs per step than this, in the moving average, is put on a random
            input; 0 for never.
    """

    vectors: Tensor
    counts: Tensor
    sums: Tensor
    weight: Tensor

    def __init__(self, size: int, dim: int, ema: bool = False, decay: float = 0.99, restart_below: float = 0.0) -> None:
        super().__init__()
        if size < 2 or dim < 1:
            raise ValueError(f"a codebook has at least 2 codes of at least 1 number, got {size} codes of {dim}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        if not 0 <= restart_below < math.inf:
            raise ValueError(f"restart_below must be 0 or above and finite, got {restart_below}")
        self.ema, self.decay, self.restart_below = ema, decay, restart_below
        start = torch.empty(size, dim).uniform_(-1 / size, 1 / size)
        if ema:
            self.register_buffer("vectors", start)
        else:
            self.vectors = nn.Parameter(start)
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("sums", torch.zeros(size, dim))
        self.register_buffer("weight", torch.zeros(()))

    @property
    def size(self) -> int:
        """K."""
        return self.vectors.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.vectors.shape[1]

    @torch.no_grad()
    def nearest(self, inputs: Tensor) -> Tensor:
        """The code nearest to each input, the first of several: ``(*batch, D)`` to whole numbers ``(*batch,)``."""
        # Distances from differences: those from inner products break ties, and near ties, by their rounding.
        distances = torch.cdist(
            inputs.reshape(-1, self.dim), self.vectors, compute_mode="donot_use_mm_for_euclid_dist"
        )  # (*batch, D) -> (B, K)
        return distances.argmin(-1).reshape(inputs.shape[:-1])

    def embed(self, codes: Tensor) -> Tensor:
        """The vectors of codes, ``(*batch,)`` to ``(*batch, D)``."""
        return nn.functional.embedding(codes, self.vectors)

    @torch.no_grad()
    def update(self, inputs: Tensor, codes: Tensor) -> None:
        """What a training step does besides following gradients: moving averages and restarts; nothing in evaluation.

        Args:
            inputs: ``(*batch, D)``.
            codes: the nearest codes, ``(*batch,)``.
        """
        if not self.training or not (self.ema or self.restart_below):
            return
        flat = inputs.reshape(-1, self.dim).to(self.vectors.dtype)
        self._average(flat, codes.reshape(-1))
        if self.ema:
            used = (self.counts > 0).unsqueeze(-1)
            self.vectors.copy_(torch.where(used, self.sums / self.counts.clamp(min=_TINY).unsqueeze(-1), self.vectors))
        if self.restart_below:
            self._restart(flat)

    def _average(self, inputs: Tensor, codes: Tensor) -> None:
        gain = 1 - self.decay
        ones = torch.ones_like(codes, dtype=self.counts.dtype)
        self.counts.mul_(self.decay).index_add_(0, codes, ones, alpha=gain)
        self.sums.mul_(self.decay).index_add_(0, codes, inputs, alpha=gain)
        self.weight.mul_(self.decay).add_(gain)

    def usage(self) -> Tensor:
        """Inputs per step that each code stood for lately, ``(K,)``: the moving average, its start divided out."""
        return self.counts / self.weight.clamp(min=_TINY)

    def _restart(self, inputs: Tensor) -> None:
        """Put dead codes on inputs, as if they had stood for as many as keeps a code alive."""
        dead = (self.usage() < self.restart_below).unsqueeze(-1)
        rows = inputs[torch.randint(inputs.shape[0], (self.size,), device=inputs.device)]
        count = torch.full_like(self.counts, self.restart_below) * self.weight
        self.vectors.copy_(torch.where(dead, rows, self.vectors))
        self.sums.copy_(torch.where(dead, rows * count.unsqueeze(-1), self.sums))
        self.counts.copy_(torch.where(dead.squeeze(-1), count, self.counts))

    @torch.no_grad()
    def start_at(self, inputs: Tensor, iterations: int = 20) -> None:
        """Start from the cluster means of inputs ``(*batch, D)``, and forget the moving averages."""
        points = inputs.reshape(-1, self.dim)
        means = KMeans((self.dim,), self.size).to(points)
        means.codebook.copy_(spread_rows(points, self.size, repeats=True))
        means.lloyd(points, iterations)
        self.vectors.copy_(means.codebook)
        for average in (self.counts, self.sums, self.weight):
            average.zero_()


_TINY = torch.finfo(torch.float32).tiny
