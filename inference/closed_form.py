"""Kullback-Leibler divergences of latent sites in closed form."""

from pyro.distributions import Independent, TorchDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from inference.structure import StructureError

Mask = Tensor | bool | None


def closed_form_kl(name: str, q: TorchDistribution, p: TorchDistribution, q_mask: Mask, p_mask: Mask) -> Tensor:
    """KL(q || p) of the latent site ``name`` where its masks let it count, in nats, of the batch shape of both.

    Raises:
        StructureError: only one of the programs masks the site, or there is no closed form.
    """
    if (q_mask is None) != (p_mask is None):
        raise StructureError(f"only one of model and guide masks site '{name}'; mask both, or use kl=monte_carlo")
    try:
        return scale_and_mask(kl_divergence(q, p), mask=q_mask)
    except NotImplementedError:
        raise StructureError(
            f"no closed-form KL between {_kind(q)} and {_kind(p)} at site '{name}'; use kl=monte_carlo, or "
            "objective=trace_elbo"
        ) from None


def factors(distribution: TorchDistribution) -> TorchDistribution | None:
    """The independent factors of a distribution over its event dimensions; None where there is dependence."""
    if len(distribution.event_shape) == 0:
        return distribution
    if isinstance(distribution, Independent) and len(distribution.base_dist.event_shape) == 0:
        return distribution.base_dist
    return None


def _kind(distribution: TorchDistribution) -> str:
    base = getattr(distribution, "base_dist", distribution)
    return type(
        base if type(distribution).__name__ in ("Independent", "ExpandedDistribution") else distribution
    ).__name__
