"""Several levels of codes, coarse ones above fine ones: the VQ-VAE-2 (Razavi, van den Oord and Vinyals 2019)."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F

from models.codebook import Codebook
from models.conditional import Conditional
from models.vq import CodePrior, check_grid


class LevelledCodes(PyroModule):
    """p(z_L) ... p(z_1|z_2) p(x|z_1, ..., z_L): grids of codes, each given the one above it, and data given them all.

    A Pyro model with sites ``z1`` (the finest grid) to ``zL`` and the observed ``x`` inside a plate ``data`` at dim -1;
    levels are drawn from the coarsest down. The likelihood reads the vectors of all levels on the finest grid, one
    level's channels behind the other's.

    Args:
        priors: of each level, the finest first; a level's tokens may read the numbers of the grid above it.
        likelihood: p(x|z); its context is ``(D_1 + ... + D_L, H_1, W_1)``.
    """

    guides: ClassVar[tuple[str, ...]] = ("quantized_levels",)  # the words of those made for it

    def __init__(self, priors: Sequence[CodePrior], likelihood: Conditional) -> None:
        super().__init__()
        finest = priors[0].event_shape
        wanted = (sum(prior.event_shape[0] for prior in priors), *finest[1:])
        if likelihood.context_shape != torch.Size(wanted):
            raise ValueError(f"the levels together are {wanted}, the likelihood reads {likelihood.context_shape}")
        self.levels = nn.ModuleList(priors)
        self.likelihood = likelihood

    @property
    def priors(self) -> list[CodePrior]:
        """Of each level, the finest first."""
        return [level for level in self.levels if isinstance(level, CodePrior)]

    @property
    def names(self) -> list[str]:
        """The latent sites, the finest first."""
        return [f"z{level}" for level in range(1, len(self.levels) + 1)]

    def forward(self, x: Tensor) -> Tensor:
        """Run the program on data of shape ``(N, *event_shape)``; returns all levels on the finest grid."""
        drawn: list[Tensor] = []
        with pyro.plate("data", x.shape[0], dim=-1):
            for name, prior in reversed(list(zip(self.names, self.priors, strict=True))):
                drawn.append(pyro.sample(name, prior(*self._context(prior, drawn))))
            grid = self.priors[0].event_shape[1:]
            z = torch.cat([spread(vectors, grid) for vectors in reversed(drawn)], dim=-3)
            pyro.sample("x", self.likelihood(z), obs=x)
        return z

    def _context(self, prior: CodePrior, drawn: list[Tensor]) -> list[Tensor]:
        """The code numbers of the level above, for a prior that reads them."""
        if not drawn or not getattr(prior.tokens, "context_codes", 0):
            return []
        above = self.priors[len(self.levels) - len(drawn)]
        return [above.codebook.nearest(drawn[-1].movedim(-3, -1))]


def spread(vectors: Tensor, grid: Sequence[int]) -> Tensor:
    """Vectors ``(*batch, D, h, w)`` on a finer grid, each repeated over its neighbourhood: ``(*batch, D, H, W)``."""
    if vectors.shape[-2:] == torch.Size(grid):
        return vectors
    batch = vectors.shape[:-3]
    flat = vectors.reshape(batch.numel(), *vectors.shape[-3:])  # (*batch, D, h, w) -> (B, D, h, w)
    return F.interpolate(flat, size=tuple(grid), mode="nearest").reshape(*batch, vectors.shape[-3], *grid)


def vq_levels(
    event_shape: Any,
    likelihood: Callable[..., Any],
    tokens: Callable[..., Any],
    levels: int = 2,
    codes: int = 16,
    code_dim: int = 8,
    grid: tuple[int, int] = (4, 4),
    ema: bool = False,
    decay: float = 0.99,
    restart_below: float = 0.0,
) -> LevelledCodes:
    """Levels of codes, each half as fine as the one below (Razavi et al. 2019); with guide=quantized_levels."""
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    grids = [check_grid(grid)]
    while len(grids) < levels:
        if grids[-1] == (1, 1):
            raise ValueError(f"levels: a grid {grids[0]} halves down to one code; accepted: 1 to {len(grids)}")
        grids.append(((grids[-1][0] + 1) // 2, (grids[-1][1] + 1) // 2))
    priors = []
    for shape, above in zip(grids, [*grids[1:], None], strict=True):
        context = {"context_shape": above, "context_codes": codes} if above else {}
        codebook = Codebook(codes, code_dim, ema, decay, restart_below)
        priors.append(CodePrior(codebook, shape, tokens(shape, codes, **context)))
    return LevelledCodes(priors, likelihood(event_shape, (levels * code_dim, *grids[0])))
