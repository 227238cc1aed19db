"""The ELBO with its KL under a weight, fixed or annealed."""

import math
from typing import Literal

import torch
from torch import Tensor

from inference.gradients import GradientEstimator
from inference.objectives import ELBO
from inference.particles import Particles


class WeightedELBO(ELBO):
    """E_q log p(x|z) - w KL(q(z|x) || p(z)), the base of those with a weight w.

    Below weight 1 it is not a bound on log p(x): at q = p(z|x) it is log p(x) + (1 - w) KL(q || p(z)). Above 1 it is
    one, the looser the larger.
    """

    kl_weight: Tensor  # (), on the device and changed in place, so that a compiled step sees it change

    def __init__(
        self,
        kl_weight: float,
        particles: int = 1,
        kl: Literal["analytic", "monte_carlo"] = "monte_carlo",
        max_plate_nesting: int | None = None,
        gradient: str | GradientEstimator = "reparameterized",
    ) -> None:
        super().__init__(particles, kl, max_plate_nesting, gradient)
        self.register_buffer("kl_weight", torch.tensor(float(kl_weight)), persistent=False)

    def contribution(self, draws: Particles) -> Tensor:
        return draws.log_likelihood - self.kl_weight * self.divergence(draws)


def checked_beta(beta: float) -> float:
    """A weight of the KL that can be."""
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be 0 or above and finite, got {beta}")
    return beta


class BetaELBO(WeightedELBO):
    """The beta-VAE objective, the KL times beta (Higgins et al. 2017).

    A bound on log p(x) for beta >= 1. Below 1 it is none, and can exceed log p(x). With a Gaussian likelihood of fixed
    standard deviation s it is beta times the ELBO with s sqrt(beta), plus a constant: the same decoder and guide.

    Args:
        beta: the weight of the KL, 0 or above.
        particles: draws per datum.
        kl: see :class:`~inference.objectives.ELBO`.
        max_plate_nesting: see :class:`~inference.objectives.Objective`.
        gradient: see :class:`~inference.objectives.Objective`.
    """

    def __init__(
        self,
        beta: float = 4.0,
        particles: int = 1,
        kl: Literal["analytic", "monte_carlo"] = "monte_carlo",
        max_plate_nesting: int | None = None,
        gradient: str | GradientEstimator = "reparameterized",
    ) -> None:
        super().__init__(checked_beta(beta), particles, kl, max_plate_nesting, gradient)


class AnnealedELBO(WeightedELBO):
    """The ELBO, its KL's weight raised to 1 during a warm-up (Bowman et al. 2016; in cycles, Fu et al. 2019).

    From the end of the warm-up on, which is the last step at the latest, the weight is exactly 1 and the objective the
    ELBO; before, it is not a bound on log p(x). The log of a run says which: each row has ``train/kl_weight``. Outside
    of a run, say how far it is by :meth:`at`; until told, it is the ELBO.

    Args:
        warmup: the part of the run that the weight takes to reach 1 for good, from 0 to 1.
        schedule: ``"linear"`` rises once; ``"cyclical"`` starts anew in each cycle, and rises in its first half.
        start: the weight at the start of each rise.
        cycles: their number within the warm-up, for ``"cyclical"``.
        particles: draws per datum.
        kl: see :class:`~inference.objectives.ELBO`.
        max_plate_nesting: see :class:`~inference.objectives.Objective`.
        gradient: see :class:`~inference.objectives.Objective`.
    """

    def __init__(
        self,
        warmup: float = 0.5,
        schedule: Literal["linear", "cyclical"] = "linear",
        start: float = 0.0,
        cycles: int = 4,
        particles: int = 1,
        kl: Literal["analytic", "monte_carlo"] = "monte_carlo",
        max_plate_nesting: int | None = None,
        gradient: str | GradientEstimator = "reparameterized",
    ) -> None:
        if schedule not in ("linear", "cyclical"):
            raise ValueError(f"schedule must be 'linear' or 'cyclical', got {schedule!r}")
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup is a part of the run, from 0 to 1, got {warmup}")
        if not 0 <= start <= 1:
            raise ValueError(f"start must lie in [0, 1], got {start}")
        if cycles < 1:
            raise ValueError(f"cycles must be at least 1, got {cycles}")
        super().__init__(1.0, particles, kl, max_plate_nesting, gradient)
        self.warmup, self.schedule, self.start, self.cycles = warmup, schedule, start, cycles

    def at(self, progress: float) -> None:
        self.kl_weight.fill_(self.weight_at(progress))

    def weight_at(self, progress: float) -> float:
        """The weight of the KL when ``progress`` of the run, from 0 to 1, is done."""
        if progress >= self.warmup:
            return 1.0
        rise = progress / self.warmup
        if self.schedule == "cyclical":
            rise = min(2 * (rise * self.cycles % 1), 1.0)
        return self.start + (1 - self.start) * rise

    def info(self) -> dict[str, float]:
        return {"train/kl_weight": float(self.kl_weight)}
