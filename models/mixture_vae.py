"""A variational autoencoder whose prior is a mixture, its component a latent of its own."""

from typing import ClassVar

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor

from models.conditional import Conditional
from models.priors import MixturePrior


class MixtureVAE(PyroModule):
    """p(c) p(z|c) p(x|z): a cluster, a code near its centre, a datum (Jiang et al. 2017, section 3.1).

    Sites ``c``, ``z`` and ``x``. Summed over c it is :class:`~models.latent.LatentVariableModel` with the same
    :class:`~models.priors.MixturePrior`, which is what to take where the cluster need not be a site.

    Args:
        prior: p(z), of whose components c is the number.
        likelihood: p(x|z).
    """

    guides: ClassVar[tuple[str, ...]] = ("clustering",)  # the words of those made for it

    def __init__(self, prior: MixturePrior, likelihood: Conditional) -> None:
        super().__init__()
        if prior.event_shape != likelihood.context_shape:
            raise ValueError(
                f"the prior draws latents of shape {tuple(prior.event_shape)}, "
                f"the likelihood expects {tuple(likelihood.context_shape)}"
            )
        self.prior, self.likelihood = prior, likelihood

    @property
    def num_clusters(self) -> int:
        """How many components there are."""
        return len(self.prior.logits)

    def forward(self, x: Tensor) -> Tensor:
        """Run the program on data ``(N, *event_shape)``; returns the clusters, ``(..., N)``."""
        with pyro.plate("data", x.shape[0], dim=-1):
            c = pyro.sample("c", dist.Categorical(logits=self.prior.logits))
            z = pyro.sample("z", self.prior.component(c))
            pyro.sample("x", self.likelihood(z), obs=x)
        return c
