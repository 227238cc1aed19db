"""The same model fitted by EM, by variational EM and by SVI: bound, log p(x) and gap along the way."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor, nn

from inference.ascent import EMError, HalfStep, VariationalEM
from inference.assemble import Setup
from inference.em import EM, EMSettings, free_energy
from inference.engine import SVI, SharedOptimizer
from inference.particles import encode, validation
from inference.schedules import SCHEDULES
from models.discrete import base_of
from models.one_hot_mixture import OneHotMixture
from models.ppca import PPCA

EVALUATIONS = 100  # of an SVI run


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


def by_variational_em(way: str, setup: Setup, x: Tensor, iterations: int, e_steps: int, m_steps: int) -> Trace:
    """Variational EM from where model and guide are."""
    trace = Trace(way)

    def ascent(watch: Callable[[HalfStep], None]) -> VariationalEM:
        elbo: Any = _GaussianELBO() if isinstance(setup.model, PPCA) else setup.objective
        parts = (setup.model, setup.guide, elbo, x)
        return VariationalEM(*parts, iterations, e_steps, m_steps, on_half_step=watch)

    _climb(trace, setup, x, ascent)
    return trace


def _climb(trace: Trace, setup: Setup, x: Tensor, make: Callable[[Callable[[HalfStep], None]], Any]) -> None:
    clock = _Clock()

    def watch(step: HalfStep) -> None:
        with clock.stopped():
            known = step.log_evidence
            log_p = log_evidence(setup.model, x) if known is None else known
            bound = step.free_energy - _penalty(ascent, x)
            point = Point(step.kind, step.iteration, ascent.passes, clock.seconds, bound, log_p)
            trace.points.append(point)

    ascent = make(watch)
    trace.points.append(
        Point("start", 0, 0.0, 0.0, free_energy_of(setup.model, setup.guide, x), log_evidence(setup.model, x))
    )
    try:
        with clock.running(), validation(False):
            while not ascent.finished:
                ascent.step()
    except EMError as error:
        trace.note = str(error)


@torch.no_grad()
def _penalty(ascent: EM | VariationalEM, x: Tensor) -> float:
    """What F has of the parameters' log-prior, where the model has one, nats per datum."""
    if isinstance(ascent, EM) and hasattr(ascent.model, "log_prior"):
        return float(ascent.model.log_prior()) / x.shape[0]
    return 0.0


class _GaussianELBO:
    """The bound of the linear-Gaussian model without sampling noise, as variational EM needs it."""

    def differentiable_loss(self, model: PPCA, guide: nn.Module, x: Tensor) -> Tensor:
        """Minus the bound, nats summed over the data."""
        return -_free_energy(model, guide, x)


def by_svi(way: str, setup: Setup, x: Tensor, steps: int, batch_size: int, learning_rate: float, seed: int) -> Trace:
    """SVI with Adam and a learning rate that falls to 0 on a cosine; bound and log p(x) are of all training data."""
    model: Any = setup.model
    guide: Any = setup.guide
    parts = nn.ModuleList([model, guide]).parameters()  # shared parameters count once
    svi = SVI(model, guide, SharedOptimizer(parts, torch.optim.Adam, learning_rate), setup.objective)
    trace, clock, size = Trace(way), _Clock(), x.shape[0]
    generator = torch.Generator(x.device).manual_seed(seed)
    batch_size = min(batch_size, size)

    def look(step: int) -> None:
        with clock.stopped():
            bound, log_p = free_energy_of(model, guide, x), log_evidence(model, x)
            passes = step * batch_size / size
            trace.points.append(Point("step" if step else "start", step, passes, clock.seconds, bound, log_p))

    with clock.running(), validation(False), torch.random.fork_rng():
        torch.manual_seed(seed)
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
            if (step + 1) % max(1, steps // EVALUATIONS) == 0 or step + 1 == steps:
                look(step + 1)
    return trace


@torch.no_grad()
def log_evidence(model: Any, x: Tensor, chunk: int = 4096) -> float:
    """log p(x) in nats per datum."""
    return float(torch.cat([model.log_evidence(some) for some in x.split(chunk)]).mean())


@torch.no_grad()
def free_energy_of(model: Any, guide: nn.Module, x: Tensor, chunk: int = 4096) -> float:
    """The bound under the guide without sampling noise, nats per datum: a sum over states, or a Gaussian integral.

    Relaxed guides are taken as the discrete distributions that they relax.
    """
    guide.eval()
    try:
        return float(sum(_free_energy(model, guide, some) for some in x.split(chunk))) / x.shape[0]
    finally:
        guide.train()


def _free_energy(model: Any, guide: Any, x: Tensor) -> Tensor:
    q = encode(guide, x)["z"]
    if isinstance(model, PPCA):
        full = isinstance(q, MultivariateNormal)
        factors = q.scale_tril if full else torch.diag_embed(q.stddev)
        return free_energy(model, model.statistics(x, q.mean, factors.expand(x.shape[0], -1, -1)))
    mixture = model.mixture if isinstance(model, OneHotMixture) else model
    probs = base_of(q).probs.reshape(-1, mixture.num_states).expand(x.shape[0], -1)  # (N, 1, K) -> (N, K)
    return free_energy(mixture, mixture.statistics(x, probs))


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
