"""The training loop: steps, schedules, log, validation, checkpoints, resume."""

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import pyro
import torch
from torch import Tensor, nn

from inference import checkpoint
from inference.data import Batches, DataError
from inference.divergence import Diverged, advice, divergence
from inference.engine import SVI
from inference.failures import one_line, out_of_memory
from inference.log import append_row, drop_rows_after
from inference.parameters import in_modules
from inference.particles import StructureError, first_non_finite_site, validation
from inference.schedules import SCHEDULES
from inference.settings import TrainerSettings
from inference.signals import Pending, deferred

DEFAULT_STEPS = 15_000


class Observer(Protocol):
    """Somebody who watches a run."""

    def on_step(self, step: int, total: int) -> None:
        """Called after each step."""

    def on_row(self, row: dict[str, Any]) -> None:
        """Called with each row of ``metrics.jsonl``."""


class Trainer:
    """Fits a model and a guide by stochastic variational inference.

    Args:
        svi: what takes a step.
        batches: where data come from.
        settings: how long and how.
        folder: the run's directory; ``metrics.jsonl`` and ``checkpoint/`` are kept in it.
        validate: scores the validation set, metric names to values; the random numbers it uses are not the training's.
        observers: who watches.
    """

    def __init__(
        self,
        svi: SVI,
        batches: Batches,
        settings: TrainerSettings,
        folder: Path,
        validate: Callable[[], dict[str, float]] | None = None,
        observers: tuple[Observer, ...] = (),
    ) -> None:
        self.svi, self.batches, self.settings, self.folder = svi, batches, settings, folder
        self.validate, self.observers = validate, observers
        self.step = 0
        self.seconds = 0.0
        self.total_steps = settings.steps or settings.epochs * len(batches) or DEFAULT_STEPS
        # bounds per datum since the last row of the log, kept on the device; zeros hold the places still to come
        size = min(settings.log_every, self.total_steps)
        self.window = torch.zeros(size, device=batches.source.device, dtype=torch.float64)
        self._checked = False
        self._clock = time.monotonic()
        self._schedule = SCHEDULES[settings.schedule]
        self.steps_per_call = settings.steps_per_call
        # surroundings in which the default generators are this run's, where it shares them with others
        self.randomness: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def finished(self) -> bool:
        """Whether the last step was taken."""
        return self.step >= self.total_steps

    @property
    def programs(self) -> dict[str, nn.Module]:
        """Whatever holds parameters or state, by name: model, guide, and an objective of ours."""
        programs = {"model": self.svi.model, "guide": self.svi.guide, "objective": self.svi.objective}
        return {name: program for name, program in programs.items() if isinstance(program, nn.Module)}

    @in_modules()
    def fit(self) -> None:
        """Train from where we are to the last step.

        Raises:
            Diverged: a loss or a parameter was not finite; the last good checkpoint is kept.
            Interrupted: SIGTERM or SIGINT arrived; the step at hand was finished and a checkpoint written.
        """
        self.begin()
        with deferred() as pending, watched(), suppress(StopIteration):
            course, losses = self.course(pending), None
            while True:
                losses = self._take(course.send(losses))

    def begin(self) -> None:
        """What comes before the first step: a check, a checkpoint."""
        drop_rows_after(self.folder / "metrics.jsonl", self.step)
        if self.step == 0:
            self.check()
            self.save()

    def course(self, pending: Pending) -> Generator[list[Tensor], Tensor | None, None]:
        """The training but for its steps, in :func:`watched` surroundings.

        Gives the batches of the next steps, and is sent their losses in nats once somebody has taken them, having
        called :meth:`prepare` before each.
        """
        self._clock = last_save = time.monotonic()
        while self.step < self.total_steps:
            for xs in self._calls():
                losses = yield xs
                assert losses is not None
                self._note(xs, losses)
                self._log()
                if pending or time.monotonic() - last_save > self.settings.checkpoint_seconds:
                    self.save()
                    last_save = self._clock = time.monotonic()
                pending.deliver(f" after step {self.step:,}; the checkpoint is written")
                if self.step >= self.total_steps:
                    break
        self.save()

    def _calls(self) -> Iterator[list[Tensor]]:
        """The rest of an epoch, in as many batches at a time as one call of the engine takes.

        Calls end at the same steps whether a run was interrupted or not, and where a row of the log is due.
        """
        some: list[Tensor] = []
        for x in self.batches:
            some.append(x)
            step = self.step + len(some)
            if step % self.steps_per_call == 0 or self._is_row(step):
                yield some
                some = []
        if some:
            yield some

    @in_modules()
    def check(self) -> None:
        """Score one batch under Pyro's argument checks, which cost a sync each and are off in the steps.

        Raises:
            StructureError: model, guide, objective and data do not fit, or parameters are where no checkpoint looks.
            Diverged: the bound is not finite.
        """
        if self._checked:
            return
        self._checked = True
        state = self.batches.state_dict()
        x = next(iter(self.batches))
        self.batches.load_state_dict(state)
        with torch.random.fork_rng(), torch.no_grad(), _own_watch():
            loss = self._checked_loss(x)
        if names := list(pyro.get_param_store().keys()):
            raise StructureError(
                f"pyro.param sites {names[:3]} live in Pyro's global store, which checkpoints do not hold; "
                "make them PyroParam attributes of a PyroModule"
            )
        if not math.isfinite(loss):
            site = first_non_finite_site(self.svi.model, self.svi.guide, x) or "the bound"
            raise Diverged(f"not finite before the first step: {site}; check the data's scale and the likelihood")

    def _checked_loss(self, x: Tensor) -> float:
        try:
            with validation(True):
                return float(self.svi.loss(self.svi.model, self.svi.guide, x))
        except StructureError as error:
            raise StructureError(one_line(error)) from error
        except (ValueError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            raise StructureError(f"model and guide cannot score a batch: {one_line(error)}") from error

    def _take(self, xs: list[Tensor]) -> Tensor:
        try:
            return self.svi.steps(xs, self.prepare)
        except torch.linalg.LinAlgError as error:
            self._check_finite()  # if what it could not decompose was not finite, there is more to say
            raise Diverged(f"step {self.step + 1:,} failed: {one_line(error)}. {advice(self.folder)}") from error

    def prepare(self, i: int) -> None:
        """Set the learning rate, weights and temperatures of the step that comes after ``i`` more."""
        progress = (self.step + i) / self.total_steps
        self.svi.optim.set_learning_rate(self.settings.learning_rate * self._schedule(progress))
        last = max(self.total_steps - 1, 1)  # what is annealed is at its end in the last step, not after it
        self.svi.at(min((self.step + i + (self.total_steps == 1)) / last, 1.0))

    def take_step(self, x: Tensor) -> None:
        """One step on a batch."""
        self._note([x], self.svi.steps([x], self.prepare))

    def _note(self, xs: list[Tensor], losses: Tensor) -> None:
        for x, loss in zip(xs, losses, strict=True):
            self.window[self.step % self.settings.log_every] = -loss / x.shape[0]
            self.step += 1

    def save(self) -> None:
        """Write a checkpoint of everything that the rest of the run depends on."""
        self._check_finite()
        batches = self.batches.state_dict()
        with self.randomness():
            noise = checkpoint.rng_state()
        tensors = {
            **{
                f"{name}.{key}": tensor
                for name, program in self.programs.items()
                for key, tensor in program.state_dict().items()
            },
            **checkpoint.prefixed("optimizer", self.svi.optim.tensors()),
            **checkpoint.prefixed("svi", self.svi.state_dict()),
            **checkpoint.prefixed("rng", noise),
            **checkpoint.prefixed("batches", {k: v for k, v in batches.items() if isinstance(v, Tensor)}),
            "window": self.window,
        }
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "log_every": self.settings.log_every,
            "optimizer": type(self.svi.optim.optimizer).__name__,
            "batches": {k: v for k, v in batches.items() if not isinstance(v, Tensor)},
        }
        checkpoint.save(self.folder / "checkpoint", tensors, state)

    def restore(self) -> None:
        """Continue from the checkpoint in the run's directory, exactly.

        Raises:
            CheckpointError: it is missing, damaged, or its shapes are not those of this model and guide.
        """
        tensors, state = checkpoint.load(self.folder / "checkpoint")
        self._check_origin(state)
        checkpoint.load_programs(tensors, self.programs)
        self.svi.optim.load_tensors(checkpoint.under("optimizer", tensors))
        self.svi.load_state_dict(checkpoint.under("svi", tensors))
        try:
            self.batches.load_state_dict({**state["batches"], **checkpoint.under("batches", tensors)})
        except DataError as error:
            raise checkpoint.CheckpointError(f"{error}; put back what was changed in config.yaml") from None
        size = min(len(self.window), len(tensors["window"]))  # other than ours where the run was made longer
        self.window[:size] = tensors["window"][:size]
        self.step, self.seconds = state["step"], state["seconds"]
        checkpoint.set_rng_state(checkpoint.under("rng", tensors))

    def recall(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take over what a checkpoint's run has come to, without going on."""
        checkpoint.load_programs(tensors, self.programs)
        self.svi.load_state_dict(checkpoint.under("svi", tensors))
        self.step, self.seconds = state["step"], state["seconds"]

    def summary(self) -> dict[str, Any]:
        """What there is to say of the training, for ``summary.json``."""
        return {
            "train/steps": self.step,
            "train/epochs": round(self.step / len(self.batches), 4),
            "train/seconds": round(self.seconds, 3),
            "train/steps_per_second": round(self.step / self.seconds, 3) if self.seconds else None,
            "train/parameters": sum(parameter.numel() for parameter in self.svi.optim.parameters),
            **self.svi.about(),
        }

    def note(self) -> str:
        """How it ended, in a line; nothing where the rows of the log say it."""
        return ""

    def _check_origin(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint that this configuration cannot have written: to go on from it would say nothing."""
        wanted = {"log_every": self.settings.log_every, "optimizer": type(self.svi.optim.optimizer).__name__}
        for name, value in wanted.items():
            if state[name] != value:
                raise checkpoint.CheckpointError(
                    f"the checkpoint is of a run with {name} {state[name]}, and its config.yaml now says {value}; "
                    "put back what was changed"
                )
        if state["step"] > self.total_steps:
            raise checkpoint.CheckpointError(
                f"the checkpoint is at step {state['step']:,}, past the {self.total_steps:,} of config.yaml; "
                "put back what was changed"
            )

    def _log(self) -> None:
        for observer in self.observers:
            observer.on_step(self.step, self.total_steps)
        if self._is_row(self.step):
            self._write_row(validate=self._is_validation(self.step))

    def _is_row(self, step: int) -> bool:
        """Whether a row of the log is written after a step."""
        return step % self.settings.log_every == 0 or step == self.total_steps or self._is_validation(step)

    def _is_validation(self, step: int) -> bool:
        every = -(-self.total_steps // self.settings.validations) if self.settings.validations else 0
        return bool(every) and (step % every == 0 or step == self.total_steps)

    def _write_row(self, validate: bool) -> None:
        self._check_finite()
        filled = self.step % self.settings.log_every or self.settings.log_every
        bound = float(self.window[:filled].mean())
        now = time.monotonic()  # after the wait for the device, before the validation
        self.seconds += now - self._clock
        row: dict[str, Any] = {
            "step": self.step,
            "epoch": round(self.step / len(self.batches), 4),
            "seconds": round(self.seconds, 3),
            "train/bound": bound,
            **self.svi.info(),
        }
        if validate and self.validate is not None:
            row.update(self.validate())
        for name, value in row.items():
            if not math.isfinite(value):
                raise Diverged(f"not finite at step {self.step:,}: {name}. {advice(self.folder)}")
        append_row(self.folder / "metrics.jsonl", row)
        for observer in self.observers:
            observer.on_row(row)
        self._clock = time.monotonic()

    def _check_finite(self) -> None:
        """One wait for the device: nothing that is not finite is logged or saved as if it were good."""
        norms = torch._foreach_norm([parameter.detach() for parameter in self.svi.optim.parameters])
        total = torch.stack(norms).sum() + self.window.to(norms[0].dtype).sum()
        if not bool(torch.isfinite(total)):
            raise divergence(self)


@contextmanager
def watched() -> Iterator[None]:
    """The surroundings of steps: argument checks, each of which would wait for the device, are off."""
    with validation(False), _own_watch():
        yield


@contextmanager
def _own_watch() -> Iterator[None]:
    """Without Pyro's warnings of NaN: the trainer watches for itself, and stops."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered ", UserWarning)
        yield
