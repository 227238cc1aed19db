"""The VQ-VAE's model: a prior over grids of codes, and a likelihood given their vectors (van den Oord et al. 2017).

The latent site holds the vectors of the codes, not their numbers: a gradient can flow through them, and any likelihood
that reads an image-like latent can follow. Over numbers or vectors it is the same mass function, on K^(H W) points.
"""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import register_kl

from models.codebook import Codebook, QuantizationLosses, quantization_losses, straight_through
from models.conditional import Conditional


class HardCodes(dist.TorchDistribution):
    """All mass on the grid of codes nearest to given vectors: the posterior of a VQ-VAE, whose entropy is zero.

    Its one value is the grid's vectors; their gradient is passed on to the inputs unchanged, and none to the codebook.

    Args:
        inputs: what is quantized, ``(*batch, D, H, W)``.
        codebook: of vectors of D numbers.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    support = constraints.independent(constraints.real, 3)
    has_rsample = True

    def __init__(self, inputs: Tensor, codebook: Codebook, validate_args: bool | None = None) -> None:
        self.inputs, self.codebook = inputs, codebook
        self.codes = codebook.nearest(inputs.movedim(-3, -1))  # (*batch, H, W)
        self.vectors = codebook.embed(self.codes).movedim(-1, -3)  # (*batch, D, H, W)
        super().__init__(inputs.shape[:-3], inputs.shape[-3:], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "HardCodes":
        new = self._get_checked_instance(HardCodes, _instance)
        batch_shape = torch.Size(batch_shape)
        new.codebook = self.codebook
        new.inputs = self.inputs.expand(batch_shape + self.event_shape)
        new.vectors = self.vectors.expand(batch_shape + self.event_shape)
        new.codes = self.codes.expand(batch_shape + self.event_shape[1:])
        super(HardCodes, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return straight_through(self.vectors, self.inputs).expand(self._extended_shape(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """0 at the grid, minus infinity at all others."""
        same = (value == self.vectors).flatten(-3).all(-1)
        return torch.where(same, 0.0, -torch.inf).to(value.dtype)

    def entropy(self) -> Tensor:
        return self.inputs.new_zeros(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        return self.vectors.detach()

    @property
    def variance(self) -> Tensor:
        return torch.zeros_like(self.vectors)

    def losses(self) -> QuantizationLosses:
        """What moves codes and inputs towards each other, each ``(*batch,)``: summed over the grid."""
        return quantization_losses(self.inputs, self.vectors, event_dims=3)

    def update_codebook(self) -> None:
        """Let the codebook see which inputs its codes stand for; does something in training mode alone."""
        self.codebook.update(self.inputs.movedim(-3, -1), self.codes)


class CodeGrid(dist.TorchDistribution):
    """Grids of whole numbers as grids of a codebook's vectors.

    Args:
        tokens: a distribution of grids, event ``(H, W)``.
        codebook: whose vectors stand for the numbers.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    support = constraints.independent(constraints.real, 3)

    def __init__(self, tokens: Any, codebook: Codebook, validate_args: bool | None = None) -> None:
        self.tokens, self.codebook = tokens, codebook
        event_shape = torch.Size((codebook.dim, *tokens.event_shape))
        super().__init__(tokens.batch_shape, event_shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "CodeGrid":
        new = self._get_checked_instance(CodeGrid, _instance)
        new.tokens, new.codebook = self.tokens.expand(torch.Size(batch_shape)), self.codebook
        super(CodeGrid, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self.codebook.embed(self.tokens.sample(sample_shape)).movedim(-1, -3)

    def log_prob(self, value: Tensor) -> Tensor:
        """The mass of the codes that ``value``, ``(*batch, D, H, W)``, is made of."""
        vectors = value.movedim(-3, -1)
        codes = self.codebook.nearest(vectors)
        if self._validate_args and not torch.allclose(self.codebook.embed(codes), vectors, rtol=1e-4, atol=1e-6):
            raise ValueError("the latents are no vectors of the codebook; accepted: what guide=quantized draws")
        return self.tokens.log_prob(codes)


@register_kl(HardCodes, CodeGrid)
def _kl_hard_codes(q: HardCodes, p: CodeGrid) -> Tensor:
    """KL(q || p) = -log p(codes) in nats, for q is certain of them: H W log K under the uniform prior."""
    return -p.tokens.log_prob(q.codes)


class UniformTokens(Conditional):
    """Every whole number below K at every place of a grid, all equally likely.

    Args:
        event_shape: the grid, ``(H, W)``.
        codes: K.
    """

    logits: Tensor

    def __init__(self, event_shape: Sequence[int], codes: int) -> None:
        super().__init__(event_shape)
        self.register_buffer("logits", torch.zeros(*self.event_shape, codes), persistent=False)

    def forward(self, *context: Tensor) -> dist.Distribution:
        return dist.Categorical(logits=self.logits).to_event(len(self.event_shape))


class CodePrior(Conditional):
    """p(z) over grids of a codebook's vectors, uniform until another prior over tokens is put in its place.

    The codebook is learned under the uniform prior, and :attr:`tokens` then fitted to the codes of the data
    (van den Oord et al. 2017, section 3.3).

    Args:
        codebook: K vectors of D numbers.
        grid: ``(H, W)``.
        tokens: a distribution of grids of whole numbers below K; uniform by default.
    """

    def __init__(self, codebook: Codebook, grid: Sequence[int], tokens: Conditional | None = None) -> None:
        super().__init__((codebook.dim, *check_grid(grid)))
        self.codebook = codebook
        self.tokens = UniformTokens(grid, codebook.size) if tokens is None else tokens
        if self.tokens.event_shape != torch.Size(grid):
            raise ValueError(f"tokens come in grids {tuple(self.tokens.event_shape)}, the codes in {tuple(grid)}")

    def forward(self, *context: Tensor) -> dist.Distribution:
        return CodeGrid(self.tokens(*context), self.codebook)


def check_grid(grid: Sequence[int]) -> tuple[int, int]:
    """Height and width of a grid of codes."""
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"a grid of codes has a height and a width: accepted: (H, W), got {tuple(grid)}")
    return grid[0], grid[1]
