"""Latent sites, and their Kullback-Leibler divergences in closed form."""

from dataclasses import dataclass

from pyro.distributions import Independent, TorchDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from inference.structure import StructureError, innermost

Mask = Tensor | bool | None


def closed_form_kl(name: str, q: TorchDistribution, p: TorchDistribution, q_mask: Mask, p_mask: Mask) -> Tensor:
    """KL(q || p) of the latent site ``name`` where its masks let it count, in nats, of the batch shape of both.

    Raises:
        StructureError: only one of the programs masks the site, or there is no closed form.
    """
    if (q_mask is None) != (p_mask is None):
        raise StructureError(
            f"only one of model and guide masks site '{name}'; mask both, or use objective.kl=monte_carlo"
        )
    try:
        return scale_and_mask(kl_divergence(q, p), mask=q_mask)
    except NotImplementedError:
        raise StructureError(
            f"no closed-form KL between {_kind(q)} and {_kind(p)} at site '{name}'; use objective.kl=monte_carlo, or "
            "objective=trace_elbo"
        ) from None


def is_relaxed(q: TorchDistribution) -> bool:
    """Whether draws of ``q`` lie between the bits or one-hot vectors by whose masses they are scored."""
    return not getattr(innermost(q), "hard", True)


def has_closed_form(q: TorchDistribution, p: TorchDistribution) -> bool:
    """Whether KL(q || p) is known."""
    try:
        kl_divergence(q, p)
    except NotImplementedError:
        return False
    return True


@dataclass(frozen=True)
class Latent:
    """One latent site as guide and model see it."""

    value: Tensor  # (K, ..., N, *event_shape); without the K where it is 1
    q: TorchDistribution  # the guide's distribution of it
    p: TorchDistribution  # the model's
    q_mask: Mask = None  # where its log-densities count; everywhere for None
    p_mask: Mask = None

    def log_q(self) -> Tensor:
        """log q of the draws where they count, ``(K, ..., N)`` nats."""
        return scale_and_mask(self.q.log_prob(self.value), mask=self.q_mask)

    def log_p(self) -> Tensor:
        """The same under the model."""
        return scale_and_mask(self.p.log_prob(self.value), mask=self.p_mask)

    def sampled_kl(self, name: str) -> Tensor:
        """An estimate of KL(q || p) from the draws of the site ``name``, ``(K, ..., N)`` nats.

        Relaxed draws give none: the mean of their log q - log p falls to zero as the temperature rises. It is then the
        divergence of the discrete distributions that they relax, in closed form, or where p has none, such as a learnt
        prior over tokens, with the entropy of q in closed form and log p of the draws.
        """
        if not is_relaxed(self.q):
            return self.log_q() - self.log_p()
        try:
            return closed_form_kl(name, self.q, self.p, self.q_mask, self.p_mask)
        except StructureError:
            return -scale_and_mask(self.q.entropy(), mask=self.q_mask) - self.log_p()


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
