"""The ELBO with a part of its KL for free."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from inference.closed_form import factors, is_relaxed
from inference.gradients import GradientEstimator
from inference.objectives import ELBO
from inference.particles import Latent, Particles
from inference.structure import StructureError


class FreeBits(ELBO):
    """Free bits, a floor under the KL of each group of latents (Kingma et al. 2016, appendix C.8).

    E_q log p(x|z) - sum_j max(nats, KL_j). A group whose KL is below the floor costs the same whatever it does, so
    that nothing pulls it to the prior. Never above the ELBO, so still a lower bound on log p(x), averaged over a batch.

    Args:
        nats: the floor of each group, the paper's lambda; for ``group="all"`` the rate that the whole KL is to reach.
        group: ``"dimension"`` for one group per latent dimension, ``"site"`` for one per latent site, ``"all"`` for
            one floor under the whole KL.
        floor_of: ``"batch"``, the paper's, compares the KL averaged over batch and draws with the floor, ``"datum"``
            that of each datum, which has to be known: it goes with ``kl="analytic"``.
        particles: draws per datum.
        kl: ``"monte_carlo"`` takes the KL of each group from the draws, for families without a closed form.
        max_plate_nesting: see :class:`~inference.objectives.Objective`.
        gradient: see :class:`~inference.objectives.Objective`.
    """

    def __init__(
        self,
        nats: float = 0.1,
        group: Literal["dimension", "site", "all"] = "dimension",
        floor_of: Literal["batch", "datum"] = "batch",
        particles: int = 1,
        kl: Literal["analytic", "monte_carlo"] = "analytic",
        max_plate_nesting: int | None = None,
        gradient: str | GradientEstimator = "reparameterized",
    ) -> None:
        super().__init__(particles, kl, max_plate_nesting, gradient)
        if not 0 <= nats < math.inf:
            raise ValueError(f"nats must be 0 or above and finite, got {nats}")
        if group not in ("dimension", "site", "all"):
            raise ValueError(f"group must be 'dimension', 'site' or 'all', got {group!r}")
        if floor_of not in ("batch", "datum"):
            raise ValueError(f"floor_of must be 'batch' or 'datum', got {floor_of!r}")
        if floor_of == "datum" and kl == "monte_carlo":
            raise ValueError(
                "floor_of=datum with kl=monte_carlo would put the floor under each draw of log q - log p, and the mean "
                "of what lies above a floor is not what of the mean does; use kl=analytic, or floor_of=batch"
            )
        self.nats, self.group, self.floor_of = nats, group, floor_of

    @property
    def log_q_is_sampled(self) -> bool:  # type: ignore[override]
        return False  # the groups read their densities off the distributions

    @property
    def needs_density(self) -> bool:
        return True

    @property
    def local(self) -> bool:  # type: ignore[override]
        return self.kl == "analytic"  # else each draw moves the average of the batch

    def divergence(self, draws: Particles) -> Tensor:
        kl = self._by_group(draws)  # (K, N, groups)
        compared = kl.mean((0, 1)) if self.floor_of == "batch" else kl
        # Where the average is compared, its gradient is that of each datum's own share.
        return torch.where(compared > self.nats, kl, self.nats).sum(-1)

    def _by_group(self, draws: Particles) -> Tensor:
        if draws.auxiliary:
            raise StructureError(f"the guide's auxiliary sites {list(draws.auxiliary)} belong to no group of latents")
        sites = draws.site_kls(self.kl == "analytic")  # refuses what has none
        if self.group == "dimension":
            num_particles = draws.log_q.shape[0]
            return torch.cat([self._by_dimension(name, z, num_particles) for name, z in draws.latents.items()], -1)
        stacked = torch.stack(list(sites.values()), -1)
        return stacked if self.group == "site" else stacked.sum(-1, keepdim=True)

    def _by_dimension(self, name: str, latent: Latent, num_particles: int) -> Tensor:
        """KL(q(z_d|x) || p(z_d)) of one site, ``(K, N, D)``, with D over its event and its other plates."""
        q, p = factors(latent.q), factors(latent.p)
        if q is None or p is None or latent.q_mask is not None:
            raise StructureError(
                f"the KL of site '{name}' does not split over its dimensions; use objective.group=site or all"
            )
        z, batch, event = latent.value, latent.q.batch_shape, latent.q.event_shape
        kl = kl_divergence(q, p) if self.kl == "analytic" or is_relaxed(q) else q.log_prob(z) - p.log_prob(z)
        # (K, *plates, N, *event) -> (K, plates, N, event) -> (K, N, plates * event); without the K where it is 1
        split = kl.expand(batch + event).reshape(num_particles, -1, batch[-1], event.numel())
        return split.transpose(1, 2).flatten(2)
