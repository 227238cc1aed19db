"""The training loop: steps, schedules, log, validation, checkpoints, resume."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyro
import torch
from torch import Tensor, nn

from inference import checkpoint
from inference.data import Batches
from inference.engine import SVI
from inference.particles import first_non_finite_site, validation
from inference.schedules import SCHEDULES


class Diverged(RuntimeError):
    """Training met a number that is not finite; the message names step and site."""


class Interrupted(RuntimeError):
    """A signal stopped the training after the step at hand; everything is saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step:,}; the checkpoint is written")
        self.signum = signum


class Observer(Protocol):
    """Somebody who watches a run."""

    def on_step(self, step: int, total: int) -> None:
        """Called after each step."""

    def on_row(self, row: dict[str, Any]) -> None:
        """Called with each row of ``metrics.jsonl``."""


@dataclass
class TrainerSettings:
    """How long and how to train.

    Args:
        epochs: passes over the training data.
        steps: number of optimization steps; 0 leaves it to ``epochs``.
        learning_rate: step size at the start.
        schedule: how it changes: constant, linear, cosine or burda.
        gradient_clip: largest gradient norm per datum; 0 for no limit.
        log_every: steps between rows of the log, each of which waits once for the device.
        validations: how many times the validation set is scored over the run.
        checkpoint_seconds: seconds between checkpoints.
    """

    epochs: int = 100
    steps: int = 0
    learning_rate: float = 1e-3
    schedule: str = "constant"
    gradient_clip: float = 0.0
    log_every: int = 50
    validations: int = 20
    checkpoint_seconds: float = 20.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"trainer.schedule: {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        for name in ("epochs", "log_every", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"trainer.{name}: {getattr(self, name)} is not above 0")
        for name in ("steps", "gradient_clip", "validations", "checkpoint_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"trainer.{name}: {getattr(self, name)} is below 0")


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
        self.total_steps = settings.steps or settings.epochs * len(batches)
        # bounds per datum since the last row of the log, kept on the device; zeros hold the places still to come
        self.window = torch.zeros(settings.log_every, device=batches.source.device, dtype=torch.float64)
        self._clock = time.monotonic()
        self._schedule = SCHEDULES[settings.schedule]

    @property
    def programs(self) -> dict[str, nn.Module]:
        """Model and guide, by name."""
        return {"model": self.svi.model, "guide": self.svi.guide}

    def fit(self) -> None:
        """Train from where we are to the last step.

        Raises:
            Diverged: a loss or a parameter was not finite; the last good checkpoint is kept.
            Interrupted: SIGTERM or SIGINT arrived; the step at hand was finished and a checkpoint written.
        """
        _drop_rows_after(self.folder / "metrics.jsonl", self.step)
        if self.step == 0:
            self._check_first_batch()
            self.save()
        last_save = time.monotonic()
        with _deferred_signals() as received, validation(False):
            self._clock = time.monotonic()
            while self.step < self.total_steps:
                for x in self.batches:
                    self.take_step(x)
                    self._log()
                    if received or time.monotonic() - last_save > self.settings.checkpoint_seconds:
                        self.save()
                        last_save = self._clock = time.monotonic()
                    if received:
                        raise Interrupted(received[0], self.step)
                    if self.step >= self.total_steps:
                        break
        self.save()

    def take_step(self, x: Tensor) -> None:
        """One optimization step on a batch, at the learning rate of the moment."""
        progress = self.step / self.total_steps
        self.svi.optim.set_learning_rate(self.settings.learning_rate * self._schedule(progress))
        self.svi.at(progress)
        loss = self.svi.step(x)
        self.window[self.step % self.settings.log_every] = -loss / x.shape[0]
        self.step += 1

    def save(self) -> None:
        """Write a checkpoint of everything that the rest of the run depends on."""
        self._check_finite()
        batches = self.batches.state_dict()
        tensors = {
            **checkpoint.prefixed("model", self.svi.model.state_dict()),
            **checkpoint.prefixed("guide", self.svi.guide.state_dict()),
            **checkpoint.prefixed("optimizer", self.svi.optim.tensors()),
            **checkpoint.prefixed("rng", checkpoint.rng_state()),
            **checkpoint.prefixed("batches", {k: v for k, v in batches.items() if isinstance(v, Tensor)}),
            "window": self.window,
        }
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "batches": {k: v for k, v in batches.items() if not isinstance(v, Tensor)},
        }
        checkpoint.save(self.folder / "checkpoint", tensors, state)

    def restore(self) -> None:
        """Continue from the checkpoint in the run's directory, exactly.

        Raises:
            CheckpointError: it is missing, damaged, or its shapes are not those of this model and guide.
        """
        tensors, state = checkpoint.load(self.folder / "checkpoint")
        load_programs(tensors, self.programs)
        self.svi.optim.load_tensors(checkpoint.under("optimizer", tensors))
        self.batches.load_state_dict({**state["batches"], **checkpoint.under("batches", tensors)})
        self.window.copy_(tensors["window"])
        self.step, self.seconds = state["step"], state["seconds"]
        checkpoint.set_rng_state(checkpoint.under("rng", tensors))

    def _check_first_batch(self) -> None:
        """Score one batch under Pyro's argument checks, which cost a sync each and are off in the steps."""
        state = self.batches.state_dict()
        with torch.random.fork_rng(), validation(True), torch.no_grad():
            self.svi.loss(self.svi.model, self.svi.guide, next(iter(self.batches)))
        self.batches.load_state_dict(state)
        if names := list(pyro.get_param_store().keys()):
            raise ValueError(
                f"pyro.param sites {names[:3]} live in Pyro's global store, which checkpoints do not hold; "
                "make them PyroParam attributes of a PyroModule"
            )

    def _log(self) -> None:
        for observer in self.observers:
            observer.on_step(self.step, self.total_steps)
        validate_every = -(-self.total_steps // self.settings.validations) if self.settings.validations else 0
        last = self.step == self.total_steps
        due = bool(validate_every) and (self.step % validate_every == 0 or last)
        if self.step % self.settings.log_every == 0 or due or last:
            self._write_row(validate=due)

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
        }
        if validate and self.validate is not None:
            row.update(self.validate())
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        for observer in self.observers:
            observer.on_row(row)
        self._clock = time.monotonic()

    def _check_finite(self) -> None:
        """One wait for the device: nothing that is not finite is logged or saved as if it were good."""
        norms = torch._foreach_norm([parameter.detach() for parameter in self.svi.optim.parameters])
        total = torch.stack(norms).sum() + self.window.to(norms[0].dtype).sum()
        if not bool(torch.isfinite(total)):
            raise self._divergence()

    def _divergence(self) -> Diverged:
        """Replay the steps since the last good checkpoint, which gives the same numbers, and look at each."""
        folder = self.folder / "checkpoint"
        if not checkpoint.exists(folder):
            return Diverged("the bound is not finite before the first step; check the data's scale and the likelihood")
        last = self.step
        self.restore()
        while self.step < last:
            for x in self.batches:
                rng = checkpoint.rng_state()
                site = first_non_finite_site(self.svi.model, self.svi.guide, x)
                checkpoint.set_rng_state(rng)
                self.take_step(x)
                bad = site or self._non_finite_parameter()
                if bad or self.step >= last:
                    break
            if bad:
                break
        return Diverged(
            f"not finite at step {self.step:,}: {bad or 'the bound'}. The last good checkpoint is kept in {folder}; "
            "try a smaller trainer.learning_rate or trainer.gradient_clip=1"
        )

    def _non_finite_parameter(self) -> str | None:
        for program_name, program in self.programs.items():
            for name, parameter in program.named_parameters():
                if not torch.isfinite(parameter).all():
                    return f"gradient of {program_name} parameter '{name}'"
        return None


def load_programs(tensors: dict[str, Tensor], programs: dict[str, nn.Module]) -> None:
    """Copy a checkpoint's parameters into model and guide.

    Raises:
        CheckpointError: names or shapes differ.
    """
    for name, program in programs.items():
        try:
            program.load_state_dict(checkpoint.under(name, tensors))
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise checkpoint.CheckpointError(f"the checkpoint is not of this {name}: {first}") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _drop_rows_after(path: Path, step: int) -> None:
    kept = [row for row in read_rows(path) if row["step"] <= step]
    checkpoint.write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


@contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them; a second SIGINT interrupts at once."""
    received: list[int] = []

    def handle(signum: int, frame: Any) -> None:
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signum)

    try:
        previous = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread, where signals do not arrive either
        yield received
        return
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
