"""``inference=em`` and ``inference=variational_em``: coordinate ascent in a run's folder, watched and saved."""

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro.infer
import torch
from torch import Tensor, nn

from inference import checkpoint
from inference.ascent import HalfStep, VariationalEM
from inference.data import DataError
from inference.em import EM, EMSettings
from inference.failures import one_line, out_of_memory
from inference.log import append_row, drop_rows_after
from inference.particles import StructureError, particles, validation
from inference.settings import TrainerSettings
from inference.signals import deferred
from inference.svi import validation as validation_of
from inference.trainer import Observer
from models.tractable import check_finite

if TYPE_CHECKING:
    from inference.assemble import Setup

USED = ("validations", "checkpoint_seconds", "surgery_data", "gap_particles")  # of the trainer's settings
METHODS = ("e_step", "m_step", "expected_log_joint", "initialize")


class EMTrainer:
    """Runs an ascent by half steps to its end: a row of the log for each iteration, checkpoints, resume.

    Args:
        setup: the run's parts.
        folder: the run's directory.
        observers: who watches.
        ascent: makes an :class:`inference.em.EM` or an :class:`inference.ascent.VariationalEM` on data.
        iterations: of one start at most.
        moved: the parameters that it sets.
    """

    def __init__(
        self,
        setup: "Setup",
        folder: Path,
        observers: tuple[Observer, ...],
        ascent: Callable[[Tensor], EM | VariationalEM],
        iterations: int,
        moved: list[nn.Parameter],
    ) -> None:
        self.setup, self.folder, self.observers = setup, folder, observers
        self.settings: TrainerSettings = setup.config.section("trainer")
        self.iterations, self.moved, self._ascent = iterations, moved, ascent
        self._options = setup.config.tree()["inference"]  # a checkpoint of others is refused
        self.step, self.seconds = 0, 0.0
        self._told: dict[str, Any] = {}  # what the summary says, of a run that is only looked at
        for name, default in vars(TrainerSettings()).items():
            if name not in USED and getattr(self.settings, name) != default:
                raise ValueError(f"trainer.{name} has no part in it; accepted: inference.*, and trainer.{USED[0]}")

    @cached_property
    def x(self) -> Tensor:
        """All training data on the device; what is random in them is drawn once."""
        return self.setup.source("train").fixed()

    @cached_property
    def em(self) -> EM | VariationalEM:
        """What makes the steps."""
        return self._ascent(self.x)

    @cached_property
    def _validate(self) -> Callable[[], dict[str, float]]:
        return validation_of(self.setup)

    @property
    def programs(self) -> dict[str, nn.Module]:
        """Whatever holds parameters or state, by name."""
        return {"model": self.setup.model, "guide": self.setup.guide}

    @property
    def total_steps(self) -> int:
        """Iterations at most, of all starts; less as starts meet their tolerance."""
        return self.step + self.em.remaining

    @property
    def finished(self) -> bool:
        """Whether the last iteration was made."""
        return self.em.finished

    def check(self) -> None:
        """Score one batch under Pyro's argument checks.

        Raises:
            DataError: data that are not finite.
            StructureError: model, guide and data do not fit.
        """
        try:
            check_finite(self.x)
        except ValueError as error:
            raise DataError(f"data={self.setup.dataset.name}: {one_line(error)}") from error
        try:
            with validation(True), torch.random.fork_rng(), torch.no_grad():
                particles(self.setup.model.eval(), self.setup.guide.eval(), self.x[:2])
        except (ValueError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            raise StructureError(f"model and guide cannot score data: {one_line(error)}") from error
        finally:
            self.setup.model.train()
            self.setup.guide.train()

    def fit(self) -> None:
        """Ascend from where we are to the end.

        Raises:
            EMError: every start came to a degenerate model, or a half step lowered the bound.
            Interrupted: a signal arrived; the iteration at hand was finished and a checkpoint written.
        """
        drop_rows_after(self.folder / "metrics.jsonl", self.step)
        if self.step == 0:
            self.check()
            self.save()
        last_save = time.monotonic()
        with deferred() as pending:
            while not self.em.finished:
                self._iterate()
                if pending or time.monotonic() - last_save > self.settings.checkpoint_seconds:
                    self.save()
                    last_save = time.monotonic()
                pending.deliver(f" after iteration {self.step:,}; the checkpoint is written")
        self.save()

    def _iterate(self) -> None:
        start, began = len(self.em.ends), time.monotonic()
        steps = self.em.step()
        self.seconds += time.monotonic() - began
        self.step += 1
        for observer in self.observers:
            observer.on_step(self.step, self.total_steps)
        if len(steps) > 1:
            self._write_row(start, steps)

    def _write_row(self, start: int, steps: list[HalfStep]) -> None:
        after_e, after_m = steps[-2:]
        row: dict[str, Any] = {
            "step": self.step,
            "epoch": round(self.em.passes, 4),
            "seconds": round(self.seconds, 3),
            "start": start,
            "iteration": after_m.iteration,
            "train/after_e": after_e.free_energy,
            "train/bound": after_m.free_energy,
        }
        count = self.settings.validations
        over = self.em.finished or len(self.em.ends) > start
        if count and (over or after_m.iteration % -(-self.iterations // count) == 0):
            row.update(self._validate())
        append_row(self.folder / "metrics.jsonl", row)
        for observer in self.observers:
            observer.on_row(row)

    def save(self) -> None:
        """Write a checkpoint of everything that the rest of the run depends on."""
        tensors, state = self.em.state()
        programs = {
            f"{name}.{key}": tensor
            for name, program in self.programs.items()
            for key, tensor in program.state_dict().items()
        }
        about = {"step": self.step, "seconds": self.seconds, "options": self._options, "told": self.summary()}
        checkpoint.save(
            self.folder / "checkpoint", {**programs, **checkpoint.prefixed("em", tensors)}, {**about, "em": state}
        )

    def restore(self) -> None:
        """Continue from the checkpoint in the run's directory, exactly.

        Raises:
            CheckpointError: it is missing, damaged, or not of this configuration.
        """
        tensors, state = checkpoint.load(self.folder / "checkpoint")
        if state.get("options") != self._options:
            raise checkpoint.CheckpointError(
                f"the checkpoint is of a run with inference options {state.get('options')}, and its config.yaml now "
                f"says {self._options}; put back what was changed"
            )
        self.recall(tensors, state)
        self.em.load_state(checkpoint.under("em", tensors), state["em"])

    def recall(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take over what a checkpoint's run has come to, without going on."""
        checkpoint.load_programs(tensors, self.programs)
        self.step, self.seconds, self._told = state["step"], state["seconds"], state["told"]

    def summary(self) -> dict[str, Any]:
        """What there is to say of the training, for ``summary.json``."""
        if "em" not in self.__dict__:  # only looked at: the data were never loaded
            return self._told
        return {
            "train/steps": self.step,
            "train/epochs": round(self.em.passes, 4),
            "train/seconds": round(self.seconds, 3),
            "train/steps_per_second": round(self.step / self.seconds, 3) if self.seconds else None,
            "train/parameters": sum(parameter.numel() for parameter in self.moved),
            "train/converged": self.em.converged,
            "train/bounds": list(self.em.ends),
        }

    def note(self) -> str:
        """How it ended, in a line."""
        ends = self.em.ends
        best = ends[self.em.best_start]
        failed = f", {ends.count(None)} of them failed" if None in ends else ""
        how = "converged" if self.em.converged else "stopped at inference.iterations, not converged"
        starts = f"the best of {len(ends)} starts{failed}" if len(ends) > 1 else "one start"
        return f"fitted    bound {best:.4f} nats per datum, {how}; {starts}, {self.step} iterations"


def em(
    setup: "Setup",
    folder: Path,
    observers: tuple[Observer, ...],
    variant: str = "exact",
    iterations: int = 200,
    tolerance: float = 1e-6,
    restarts: int = 1,
    blocks: int = 10,
    inner_steps: int = 1,
    chunk: int = 0,
) -> EMTrainer:
    """Expectation maximization: closed-form E and M steps on all data; see :class:`inference.em.EMSettings`.

    Args:
        setup: the run's parts.
        folder: the run's directory.
        observers: who watches.
        variant: exact, hard, incremental or generalized.
        iterations: most pairs of E and M step of a start.
        tolerance: a gain of the bound per datum below it, over one iteration, ends a start.
        restarts: random starts, the best of which is kept.
        blocks: of the incremental variant.
        inner_steps: gradient steps of the generalized variant's M step.
        chunk: data at a time in an E step; 0 for as many as fit a cache.
    """
    model = setup.model
    if missing := [name for name in METHODS if not hasattr(model, name)]:
        from inference.catalog import CATALOG

        able = ", ".join(f"model={word}" for word, part in CATALOG["model"].items() if hasattr(part, "e_step"))
        raise ValueError(
            f"model={setup.config.words['model']} has no {missing[0]}: its posterior or its M step is not in closed "
            f"form; accepted: {able}, or inference=variational_em"
        )
    if list(setup.guide.parameters()):
        raise ValueError(
            f"it infers by the model's own posterior, and would leave guide={setup.config.words['guide']} untrained; "
            "leave out guide=..., or take inference=variational_em"
        )
    settings = EMSettings(variant, iterations, tolerance, restarts, setup.seed, blocks, inner_steps, chunk)
    moved = list(model.parameters())
    return EMTrainer(setup, folder, observers, lambda x: EM(model, x, settings), iterations, moved)


def variational_em(
    setup: "Setup",
    folder: Path,
    observers: tuple[Observer, ...],
    guide: nn.Module,
    objective: pyro.infer.ELBO,
    iterations: int = 100,
    tolerance: float = 0.0,
    e_steps: int = 10,
    m_steps: int = 10,
) -> EMTrainer:
    """Variational EM: blocks of gradient steps on all data, the guide's and the model's in turn, with a line search.

    What is random in the objective is drawn once for the whole run.

    Args:
        setup: the run's parts.
        folder: the run's directory.
        observers: who watches.
        guide: what an E half step moves.
        objective: the bound.
        iterations: most pairs of half steps.
        tolerance: a gain of the bound per datum below it, over one iteration, ends the run.
        e_steps: gradient steps of an E half step.
        m_steps: gradient steps of an M half step.
    """
    for name, least in (("iterations", 1), ("e_steps", 1), ("m_steps", 1), ("tolerance", 0)):
        if not locals()[name] >= least:
            raise ValueError(f"inference.{name} must be at least {least}, got {locals()[name]}")
    parameters = [p for p in guide.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"its E steps move the guide's parameters, and guide={setup.config.words['guide']} has none; take a guide "
            "that learns, or inference=em"
        )
    if not hasattr(objective, "differentiable_loss"):
        raise ValueError(
            f"it climbs the bound itself, with a line search, and objective={setup.config.words['objective']} has its "
            "gradient alone; use objective=trace_elbo or elbo"
        )
    programs = [p for p in (setup.model, guide, objective) if isinstance(p, nn.Module)]
    if any(callable(getattr(part, "at", None)) for program in programs for part in program.modules()):
        raise ValueError("it climbs one bound from beginning to end; leave out what is annealed")
    return EMTrainer(
        setup,
        folder,
        observers,
        lambda x: VariationalEM(setup.model, guide, objective, x, iterations, e_steps, m_steps, tolerance, setup.seed),
        iterations,
        [*parameters, *setup.model.parameters()],
    )
