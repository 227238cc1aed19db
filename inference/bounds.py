"""Bounds beside the ELBO and the importance-weighted one: each another way to combine the log-weights."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from inference.frozen import expect_constant, held, owner_of
from inference.gradients import GradientEstimator, expect_own_targets, with_gradient
from inference.objectives import IWAE, Objective, log_mean_exp
from inference.particles import Particles, Program
from inference.structure import StructureError


class Renyi(Objective):
    """The variational Rényi bound, (1/(1-alpha)) log (1/K) sum_k w_k^(1-alpha) (Li and Turner 2016).

    alpha = 1 is the ELBO, alpha = 0 the importance-weighted bound; it falls as alpha rises. Of its limit with many
    particles, a lower bound on log p(x) for alpha >= 0 and an upper one for alpha <= 0; of any finite number, it is a
    lower bound for alpha >= 0, and for alpha < 0 neither. At alpha = -inf it is the largest log-weight (VR-max).

    Args:
        alpha: the order; from -inf, the largest log-weight, to inf, the smallest.
        particles: K.
        max_plate_nesting: see :class:`Objective`.
        gradient: see :class:`Objective`.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        particles: int = 50,
        max_plate_nesting: int | None = None,
        gradient: str | GradientEstimator = "reparameterized",
    ) -> None:
        super().__init__(particles, max_plate_nesting, gradient)
        if math.isnan(alpha):
            raise ValueError("alpha must be a number, or -inf for the largest log-weight, got nan")
        self.alpha = alpha

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.num_particles == 1 or self.alpha == 1

    def combine(self, contributions: Tensor) -> Tensor:
        if math.isinf(self.alpha):
            return contributions.amax(0) if self.alpha < 0 else contributions.amin(0)
        if self.alpha == 1:
            return contributions.mean(0)
        return log_mean_exp((1 - self.alpha) * contributions) / (1 - self.alpha)

    def double_reparameterization(self, contributions: Tensor) -> Tensor:
        if self.linear or math.isinf(self.alpha):  # the derivative of a maximum in a log-weight jumps
            return super().double_reparameterization(contributions)
        return self.alpha + (1 - self.alpha) * ((1 - self.alpha) * contributions).softmax(0)


class MIWAE(Objective):
    """The mean of M importance-weighted bounds of K draws each (Rainforth et al. 2018, section 5).

    With more draws in each the bound is tighter, and the gradient of the guide drowns in noise; with more groups
    that noise is averaged out.

    Args:
        particles: M K, all draws for a datum.
        groups: M.
        max_plate_nesting: see :class:`Objective`.
        gradient: see :class:`Objective`.
    """

    def __init__(
        self,
        particles: int = 64,
        groups: int = 8,
        max_plate_nesting: int | None = None,
        gradient: str | GradientEstimator = "reparameterized",
    ) -> None:
        super().__init__(particles, max_plate_nesting, gradient)
        if groups < 1 or particles % groups:
            raise ValueError(f"groups must divide the {particles} particles into equal parts, got {groups}")
        self.groups = groups

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.groups == self.num_particles

    def combine(self, contributions: Tensor) -> Tensor:
        return log_mean_exp(self._grouped(contributions)).mean(0)

    def double_reparameterization(self, contributions: Tensor) -> Tensor:
        return self._grouped(contributions).softmax(0).reshape(contributions.shape)

    def _grouped(self, contributions: Tensor) -> Tensor:
        """(K M, *rest) -> (K, M, *rest)."""
        return contributions.unflatten(0, (-1, self.groups))


class CIWAE(Objective):
    """A convex combination of the ELBO and the importance-weighted bound (Rainforth et al. 2018, section 5).

    Args:
        weight: of the ELBO, from 0 (the importance-weighted bound) to 1 (the ELBO); the paper's beta.
        particles: K, the draws that both share.
        max_plate_nesting: see :class:`Objective`.
        gradient: see :class:`Objective`.
    """

    def __init__(
        self,
        weight: float = 0.5,
        particles: int = 64,
        max_plate_nesting: int | None = None,
        gradient: str | GradientEstimator = "reparameterized",
    ) -> None:
        super().__init__(particles, max_plate_nesting, gradient)
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must lie in [0, 1], got {weight}")
        self.weight = weight

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.num_particles == 1 or self.weight == 1

    def combine(self, contributions: Tensor) -> Tensor:
        return self.weight * contributions.mean(0) + (1 - self.weight) * log_mean_exp(contributions)

    def double_reparameterization(self, contributions: Tensor) -> Tensor:
        normalized = contributions.softmax(0)
        share = self.weight / contributions.shape[0]
        # The derivative in a log-weight can underflow where the ELBO has no part in it; so does what it divides.
        derivative = (share + (1 - self.weight) * normalized).clamp(min=torch.finfo(normalized.dtype).tiny)
        return (share + (1 - self.weight) * normalized.square()) / derivative


class PIWAE(IWAE):
    """The importance-weighted bound for the model, MIWAE for the guide (Rainforth et al. 2018, section 5).

    Its value is the former. Two targets, so not the gradient of any one bound, and none for a parameter that both
    programs read: those are refused. The draws for the two are separate.

    Args:
        particles: M K, all draws for a datum.
        groups: M, the number of groups in the guide's target.
        max_plate_nesting: see :class:`Objective`.
        gradient: of the guide's target; see :class:`Objective`.
    """

    def __init__(
        self,
        particles: int = 64,
        groups: int = 8,
        max_plate_nesting: int | None = None,
        gradient: str | GradientEstimator = "reparameterized",
    ) -> None:
        super().__init__(particles, max_plate_nesting)
        self.guide_target = MIWAE(particles, groups, max_plate_nesting, gradient)
        self.gradient = self.guide_target.gradient

    def prepare(self, event_shape: Sequence[int], latent_shape: Sequence[int] | None = None) -> None:
        self.guide_target.prepare(event_shape, latent_shape)

    def estimate(self, model: Program, guide: Program, *args: Any, **kw: Any) -> tuple[Tensor, Particles]:
        self._check_programs(model, guide, *args, **kw)
        drawing = self.drawing(model, guide, *args, **kw)
        expect_own_targets(drawing, "PIWAE", "use objective=miwae, ciwae or iwae", (model, guide))
        for_guide = held(model, lambda program: self.guide_target.bound(program, guide, *args, **kw), "model")
        draws = drawing(detach_draws=True)
        self.check_draws(draws)
        for_model = self.from_particles(replace(draws, log_q=draws.log_q.detach()))
        return with_gradient(for_model, for_model + for_guide), draws

    def _check_programs(self, model: Program, guide: Program, *args: Any, **kw: Any) -> None:
        if owner_of(model) is not None and owner_of(model) is owner_of(guide):
            raise StructureError(
                "PIWAE holds the parameters of the model constant while the guide follows its own target, and these "
                "programs are methods of one module; make them two modules"
            )
        if owner_of(model) is None and is_validation_enabled():
            with torch.random.fork_rng():
                log_joint = held(model, lambda program: self._log_joint(program, guide, *args, **kw), "model")
            expect_constant(log_joint, "model")

    def _log_joint(self, model: Program, guide: Program, *args: Any, **kw: Any) -> Tensor:
        draws = self.drawing(model, guide, *args, **kw)(detach_draws=True)
        return draws.log_likelihood + draws.log_prior
