"""The composed latent-variable model: a prior and a likelihood."""

import pyro
from pyro.nn import PyroModule
from torch import Tensor

from models.conditional import Conditional


class LatentVariableModel(PyroModule):
    """p(x, z) = p(z) p(x|z), one latent vector for each datum (Kingma and Welling 2014, section 2.1).

    A Pyro model with a latent site ``z`` and an observed site ``x`` inside a plate ``data`` at dim -1. Called with a
    batch of data it conditions on it; under :func:`pyro.poutine.uncondition` it generates as many data as it is given
    rows. Generation needs no guide.

    Args:
        prior: p(z); its event is the latent shape.
        likelihood: p(x|z); its context is the latent shape.
    """

    def __init__(self, prior: Conditional, likelihood: Conditional) -> None:
        super().__init__()
        if prior.event_shape != likelihood.context_shape:
            raise ValueError(
                f"the prior draws latents of shape {tuple(prior.event_shape)}, "
                f"the likelihood expects {tuple(likelihood.context_shape)}"
            )
        self.prior = prior
        self.likelihood = likelihood

    def forward(self, x: Tensor) -> Tensor:
        """Run the program on data of shape ``(N, *event_shape)``; returns the latents, ``(..., N, *latent_shape)``."""
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x)
        return z
