"""Several remedies against posterior collapse in one objective: weight, schedule, free bits, and the aggregate held."""

from typing import Literal

from torch import Tensor

from inference.annealing import AnnealedELBO, checked_beta
from inference.free_bits import FreeBits
from inference.gradients import GradientEstimator
from inference.infovae import InfoVAE
from inference.particles import Particles


class CombinedELBO(AnnealedELBO):
    """The ELBO under any of the remedies that are objectives, at once: beta, annealing, free bits, InfoVAE.

    E_q log p(x|z) - (1 - alpha) beta w sum_j max(nats, KL_j) - (alpha + scale - 1) MMD^2, w the annealed weight; what
    is not asked for is left out, and with the defaults it is the ELBO. The floor is under the weight, as in Li et al.
    (2019), and the discrepancy is not. Each of the remedies alone: :class:`~inference.annealing.BetaELBO`,
    :class:`~inference.annealing.AnnealedELBO`, :class:`~inference.free_bits.FreeBits`,
    :class:`~inference.infovae.InfoVAE`. A lower bound on log p(x) when the weight of the KL is 1 or more and that of
    the discrepancy 0 or more.

    Args:
        beta: the weight of the KL after the warm-up.
        warmup: see :class:`~inference.annealing.AnnealedELBO`; 0 for none.
        schedule: see there.
        start: see there, as a part of beta.
        cycles: see there.
        nats: see :class:`~inference.free_bits.FreeBits`; 0 for none.
        group: see there.
        floor_of: see there.
        alpha: see :class:`~inference.infovae.InfoVAE`.
        scale: see there; ``1 - alpha`` for no discrepancy.
        kernel: see there.
        bandwidth: see there.
        particles: draws per datum.
        kl: see :class:`~inference.objectives.ELBO`.
        max_plate_nesting: see :class:`~inference.objectives.Objective`.
        gradient: see :class:`~inference.objectives.Objective`.
    """

    def __init__(
        self,
        beta: float = 1.0,
        warmup: float = 0.0,
        schedule: Literal["linear", "cyclical"] = "linear",
        start: float = 0.0,
        cycles: int = 4,
        nats: float = 0.0,
        group: Literal["dimension", "site", "all"] = "dimension",
        floor_of: Literal["batch", "datum"] = "batch",
        alpha: float = 0.0,
        scale: float = 1.0,
        kernel: Literal["rbf", "imq"] = "rbf",
        bandwidth: float = 0.0,
        particles: int = 1,
        kl: Literal["analytic", "monte_carlo"] = "monte_carlo",
        max_plate_nesting: int | None = None,
        gradient: str | GradientEstimator = "reparameterized",
    ) -> None:
        super().__init__(warmup, schedule, start, cycles, particles, kl, max_plate_nesting, gradient)
        self.beta, self.alpha, self.scale = checked_beta(beta), alpha, scale
        self.kl_weight.fill_(beta)  # until it is told how far the run is
        free = FreeBits(nats, group, floor_of, kl=kl if nats else "analytic")
        held = InfoVAE(alpha, scale, kernel, bandwidth)
        self.free = free if nats else None
        self.held = held if alpha + scale != 1 else None

    @property
    def local(self) -> bool:  # type: ignore[override]
        return self.held is None and (self.free is None or self.free.local)

    @property
    def log_q_is_sampled(self) -> bool:  # type: ignore[override]
        return super().log_q_is_sampled if self.free is None else self.free.log_q_is_sampled

    @property
    def needs_density(self) -> bool:
        return super().needs_density if self.free is None else self.free.needs_density

    def weight_at(self, progress: float) -> float:
        return self.beta * super().weight_at(progress)

    def divergence(self, draws: Particles) -> Tensor:
        return super().divergence(draws) if self.free is None else self.free.divergence(draws)

    def contribution(self, draws: Particles) -> Tensor:
        return draws.log_likelihood - (1 - self.alpha) * self.kl_weight * self.divergence(draws)

    def from_particles(self, draws: Particles) -> Tensor:
        bound = super().from_particles(draws)
        if self.held is None:
            return bound
        return bound - (self.alpha + self.scale - 1) * self.held.discrepancy(draws)
