"""``inference=svi``: a trainer of model and guide by stochastic gradients."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyro.infer
from torch import nn

from inference.data import Batches
from inference.engine import SVI, OptimizerFactory, SharedOptimizer
from inference.evaluate import held_out, validation_scores
from inference.trainer import Observer, Trainer

if TYPE_CHECKING:
    from inference.assemble import Setup

VALIDATION_DATA = 1000  # validation data scored along the training


def svi(
    setup: "Setup",
    folder: Path,
    observers: tuple[Observer, ...],
    guide: nn.Module,
    objective: pyro.infer.ELBO,
    optimizer: OptimizerFactory,
) -> Trainer:
    """Stochastic variational inference: gradient steps on batches, model and guide together."""
    settings = setup.config.section("trainer")
    engine = _engine(settings.engine, setup.config.section("batching").batch_size, settings.steps_per_call)
    return trainer_of(setup, folder, observers, guide, objective, optimizer, engine)


def trainer_of(
    setup: "Setup",
    folder: Path,
    observers: tuple[Observer, ...],
    guide: nn.Module,
    objective: pyro.infer.ELBO,
    optimizer: OptimizerFactory,
    engine: Callable[..., SVI],
) -> Trainer:
    """A trainer whose steps ``engine(model, guide, optimizer, objective)`` takes."""
    settings = setup.config.section("trainer")
    parts = [setup.model, guide, objective]
    programs = nn.ModuleList(p for p in parts if isinstance(p, nn.Module))  # shared parameters count once
    clip = settings.gradient_clip or None
    speeds = objective.speeds(programs) if hasattr(objective, "speeds") else {}
    shared = SharedOptimizer(programs.parameters(), optimizer, settings.learning_rate, clip, speeds)
    batches = Batches(setup.source("train"), setup.config.section("batching").batch_size, setup.seed)
    return Trainer(
        engine(setup.model, guide, shared, objective), batches, settings, folder, validation(setup), observers
    )


def validation(setup: "Setup") -> Callable[[], dict[str, float]]:
    """Scores validation data, the same each time."""
    settings = setup.config.section("trainer")
    valid, _ = held_out(setup.source("valid"), VALIDATION_DATA, setup.seed)
    return lambda: validation_scores(
        setup.model, setup.guide, valid, setup.seed, settings.surgery_data, settings.gap_particles
    )


def _engine(name: str, batch_size: int, steps_per_call: int) -> Callable[..., SVI]:
    if name == "eager":
        return SVI
    from inference.compiled import CompiledSVI

    return partial(CompiledSVI, batch_size=batch_size, steps_per_call=steps_per_call)
