"""Small models for the tests of compiled and vectorized steps."""

from functools import partial

import torch
from torch import Tensor, nn

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference.compiled import CompiledSVI
from inference.engine import SVI, SharedOptimizer
from inference.particles import validation
from models.latent import LatentVariableModel
from models.likelihoods import Bernoulli
from models.nets import MLP
from models.priors import StandardNormal

PIXELS = 6
plain = partial(CompiledSVI, inductor=False)


def pair(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A small variational autoencoder: model and guide."""
    torch.manual_seed(seed)
    net = partial(MLP, hidden=(5,))
    model = LatentVariableModel(StandardNormal((2,)), Bernoulli((PIXELS,), (2,), net))
    return model, Amortized(DiagonalNormal((2,), (PIXELS,), net))


def shared(model: nn.Module, guide: nn.Module, factory=torch.optim.Adam, rate: float = 0.05, clip: float | None = None):
    """One optimizer over both."""
    return SharedOptimizer([*model.parameters(), *guide.parameters()], factory, rate, clip)


def vae_svi(kind, loss, seed: int = 0, **options) -> SVI:
    """An engine of that kind over :func:`pair`."""
    model, guide = pair(seed)
    return kind(model, guide, shared(model, guide, **options), loss)


def batches(count: int, size: int = 4, last: int = 4) -> list[Tensor]:
    """Binary data; the last batch may have another size."""
    generator = torch.Generator().manual_seed(7)
    sizes = [size] * (count - 1) + [last]
    return [torch.randint(0, 2, (n, PIXELS), generator=generator).to(torch.get_default_dtype()) for n in sizes]


def losses(svi: SVI, xs: list[Tensor], seed: int = 1, rates: list[float] | None = None) -> Tensor:
    """The losses of steps on these batches, the random numbers starting at a seed."""
    torch.manual_seed(seed)
    found = []
    with validation(False):
        for i, x in enumerate(xs):
            if rates is not None:
                svi.optim.set_learning_rate(rates[i])
            if hasattr(svi, "at"):
                svi.at(i / len(xs))
            found.append(torch.as_tensor(svi.step(x)).detach())
    return torch.stack(found)


def parameters(svi: SVI) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten().clone() for p in svi.optim.parameters])
