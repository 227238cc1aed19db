"""Runs of a grid that differ in values alone, trained side by side in one compiled step.

Each keeps its own folder, data, random numbers, log and checkpoints, and ends as if it had been alone, to rounding.
"""

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference import experiment
from inference.compiled import CompiledSVI
from inference.config import load
from inference.console import Quiet
from inference.failures import one_line
from inference.rundir import locked
from inference.signals import Interrupted, deferred, raised
from inference.trainer import Trainer, watched
from inference.vectorized import VectorizedSVI, as_default

Finished = Callable[[int], dict[str, Any]]


class Member:
    """One run among several.

    Args:
        arguments: what configures it.
        folder: where it is kept.
    """

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.error: str | None = None
        self.done = False
        self.x: Tensor | None = None
        self.course: Generator[list[Tensor], Tensor | None, None] | None = None

    @property
    def going(self) -> bool:
        """Whether it has steps to take."""
        return not self.done and self.error is None

    def begin(self, held: ExitStack) -> None:
        """Get to the first step, or to the step of the last checkpoint."""
        with torch.random.fork_rng():
            if (self.folder / "config.yaml").exists():
                setup = experiment.reopen(self.folder)
                held.enter_context(locked(self.folder))
                self.run = experiment.take_up(setup, self.folder, Quiet())
            else:
                place = f"run.dir={json.dumps(str(self.folder))}"
                self.run = experiment.begin(load([*self.arguments, place]), Quiet())
                held.enter_context(locked(self.folder))
                experiment.record(self.run)
            assert isinstance(self.run.trainer, Trainer)
            self.trainer, device = self.run.trainer, self.run.setup.device
            state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        self.generator = torch.Generator(device)
        self.generator.set_state(state)
        self.done = experiment.is_finished(self.run)
        svi = self.trainer.svi
        if not isinstance(svi, CompiledSVI):
            self.trainer.svi = CompiledSVI(svi.model, svi.guide, svi.optim, svi.objective)
        self.trainer.steps_per_call = 1
        self.trainer.randomness = partial(as_default, self.generator)
        if not self.done:
            self.trainer.begin()

    def attempt(self, work: Callable[[], None]) -> None:
        """Do something; what goes wrong is this run's misfortune and not that of the others."""
        try:
            work()
        except Exception as error:
            self.error = f"{type(error).__name__}: {one_line(error)}"

    def advance(self, loss: Tensor | None) -> None:
        """Be told the loss of the step; what follows the last step follows at once."""
        assert self.course is not None
        try:
            (self.x,) = self.course.send(loss)
        except StopIteration:
            self.done = True
            experiment.finish(*self.run, Quiet())

    def result(self) -> dict[str, Any]:
        """The summary, or the error."""
        if self.error is not None:
            return {"error": self.error}
        return json.loads((self.folder / "summary.json").read_text())


def train_together(runs: Sequence[tuple[Sequence[str], Path]]) -> list[dict[str, Any]]:
    """Train runs, each from wherever it is to its summary, in lockstep; returns summaries, or errors under ``error``.

    Args:
        runs: arguments and folder of each; they have to differ in values alone to step together, and step one after
            another if they do not, which the log says.
    """
    members = [Member(*run) for run in runs]
    with ExitStack() as held, raised():
        for member in members:
            member.attempt(partial(member.begin, held))
        _fit([member for member in members if member.going])
    return [member.result() for member in members]


def _fit(members: Sequence[Member]) -> None:
    if not members:
        return
    size = members[0].trainer.batches.batch_size
    generators = [member.generator for member in members]
    together = VectorizedSVI([member.trainer.svi for member in members], generators, size)
    with deferred() as pending, watched():
        for member in members:
            member.course = member.trainer.course(pending)
            member.attempt(partial(member.advance, None))
        while any(member.going for member in members):
            for member in members:
                if member.going:
                    member.trainer.prepare(0)
            # those that have ended ride along: their places are there, and their results are written
            losses = together.step([member.x for member in members if member.x is not None])
            _tell(members, losses)


def _tell(members: Sequence[Member], losses: Tensor) -> None:
    """Hand out the losses; when a signal has come, every run writes its checkpoint before it is passed on."""
    stop: Interrupted | None = None
    for member, loss in zip(members, losses.split(1), strict=True):
        if member.going:
            try:
                member.attempt(partial(member.advance, loss))
            except Interrupted as interrupted:
                stop = interrupted
    if stop is not None:
        raise stop
