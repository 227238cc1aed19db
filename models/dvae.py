"""The discrete VAE: a grid of one-hot codes, each a vector to the decoder (Ramesh et al. 2021, section 2.1).

The latent site holds one-hot vectors, or in training the relaxed ones of guide=concrete; the decoder is given their
mixture of code vectors, z = sum_k c_k e_k, so that a gradient flows to the weights and to the vectors alike.
"""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import one_hot

from models.conditional import Conditional
from models.discrete import OneHots, UniformOneHots
from models.vq import UniformTokens


class OneHotGrid(dist.TorchDistribution):
    """Grids of whole numbers as grids of one-hot vectors.

    A relaxed grid is scored as the one-hot vectors that it is nearest to, without a gradient.

    Args:
        tokens: a distribution of grids, event ``(H, W)``.
        classes: K.
        like: a tensor of the type and on the device of what is drawn.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    support = constraints.independent(constraints.real, 3)

    def __init__(self, tokens: Any, classes: int, like: Tensor, validate_args: bool | None = None) -> None:
        self.tokens, self.classes, self.like = tokens, classes, like
        super().__init__(tokens.batch_shape, torch.Size((*tokens.event_shape, classes)), validate_args=validate_args)

    @property
    def entry(self) -> dist.Distribution:
        """A distribution of the kind that a single entry has: one-hot vectors."""
        return OneHots(self.like.new_zeros(self.classes))

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "OneHotGrid":
        new = self._get_checked_instance(OneHotGrid, _instance)
        new.tokens, new.classes, new.like = self.tokens.expand(torch.Size(batch_shape)), self.classes, self.like
        super(OneHotGrid, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return one_hot(self.tokens.sample(sample_shape), self.classes).to(self.like)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.tokens.log_prob(value.detach().argmax(-1))


class OneHotPrior(Conditional):
    """p(z) over grids of one-hot vectors: all alike, or another distribution of tokens.

    Args:
        tokens: a distribution of grids ``(H, W)`` of whole numbers below K.
        classes: K.
    """

    zero: Tensor

    def __init__(self, tokens: Conditional, classes: int) -> None:
        super().__init__((*tokens.event_shape, classes))
        self.tokens, self.classes = tokens, classes
        self.register_buffer("zero", torch.zeros(()), persistent=False)
        self.uniform = UniformOneHots(self.event_shape) if isinstance(tokens, UniformTokens) else None

    def forward(self, *context: Tensor) -> dist.Distribution:
        if self.uniform is not None:  # in closed form against any guide of one-hot vectors
            return self.uniform()
        return OneHotGrid(self.tokens(), self.classes, self.zero)


class SoftEmbedding(Conditional):
    """p(x|z) of a likelihood that reads code vectors on a grid, given weights of the codes.

    Args:
        likelihood: with contexts ``(D, H, W)``.
        classes: K, the number of codes.
    """

    def __init__(self, likelihood: Conditional, classes: int) -> None:
        dim, height, width = likelihood.context_shape
        super().__init__(likelihood.event_shape, (height, width, classes))
        self.likelihood = likelihood
        self.vectors = nn.Parameter(torch.randn(classes, dim))

    @property
    def support(self) -> Any:
        """What data the likelihood is of."""
        return getattr(self.likelihood, "support", "real")

    def embed(self, weights: Tensor) -> Tensor:
        """sum_k c_k e_k at each place: ``(*batch, H, W, K)`` to ``(*batch, D, H, W)``."""
        return (weights @ self.vectors).movedim(-1, -3)

    def forward(self, *context: Tensor) -> dist.Distribution:
        return self.likelihood(*(self.embed(weights) for weights in context))
