"""Models with every prior and their guides, and what tests measure on them."""

from functools import partial

import torch

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from models.flow_prior import AutoregressivePrior, CouplingPrior, InverseAutoregressivePrior, SplinePrior
from models.latent import LatentVariableModel
from models.likelihoods import FixedGaussian
from models.nets import MLP, Linear
from models.priors import MixturePrior
from models.vamp import AggregatedPosterior, VampPrior

FLOWS = [CouplingPrior, AutoregressivePrior, InverseAutoregressivePrior, SplinePrior]
MLP8 = partial(MLP, hidden=(8,))
PRIORS = {
    "mixture": lambda latent, data: MixturePrior((latent,), components=3),
    "vamp": lambda latent, data: VampPrior((latent,), (data,), components=5),
    "aggregated": lambda latent, data: AggregatedPosterior((latent,), (data,)),
    **{kind.__name__: (lambda latent, data, kind=kind: kind((latent,), hidden=(8,))) for kind in FLOWS},
}


def perturbed(module, size=0.4):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


def pair(prior, x, net=Linear):
    """A model with that prior and its guide, for latents of the prior and data like ``x``."""
    data, latent = x.shape[1:], prior.event_shape
    model = LatentVariableModel(prior, FixedGaussian(data, latent, net))
    guide = Amortized(DiagonalNormal(latent, data, net))
    if hasattr(prior, "look_through"):
        prior.look_through(guide.core)
        prior.initialize(x)
    return model, guide


def posterior_parameters(guide, x):
    q = guide.core(x).base_dist
    return q.loc.detach().numpy(), q.scale.detach().numpy()


def mass(prior, half_width=10.0, points=401):
    """The integral of the density of one or two latents."""
    grid = torch.linspace(-half_width, half_width, points)
    dim = prior.event_shape[0]
    with torch.no_grad():
        density = prior().log_prob(torch.cartesian_prod(*[grid] * dim).reshape(-1, dim)).exp()
    return (density.sum() * (grid[1] - grid[0]) ** dim).item()
