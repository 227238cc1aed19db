"""The same model fitted by EM, by variational EM and by SVI: bound, log p(x) and gap along the way."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inference.ascent import EMError, HalfStep, VariationalEM
from inference.assemble import Setup
from inference.em import EM, EMSettings, fit
from inference.engine import SVI, SharedOptimizer
from inference.particles import validation
from inference.schedules import SCHEDULES
from inference.studies.held import HeldELBO, log_evidence, standing
from models.tractable import DegenerateError


@dataclass(frozen=True)
class Point:
    """Where a fit was at one moment; nats per training datum."""

    kind: str  # "start", "E", "M", or "step"
    iteration: int
    passes: float  # over the data
    seconds: float
    bound: float
    log_p: float

    @property
    def gap(self) -> float:
        """KL(q(z|x) || p(z|x)); what is rounding error is zero."""
        gap = self.log_p - self.bound
        return gap if abs(gap) > 1e-12 * (1 + abs(self.log_p)) else 0.0


@dataclass
class Trace:
    """One fit."""

    way: str
    points: list[Point] = field(default_factory=list)
    held_out: float = float("nan")  # log p(x) at the end, nats per held-out datum
    optimum: float | None = None  # log p(x) of the optimum that EM climbs to from the end; None where it meets none
    note: str = ""

    @property
    def log_p(self) -> list[float]:
        """Along the way."""
        return [point.log_p for point in self.points]

    @property
    def deepest_fall(self) -> float:
        """Of log p(x), between neighbouring points."""
        pairs = zip(self.log_p[:-1], self.log_p[1:], strict=True)
        return max([0.0, *(before - after for before, after in pairs)])

    @property
    def falls(self) -> int:
        """How often log p(x) fell, by more than its rounding."""
        return sum(a - b > 1e-9 * (1 + abs(a)) for a, b in zip(self.log_p[:-1], self.log_p[1:], strict=True))


def by_em(way: str, setup: Setup, x: Tensor, iterations: int, tolerance: float) -> Trace:
    """EM from where the model is; log p(x) is looked at after M steps too, which EM itself does not need."""
    trace = Trace(way)

    def ascent(watch: Callable[[HalfStep], None]) -> EM:
        settings = EMSettings(iterations=iterations, tolerance=tolerance, restarts=0)
        return EM(setup.model, x, settings, watch)

    _climb(trace, setup, x, ascent)
    return trace


def by_variational_em(way: str, setup: Setup, x: Tensor, iterations: int, half_steps: int) -> Trace:
    """Variational EM from where model and guide are."""
    trace = Trace(way)

    def ascent(watch: Callable[[HalfStep], None]) -> VariationalEM:
        parts = (setup.model, setup.guide, HeldELBO(), x)
        return VariationalEM(*parts, iterations, half_steps, half_steps, on_half_step=watch)

    _climb(trace, setup, x, ascent)
    return trace


def _climb(trace: Trace, setup: Setup, x: Tensor, make: Callable[[Callable[[HalfStep], None]], Any]) -> None:
    clock = _Clock()

    def watch(step: HalfStep) -> None:
        with clock.stopped():
            known = step.log_evidence
            log_p = log_evidence(setup.model, x) if known is None else known
            trace.points.append(Point(step.kind, step.iteration, ascent.passes, clock.seconds, step.free_energy, log_p))

    ascent = make(watch)
    trace.points.append(Point("start", 0, 0.0, 0.0, *standing(setup.model, setup.guide, x)))
    try:
        with clock.running(), validation(False):
            while not ascent.finished:
                ascent.step()
    except (EMError, DegenerateError) as error:
        trace.note = str(error)


def by_svi(way: str, setup: Setup, x: Tensor, steps: int, batch_size: int, learning_rate: float, looks: int) -> Trace:
    """SVI with Adam and a learning rate that falls to 0 on a cosine; bound and log p(x) are of all training data."""
    model: Any = setup.model
    guide: Any = setup.guide
    parts = nn.ModuleList([model, guide]).parameters()  # shared parameters count once
    svi = SVI(model, guide, SharedOptimizer(parts, torch.optim.Adam, learning_rate), setup.objective)
    trace, clock, size = Trace(way), _Clock(), x.shape[0]
    generator = torch.Generator(x.device).manual_seed(setup.seed)
    batch_size = min(batch_size, size)

    def look(step: int) -> None:
        with clock.stopped():
            passes = step * batch_size / size
            here = standing(model, guide, x)
            trace.points.append(Point("step" if step else "start", step, passes, clock.seconds, *here))

    with clock.running(), validation(False), torch.random.fork_rng():
        torch.manual_seed(setup.seed)
        look(0)
        order = torch.randperm(size, generator=generator, device=x.device)
        for step in range(steps):
            place = step * batch_size % size
            if place + batch_size > size:
                order, place = torch.randperm(size, generator=generator, device=x.device), 0
            progress = step / steps
            svi.optim.set_learning_rate(learning_rate * SCHEDULES["cosine"](progress))
            svi.at(progress)
            svi.step(x[order[place : place + batch_size]])
            if (step + 1) % max(1, steps // looks) == 0 or step + 1 == steps:
                look(step + 1)
    return trace


def optimum_near(model: Any, x: Tensor, iterations: int, tolerance: float) -> float | None:
    """log p(x) of where EM climbs to from a model's parameters, which stay as they are; None if it degenerates."""
    model = copy.deepcopy(model)
    try:
        fit(model, x, EMSettings(iterations=iterations, tolerance=tolerance, restarts=0))
    except EMError:
        return None
    return log_evidence(model, x)


class _Clock:
    """Counts the seconds of the fitting, and not those of looking at it."""

    def __init__(self) -> None:
        self.seconds, self.since = 0.0, time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        self.since = time.perf_counter()
        yield

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.seconds += time.perf_counter() - self.since
        yield
        self.since = time.perf_counter()
