"""Expectation maximization: coordinate ascent on the free energy F(q, theta), every half step of it watched.

The model brings the formulas (:class:`models.tractable.EMModel`); here are the loop, restarts, convergence and the
check that no half step lowers F. K-means and Baum-Welch are this engine on :class:`models.kmeans.KMeans` and
:class:`models.hmm.HMM`. Data stay where they are, and chunks bound the memory of an E step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from inference.ascent import EMError, HalfStep, OnHalfStep, ascend, checked, stands_still
from inference.checkpoint import prefixed, under
from inference.particles import validation
from models.tractable import DegenerateError, Statistics, check_finite

# Numbers that an E step makes at a time: few enough to stay in a processor's cache, enough to fill a GPU.
NUMBERS_PER_CHUNK = {"cpu": 2**21, "cuda": 2**28}
VARIANTS = ("exact", "hard", "incremental", "generalized")


@dataclass(frozen=True)
class EMSettings:
    """How EM is run.

    Args:
        variant: exact; hard (q at the mode of the posterior); incremental (q of one block of the data at a time, Neal
            and Hinton 1998); generalized (the M step only climbs, by gradient steps).
        iterations: most pairs of E and M step.
        tolerance: a gain of F per datum below it, over one iteration, ends the run; 0 stops when F stands still.
        restarts: random starts, the best of which is kept; 0 goes on from the model's parameters.
        seed: of the random starts.
        blocks: of the incremental variant.
        inner_steps: gradient steps of the generalized variant's M step.
        chunk: data at a time in an E step; 0 for as many as fit a cache.
    """

    variant: str = "exact"
    iterations: int = 200
    tolerance: float = 1e-6
    restarts: int = 1
    seed: int = 0
    blocks: int = 10
    inner_steps: int = 1
    chunk: int = 0

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"inference.variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        for name, least in (("iterations", 1), ("restarts", 0), ("blocks", 1), ("inner_steps", 1), ("chunk", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"inference.{name} must be at least {least}, got {getattr(self, name)}")
        if not self.tolerance >= 0:
            raise ValueError(f"inference.tolerance must be 0 or above, got {self.tolerance}")


@dataclass(frozen=True)
class EMResult:
    """The best run of EM, whose parameters the model has."""

    history: tuple[HalfStep, ...]
    converged: bool
    free_energies: tuple[float | None, ...]  # where each restart ended, per datum; None for one that failed

    @property
    def free_energy(self) -> float:
        """F at the end, per datum."""
        return self.history[-1].free_energy

    @property
    def iterations(self) -> int:
        """How many pairs of E and M step were made."""
        return self.history[-1].iteration


class EM:
    """EM iteration by iteration, all starts after one another, so that a run can be watched, saved and continued.

    Args:
        model: an :class:`models.tractable.EMModel` that is a module; its ``log_prior()`` counts if it has one, and
            ``settle(statistics)`` follows gradient steps, for what they do not move.
        x: data ``(N, *event_shape)``, on the model's device.
        settings: how.
        on_half_step: called after every half step.

    Attributes:
        ends: where each finished start ended, F per datum; None for one that failed.
        iteration: of the current start, 0 before its first.
        best_start: which of the finished starts was the best, whose parameters the model has in the end.
        converged: whether that one met the tolerance.
        passes: E steps of a datum, over the number of data.
    """

    def __init__(
        self, model: Any, x: Tensor, settings: EMSettings = EMSettings(), on_half_step: OnHalfStep | None = None
    ) -> None:
        check_finite(x)
        self.model, self.x, self.settings, self.on_half_step = model, x, settings, on_half_step
        self.generator = torch.Generator(x.device).manual_seed(self.settings.seed)
        self.starts = max(self.settings.restarts, 1)
        self.ends: list[float | None] = []
        self.iteration, self.passes = 0, 0.0
        self.best_start, self.converged = -1, False
        self._best: dict[str, Tensor] = {}
        self._parts: list[Statistics] = []  # of the incremental variant's blocks
        self._last: HalfStep | None = None
        self._sweep = self._incremental if self.settings.variant == "incremental" else self._batch

    @property
    def finished(self) -> bool:
        """Whether the last start is over."""
        return len(self.ends) == self.starts

    @property
    def remaining(self) -> int:
        """Iterations still to come at most."""
        return (self.starts - len(self.ends)) * self.settings.iterations - self.iteration

    def step(self) -> list[HalfStep]:
        """One iteration of the current start; returns its half steps, the last before it failed if it does.

        Raises:
            EMError: every start came to a degenerate model, or a half step lowered F.
        """
        before = self._last
        steps: list[HalfStep] = []
        try:
            if self.iteration == 0 and self.settings.restarts:
                self.model.initialize(self.x, self.generator)
            self.iteration += 1
            for kind, bound, log_evidence in self._sweep():
                steps.append(self._watched(kind, bound, log_evidence))
        except DegenerateError as error:
            self._end(None, False, error)
            return steps
        still = before is not None and stands_still(before, steps[-1], self.settings.tolerance)
        if still or self.iteration == self.settings.iterations:
            self._end(steps[-1].free_energy, still)
        return steps

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the coming iterations depend on, besides the model: tensors, and what JSON holds."""
        tensors = {"generator": self.generator.get_state(), **prefixed("best", self._best)}
        for place, part in enumerate(self._parts):
            tensors |= prefixed(f"part{place}", part)
        names = ("ends", "iteration", "passes", "best_start", "converged")
        return tensors, {**{name: getattr(self, name) for name in names}, "last": self._last}

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        for name in ("ends", "iteration", "passes", "best_start", "converged"):
            setattr(self, name, state[name])
        self._last = None if state["last"] is None else HalfStep(*state["last"])
        self.generator.set_state(tensors["generator"].cpu())
        device = self.x.device
        self._best = {name: tensor.to(device) for name, tensor in under("best", tensors).items()}
        places = sorted({int(name.partition(".")[0][4:]) for name in tensors if name.startswith("part")})
        parts = [under(f"part{place}", tensors) for place in places]
        self._parts = [{name: tensor.to(device) for name, tensor in part.items()} for part in parts]

    def _watched(self, kind: str, bound: Tensor, log_evidence: Tensor | None) -> HalfStep:
        size = self.x.shape[0]
        known = None if log_evidence is None else float(log_evidence) / size
        step = HalfStep(self.iteration, kind, float(bound) / size, known)
        self._last = checked(step, self._last, self.x.dtype)
        if self.on_half_step is not None:
            self.on_half_step(step)
        return step

    def _end(self, free_energy: float | None, converged: bool, failure: DegenerateError | None = None) -> None:
        """The current start is over; after the last one the model is the best."""
        self.ends.append(free_energy)
        best = self.ends[self.best_start] if self.best_start >= 0 else None
        if free_energy is not None and (best is None or free_energy > best):
            self.best_start, self.converged = len(self.ends) - 1, converged
            self._best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.iteration, self._last, self._parts = 0, None, []
        if self.finished and self.best_start < 0:
            raise EMError(f"EM failed in all of {self.starts} starts; the last: {failure}") from failure
        if self.finished:
            self.model.load_state_dict(self._best)

    def _expect(self, x: Tensor, hard: bool = False) -> tuple[Statistics, Tensor]:
        self.passes += x.shape[0] / self.x.shape[0]
        return e_step(self.model, x, hard, self.settings.chunk)

    def _batch(self) -> "Bounds":
        """E of all data, then M."""
        statistics, log_evidence = self._expect(self.x, self.settings.variant == "hard")
        with torch.no_grad():
            yield "E", log_evidence + _log_prior(self.model, log_evidence), log_evidence
        if self.settings.variant == "generalized":
            climbed = lambda: penalized_log_joint(self.model, statistics)  # noqa: E731
            ascend(self.model.parameters(), climbed, self.settings.inner_steps)
            if hasattr(self.model, "settle"):
                self.model.settle(statistics)
        else:
            self.model.m_step(statistics)
        with torch.no_grad():
            yield "M", free_energy(self.model, statistics), None

    def _incremental(self) -> "Bounds":
        """E of one block, then M with the statistics of all; the first E is of all, so that every q is a posterior."""
        blocks = self.x.chunk(min(self.settings.blocks, self.x.shape[0]))
        fresh = not self._parts
        if fresh:
            self._parts = [self._expect(block)[0] for block in blocks]
        for place, block in enumerate(blocks):
            if place or not fresh:
                self._parts[place] = self._expect(block)[0]
            total = reduce(added, self._parts)  # summed anew: differences of sums would drift
            with torch.no_grad():
                yield "E", free_energy(self.model, total), None
            self.model.m_step(total)
            with torch.no_grad():
                yield "M", free_energy(self.model, total), None


