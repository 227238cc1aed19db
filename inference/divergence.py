"""A training that met a number that is not finite: which step, which site."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inference import checkpoint
from inference.failures import one_line
from inference.particles import first_non_finite_site

if TYPE_CHECKING:
    from inference.trainer import Trainer


class Diverged(RuntimeError):
    """Training met a number that is not finite; the message names step and site."""


def divergence(trainer: "Trainer") -> Diverged:
    """Replay the steps since the last good checkpoint, which gives the same numbers, and look at each."""
    if not checkpoint.exists(trainer.folder / "checkpoint"):
        return Diverged("not finite before the first step: a parameter; check the data's scale and the likelihood")
    last, bad = trainer.step, None
    with trainer.randomness():
        trainer.restore()
        while trainer.step < last and not bad:
            for x in trainer.batches:
                bad = _replay(trainer, x)
                if bad or trainer.step >= last:
                    break
    return Diverged(f"not finite at step {trainer.step:,}: {bad or 'the bound'}. {advice(trainer.folder)}")


def advice(folder: Path) -> str:
    """What may help."""
    return (
        f"The last good checkpoint is kept in {folder / 'checkpoint'}; "
        "try a smaller trainer.learning_rate or trainer.gradient_clip=1"
    )


def _replay(trainer: "Trainer", x: Tensor) -> str | None:
    rng = checkpoint.rng_state()
    try:
        site = first_non_finite_site(trainer.svi.model, trainer.svi.guide, x)
        checkpoint.set_rng_state(rng)
        trainer.take_step(x)
    except torch.linalg.LinAlgError as error:
        return one_line(error)
    return site or _non_finite_parameter(trainer)


def _non_finite_parameter(trainer: "Trainer") -> str | None:
    for program_name, program in trainer.programs.items():
        for name, parameter in program.named_parameters():
            if not torch.isfinite(parameter.norm()):  # too large to be squared is as bad
                return f"gradient of {program_name} parameter '{name}'"
    return None
