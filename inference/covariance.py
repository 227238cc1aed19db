"""The gradient of expectations under tempered posteriors, without reparameterization."""

from typing import Protocol, cast

from torch import Tensor

from inference.gradients import Bound, Draw, GradientEstimator, expect_density, expect_score_identity, with_gradient
from inference.particles import Particles
from inference.structure import StructureError


class Tempered(Protocol):
    """A sum over inverse temperatures b of ``widths`` times the mean log-weight under pi_b, about q^(1-b) p^b."""

    temperatures: Tensor  # (P,) inverse temperatures, from 0 to 1
    widths: Tensor  # (P,)

    def tempered(self, log_weight: Tensor) -> Tensor: ...


class Covariance(GradientEstimator):
    """Gradient of a tempered expectation as a mean and a covariance (Masrani et al. 2019, section 4).

    Of E_pi[f] it is E_pi[grad f] + Cov_pi[grad log pi, f], each estimated with the same normalized weights. Needs no
    gradient through the draws, so that they can be discrete. Consistent as the number of particles grows, like the
    weights; for few it is the gradient of no expectation.
    """

    name = "covariance"

    def check(self, objective: Bound) -> None:
        if not hasattr(objective, "tempered"):
            raise StructureError(
                f"gradient=covariance is that of tempered expectations, such as objective=tvo; "
                f"{type(objective).__name__} is none: use gradient=reparameterized, or loo or vimco for discrete "
                "latents"
            )
        if objective.num_particles < 2:
            raise StructureError(
                "gradient=covariance needs objective.particles=2 or more: with one there is nothing to vary with, and "
                "the guide would follow noise alone; with one particle use gradient=reparameterized or score"
            )

    def estimate(self, objective: Bound, draw: Draw, x: Tensor) -> tuple[Tensor, Particles]:
        draws = draw(detach_draws=True)
        expect_density(draws, f"gradient={self.name}")
        expect_score_identity(draws, self.name)
        tempered = cast(Tempered, objective)
        log_weight = draws.log_weight
        weights = tempered.tempered(log_weight.detach())  # (P, K, N)
        centred = log_weight - (weights * log_weight).sum(1, keepdim=True)
        log_pi = draws.log_q + _along(tempered.temperatures) * log_weight
        terms = weights * log_weight + (weights * centred).detach() * log_pi
        surrogate = (_along(tempered.widths) * terms).sum((0, 1))
        return with_gradient(objective.from_particles(draws), surrogate), draws


def _along(values: Tensor) -> Tensor:
    """(P,) -> (P, 1, 1), to meet particles and data."""
    return values[:, None, None]
