"""Reweighted wake-sleep: the model follows the importance-weighted bound, the guide the posterior."""

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from inference.gradients import (
    Draw,
    PathScaling,
    expect_own_targets,
    expect_reparameterized,
    expect_score_identity,
    with_gradient,
)
from inference.objectives import GRADIENTS, IWAE
from inference.particles import Particles, Program, dream
from inference.structure import StructureError


class WakeSleep(IWAE):
    """Reweighted wake-sleep: a bound for the model, the posterior for the guide (Bornschein and Bengio 2015).

    Its value is the importance-weighted bound, and its gradient in the model that bound's. The guide follows another
    target, the mean of log q(z|x) under the posterior, which draws and weights of the wake phase stand for, or under
    the model's own latents and data in the sleep phase. With more particles both get better, while the gradient
    of the bound in the guide vanishes. Latents may be discrete. A parameter that both programs read has no one target;
    such pairs are refused.

    Args:
        particles: K.
        phase: where the guide learns: ``"wake"``, ``"sleep"``, or ``"both"`` for the mean of the two.
        max_plate_nesting: see :class:`~inference.objectives.Objective`.
        gradient: ``"weighted"``, the paper's, or ``"dreg"``, the wake phase doubly reparameterized (Tucker et al.
            2019).
    """

    def __init__(
        self,
        particles: int = 50,
        phase: Literal["wake", "sleep", "both"] = "wake",
        max_plate_nesting: int | None = None,
        gradient: str = "weighted",
    ) -> None:
        super().__init__(particles, max_plate_nesting)
        if phase not in ("wake", "sleep", "both"):
            raise ValueError(f"phase must be 'wake', 'sleep' or 'both', got {phase!r}")
        if phase != "sleep" and particles < 2:
            raise ValueError(
                "the wake phase needs 2 particles or more: the normalized weight of a single one says nothing"
            )
        _check_gradient(gradient, phase)
        self.phase, self.doubly_reparameterized = phase, gradient == "dreg"

    def estimate(self, model: Program, guide: Program, *args: Any, **kw: Any) -> tuple[Tensor, Particles]:
        draw = self.drawing(model, guide, *args, **kw)
        expect_own_targets(draw, "wake-sleep", "use objective=iwae or tvo", (model, guide))
        if self.doubly_reparameterized:
            return self._doubly_reparameterized(draw)
        draws = draw(detach_draws=True)
        self.check_draws(draws)
        expect_score_identity(draws, "weighted")
        for_model = self.from_particles(replace(draws, log_q=draws.log_q.detach()))
        return with_gradient(for_model, for_model + self._for_guide(draws, model, guide, *args, **kw)), draws

    def _for_guide(self, draws: Particles, model: Program, guide: Program, *args: Any, **kw: Any) -> Tensor:
        wake = (draws.log_weight.detach().softmax(0) * draws.log_q).sum(0)
        if self.phase == "wake":
            return wake
        x, *rest = args
        if x.shape[0] != draws.log_q.shape[1]:
            raise StructureError(
                "the sleep phase dreams as many data as it is given: subsample them before, not inside"
            )
        sleep = dream(model, guide, x, *rest, **kw)
        return sleep if self.phase == "sleep" else 0.5 * (wake + sleep)

    def _doubly_reparameterized(self, draw: Draw) -> tuple[Tensor, Particles]:
        scaling = PathScaling()
        draws = draw(detach_guide=True, through=scaling)
        expect_reparameterized(draws, "doubly reparameterized wake-sleep")
        self.check_draws(draws)
        expect_score_identity(draws, "doubly reparameterized wake-sleep")
        # The mean of w times the score is that of dw/dz = w (1 - w) dlog w/dz along the path; the bound itself has w.
        scaling.factor = 1 - draws.log_weight.detach().softmax(0)
        return self.from_particles(draws), draws


def _check_gradient(gradient: str, phase: str) -> None:
    if gradient in ("weighted", "dreg") and not (gradient == "dreg" and phase != "wake"):
        return
    if gradient == "dreg":
        raise StructureError(f"gradient=dreg is about the wake phase; with phase={phase} use gradient=weighted")
    if gradient in GRADIENTS:
        raise StructureError(
            f"wake-sleep follows two targets, and gradient={gradient} is that of one bound; use gradient=weighted, or "
            "dreg for phase=wake"
        )
    raise ValueError(f"gradient must be 'weighted' or 'dreg', got {gradient!r}")
