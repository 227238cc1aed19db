"""The guide of a model with a cluster and a code for each datum."""

from collections.abc import Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor

from guides.gaussian import DiagonalNormal
from models.conditional import NetFactory
from models.mixture_vae import MixtureVAE


class Clustering(PyroModule):
    """q(z|x) q(c|x, z), for model=gmm_vae; in training, ``TraceEnum_ELBO`` sums over the clusters.

    Given z, the clusters' posterior p(c|z) is known: with it nothing is lost but what q(z|x) loses, and the bound is
    that of the mixture with its components summed out (Jiang et al. 2017, equation 16). A net that guesses c from x
    leaves a further gap (the usual GMM-VAE; Dilokthanakul et al. 2016).

    Args:
        event_shape: shape of one code.
        context_shape: shape of one datum.
        net: builds the encoders.
        model: whose clusters they are.
        assignment: posterior, p(c|z) of the model, or amortized, a net's q(c|x).
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int],
        net: NetFactory,
        model: Any,
        assignment: Literal["posterior", "amortized"] = "posterior",
    ) -> None:
        super().__init__()
        if not isinstance(model, MixtureVAE):
            raise ValueError("it infers a cluster and a code; accepted: model=gmm_vae")
        if assignment not in ("posterior", "amortized"):
            raise ValueError(f"assignment must be posterior or amortized, got {assignment!r}")
        object.__setattr__(self, "model", model)  # not a submodule: its parameters are the model's
        self.core = DiagonalNormal(event_shape, context_shape, net)
        self.net = net(context_shape, (model.num_clusters,)) if assignment == "amortized" else None

    def forward(self, x: Tensor) -> Tensor:
        """The codes of data ``(N, *context_shape)``, ``(..., N, *event_shape)``."""
        infer = {"enumerate": "parallel"} if self.training else {}
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", self.core(x))
            logits = self.model.prior.responsibilities(z) if self.net is None else self.net(x)
            pyro.sample("c", dist.Categorical(logits=logits), infer=infer)
        return z
