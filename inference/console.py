"""What a run says while it goes: a progress bar on a terminal, a few lines elsewhere."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Progressing(Protocol):
    """What has got so far and has so far to go."""

    step: int

    @property
    def total_steps(self) -> int: ...


class Console:
    """Shows progress on standard error where that is a terminal, and results on standard output."""

    def __init__(self) -> None:
        self.errors = RichConsole(stderr=True, highlight=False)
        self.progress: Progress | None = None
        self.task: Any = None

    @contextmanager
    def training(self, words: Mapping[str, str], run: Progressing) -> Iterator[None]:
        """Shows the steps of a training until it ends."""
        groups = [group for group in ("data", "model", "guide", "objective", "inference") if group in words]
        parts = ", ".join(f"{group}={words[group]}" for group in groups)
        print(f"training  {parts}", flush=True)
        if not self.errors.is_terminal:
            yield
            return
        with self._bar() as self.progress:
            self.task = self.progress.add_task("training", total=run.total_steps, completed=run.step, note="")
            yield
        self.progress = None

    def on_step(self, step: int, total: int) -> None:
        """See :class:`inference.trainer.Observer`."""
        if self.progress:
            self.progress.update(self.task, completed=step, total=total)

    def on_row(self, row: dict[str, Any]) -> None:
        """See :class:`inference.trainer.Observer`."""
        if self.progress:
            valid = f"  valid elbo {row['valid/elbo']:.2f}" if "valid/elbo" in row else ""
            note = f"bound {row['train/bound']:.2f}{valid}"
            self.progress.update(self.task, note=note)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Shows one of the stages after the training; yields what is to be called with done and total."""
        if not self.errors.is_terminal:
            yield lambda done, total: None
            return
        with self._bar() as progress:
            task = progress.add_task(name, total=None, note="")
            yield lambda done, total: progress.update(task, completed=done, total=total)

    def say(self, line: str) -> None:
        """A line on standard output."""
        print(line, flush=True)

    def finished(self, folder: Path, summary: Mapping[str, Any]) -> None:
        """The result in three lines."""
        nll, stderr, particles = summary["test/nll"], summary["test/nll_stderr"], summary["test/nll_particles"]
        how = f"importance sampling, {particles} particles" if particles > 1 else "the bound itself"
        known = "log p(x) unknown: one point for each datum bounds nothing" if nll is None else (
            f"log p(x) {-nll:.2f} +- {stderr:.2f} ({how})"
        )  # fmt: skip
        print(
            f"test      ELBO {summary['test/elbo']:.2f} = reconstruction {summary['test/reconstruction']:.2f} "
            f"- KL {summary['test/kl']:.2f} nats per datum\n"
            f"          {known}, {summary['test/active_units']} active units\n"
            f"report    {folder / 'report.html'}",
            flush=True,
        )

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.errors,
            transient=True,
        )


class Quiet(Console):
    """Says nothing: for runs inside a grid or a study, which speaks for them."""

    @contextmanager
    def training(self, words: Mapping[str, str], run: Progressing) -> Iterator[None]:
        yield

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: None

    def say(self, line: str) -> None:
        pass

    def finished(self, folder: Path, summary: Mapping[str, Any]) -> None:
        pass


def complain(message: str) -> None:
    """One line about what went wrong, on standard error."""
    print("lowerbound:", " ".join(message.splitlines()), file=sys.stderr, flush=True)
