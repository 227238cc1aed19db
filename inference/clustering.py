"""Clusters read off a trained model, and how well they agree with labels; the bound of VaDE."""

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn
from torch.distributions import kl_divergence

from inference.closed_form import factors
from inference.objectives import ELBO
from inference.particles import Latent, Particles, encode
from inference.structure import StructureError
from models.priors import MixturePrior

Labels = NDArray[np.int64]


class VaDE(ELBO):
    """The bound of a mixture prior with its divergence summed over the clusters (Jiang et al. 2017, equation 12).

    E_q(z|x) log p(x|z) - sum_c g_c [KL(q(z|x) || p(z|c)) + log g_c / p(c)], every KL of two Gaussians in closed form.
    The paper's g is p(c|z) at a draw of z. The tightest g is proportional to p(c) exp -KL(q(z|x) || p(z|c)). Either is
    below the ELBO of the same mixture with its components summed out, by how far the g are from the clusters' own
    posteriors. It is a bound for ``model=composed prior=mixture``, a Gaussian guide, and one latent.

    Args:
        particles: draws per datum.
        clusters: posterior (the paper's g) or tightest.
        max_plate_nesting: see :class:`~inference.objectives.Objective`.
    """

    def __init__(
        self,
        particles: int = 1,
        clusters: Literal["posterior", "tightest"] = "posterior",
        max_plate_nesting: int | None = None,
    ) -> None:
        super().__init__(particles, "analytic", max_plate_nesting)
        if clusters not in ("posterior", "tightest"):
            raise ValueError(f"clusters must be posterior or tightest, got {clusters!r}")
        self.clusters = clusters

    def divergence(self, draws: Particles) -> Tensor:
        if set(draws.latents) != {"z"}:
            raise StructureError("objective=vade is about one code z under a mixture; accepted: prior=mixture")
        latent = draws.latents["z"]
        kl, log_prior = _divergences(latent)
        log_share = log_prior - kl if self.clusters == "tightest" else _log_joint(latent)
        log_share = log_share.log_softmax(-1)
        return (log_share.exp() * (kl + log_share - log_prior)).sum(-1).expand(draws.log_q.shape)


def _mixture(latent: Latent) -> tuple[Any, int]:
    """The prior of a latent and its number of event dimensions, once it is known to be a mixture of Gaussians."""
    p = latent.p
    parts = getattr(p, "component_distribution", None)
    if not isinstance(getattr(parts, "base_dist", None), torch.distributions.Normal):
        raise StructureError("objective=vade needs a mixture of Gaussians for a prior; accepted: prior=mixture")
    return p, len(p.event_shape)


def _divergences(latent: Latent) -> tuple[Tensor, Tensor]:
    """KL(q(z|x) || p(z|c)) and log p(c), each ``(..., N, C)`` nats."""
    p, size = _mixture(latent)
    q = factors(latent.q)
    if not isinstance(q, torch.distributions.Normal):
        raise StructureError("objective=vade needs independent Gaussians for a posterior; accepted: guide=diagonal")
    one = torch.distributions.Normal(q.loc.unsqueeze(-1 - size), q.scale.unsqueeze(-1 - size), validate_args=False)
    kl = kl_divergence(one, p.component_distribution.base_dist)  # (..., N, C, *event)
    return kl.flatten(-size).sum(-1), p.mixture_distribution.logits


def _log_joint(latent: Latent) -> Tensor:
    """log p(c) p(z|c) at the draws, ``(..., N, C)``."""
    p, size = _mixture(latent)
    return p.component_distribution.log_prob(latent.value.unsqueeze(-1 - size)) + p.mixture_distribution.logits


@torch.no_grad()
def clusters_of(model: nn.Module, guide: nn.Module, x: Tensor, at_once: int = 512) -> Labels:
    """The likeliest cluster of each datum, ``(N,)``: by q(c|x) where the guide has a net for it, else by p(c|E_q z).

    Raises:
        ValueError: a model without clusters.
    """
    prior = getattr(model, "prior", None)
    if not isinstance(prior, MixturePrior):
        raise ValueError("only a model with a mixture for a prior has clusters; accepted: prior=mixture, model=gmm_vae")
    found = []
    for some in x.split(at_once):
        sites = encode(guide, some)
        own = getattr(guide, "net", None) is not None
        shares = sites["c"].logits if own else prior.responsibilities(sites["z"].mean)
        found.append(shares.argmax(-1))
    return torch.cat(found).cpu().numpy()


def clustering_accuracy(labels: Labels, clusters: Labels) -> float:
    """Share of data whose cluster stands for their label, under the best one-to-one match of the two.

    The match is an assignment problem (Kuhn 1955); with more clusters than labels some stand for none.
    """
    _, label = np.unique(labels, return_inverse=True)
    _, cluster = np.unique(clusters, return_inverse=True)
    counts = np.zeros((label.max() + 1, cluster.max() + 1), dtype=np.int64)
    np.add.at(counts, (label, cluster), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / len(labels))


def mutual_information_score(labels: Labels, clusters: Labels) -> float:
    """I(label; cluster) over the mean of their entropies, from 0 to 1."""
    return float(normalized_mutual_info_score(labels, clusters))