Bounds = Iterator[tuple[str, Tensor, Tensor | None]]


def fit(model: Any, x: Tensor, settings: EMSettings = EMSettings(), on_half_step: OnHalfStep | None = None) -> EMResult:
    """Fit a model by EM and leave it at the best parameters found.

    Args:
        model: an :class:`models.tractable.EMModel` that is a module; its ``log_prior()`` counts if it has one.
        x: data ``(N, *event_shape)``, on the model's device.
        settings: how.
        on_half_step: called after every half step, of every restart.

    Raises:
        ValueError: no data, or data that are not finite.
        EMError: every restart came to a degenerate model, or a half step lowered F.
    """
    em = EM(model, x, settings, on_half_step)
    history: list[HalfStep] = []
    best: list[HalfStep] = []
    while not em.finished:
        start = len(em.ends)
        history += em.step()
        if len(em.ends) > start:
            best = history if em.best_start == start else best
            history = []
    return EMResult(tuple(best), em.converged, tuple(em.ends))


def e_step(model: Any, x: Tensor, hard: bool = False, chunk: int = 0) -> tuple[Statistics, Tensor]:
    """Statistics and log p(x) of all data, chunk by chunk; both summed, the latter in nats ``()``."""
    if not chunk:
        numbers = getattr(model, "numbers_per_datum", 8 * x[0].numel())
        chunk = max(64, NUMBERS_PER_CHUNK[x.device.type] // numbers)
    total: Statistics | None = None
    log_evidence = torch.zeros((), dtype=torch.float64, device=x.device)
    with validation(False):  # each check of an argument would wait for the device
        for some in x.split(chunk):
            statistics, log_p = model.e_step(some, hard)
            total = statistics if total is None else added(total, statistics)
            log_evidence += log_p.double().sum()
    assert total is not None
    return total, log_evidence


def free_energy(model: Any, statistics: Statistics) -> Tensor:
    """F(q, theta) in nats, summed over the data, of the posteriors behind the statistics; with theta's log-prior."""
    return penalized_log_joint(model, statistics) + statistics["entropy"]


def penalized_log_joint(model: Any, statistics: Statistics) -> Tensor:
    """Q(theta), what an M step maximizes: E_q log p(x, z) and theta's log-prior, nats summed over the data."""
    return model.expected_log_joint(statistics) + _log_prior(model, statistics["entropy"])


def _log_prior(model: Any, like: Tensor) -> Tensor:
    return model.log_prior() if hasattr(model, "log_prior") else torch.zeros_like(like)


def added(one: Statistics, other: Statistics) -> Statistics:
    """Statistics of two sets of data together."""
    return {name: value + other[name] for name, value in one.items()}
