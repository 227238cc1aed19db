"""Expectation maximization: coordinate ascent on the free energy F(q, theta), every half step of it watched.

The model brings the formulas (:class:`models.tractable.EMModel`); here are the loop, restarts, convergence and the
check that no half step lowers F. K-means and Baum-Welch are this engine on :class:`models.kmeans.KMeans` and
:class:`models.hmm.HMM`. Data stay where they are, and chunks bound the memory of an E step.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.ascent import ascend
from models.tractable import DegenerateError, Statistics, check_finite

NUMBERS_PER_CHUNK = 2**22  # that an E step makes at a time: few enough to stay in a cache
VARIANTS = ("exact", "hard", "incremental", "generalized")


class EMError(RuntimeError):
    """EM could not go on; the message says what to try."""


class HalfStep(NamedTuple):
    """What one half step did; in nats per datum (for K-means minus mean squared distances)."""

    iteration: int  # from 1
    kind: str  # "E" or "M"
    free_energy: float  # F(q, theta), plus the log-prior of theta per datum where the model has one
    log_evidence: float | None  # the same of log p(x), or for hard EM of max_z log p(x, z); known after E steps only


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
            raise ValueError(f"em.variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        for name, least in (("iterations", 1), ("restarts", 0), ("blocks", 1), ("inner_steps", 1), ("chunk", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"em.{name} must be at least {least}, got {getattr(self, name)}")
        if not self.tolerance >= 0:
            raise ValueError(f"em.tolerance must be 0 or above, got {self.tolerance}")


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


OnHalfStep = Callable[[HalfStep], None]


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
    check_finite(x)
    best: tuple[EMResult, dict[str, Tensor]] | None = None
    ends: list[float | None] = []
    failure: DegenerateError | None = None
    generator = torch.Generator(x.device).manual_seed(settings.seed)
    for _ in range(max(settings.restarts, 1)):
        try:
            if settings.restarts:
                model.initialize(x, generator)
            result = _run(model, x, settings, on_half_step)
        except DegenerateError as error:
            failure = error
            ends.append(None)
            continue
        ends.append(result.free_energy)
        if best is None or result.free_energy > best[0].free_energy:
            best = result, copy.deepcopy(model.state_dict())
    if best is None:
        raise EMError(f"EM failed in all of {len(ends)} starts; the last: {failure}") from failure
    model.load_state_dict(best[1])
    return EMResult(best[0].history, best[0].converged, tuple(ends))


def e_step(model: Any, x: Tensor, hard: bool = False, chunk: int = 0) -> tuple[Statistics, Tensor]:
    """Statistics and log p(x) of all data, chunk by chunk; both summed, the latter in nats ``()``."""
    if not chunk:
        chunk = max(1, NUMBERS_PER_CHUNK // getattr(model, "numbers_per_datum", 8 * x[0].numel()))
    total: Statistics | None = None
    log_evidence = torch.zeros((), dtype=torch.float64, device=x.device)
    for some in x.split(chunk):
        statistics, log_p = model.e_step(some, hard)
        total = statistics if total is None else _added(total, statistics)
        log_evidence += log_p.double().sum()
    assert total is not None
    return total, log_evidence


def free_energy(model: Any, statistics: Statistics) -> Tensor:
    """F(q, theta) in nats, summed over the data, of the posteriors behind the statistics; with theta's log-prior."""
    return penalized_log_joint(model, statistics) + statistics["entropy"]


def penalized_log_joint(model: Any, statistics: Statistics) -> Tensor:
    """Q(theta), what an M step maximizes: E_q log p(x, z) and theta's log-prior, nats summed over the data."""
    return model.expected_log_joint(statistics) + _log_prior(model, statistics["entropy"])


def _run(model: Any, x: Tensor, settings: EMSettings, on_half_step: OnHalfStep | None) -> EMResult:
    """One run from where the model is."""
    history: list[HalfStep] = []
    runner = _incremental if settings.variant == "incremental" else _batch
    size = x.shape[0]
    slack = 1e3 * torch.finfo(x.dtype).eps
    before = -torch.inf
    for iteration in range(1, settings.iterations + 1):
        for kind, bound, log_evidence in runner(model, x, settings, history):
            step = HalfStep(iteration, kind, bound / size, None if log_evidence is None else log_evidence / size)
            _check(step, history, slack)
            history.append(step)
            if on_half_step is not None:
                on_half_step(step)
        after = history[-1].free_energy
        if after - before <= max(settings.tolerance, 4 * torch.finfo(torch.float64).eps * abs(after)):
            return EMResult(tuple(history), True, ())
        before = after
    return EMResult(tuple(history), False, ())


def _check(step: HalfStep, history: Sequence[HalfStep], slack: float) -> None:
    """No half step lowers F: the theorem that tells a bug, or a precision too low, from a slow start."""
    if not abs(step.free_energy) < float("inf"):
        raise EMError(
            f"F is {step.free_energy} after the {step.kind} step of iteration {step.iteration}; standardize x"
        )
    if history and step.free_energy < history[-1].free_energy - slack * (1 + abs(history[-1].free_energy)):
        raise EMError(
            f"the {step.kind} step of iteration {step.iteration} lowered F from {history[-1].free_energy:.12g} to "
            f"{step.free_energy:.12g} per datum: e_step and m_step are not of one model, or too little precision is "
            "left; try float64 or standardized data"
        )


Bounds = Iterable[tuple[str, float, float | None]]


def _batch(model: Any, x: Tensor, settings: EMSettings, history: Sequence[HalfStep]) -> Bounds:
    """E of all data, then M."""
    statistics, log_evidence = e_step(model, x, settings.variant == "hard", settings.chunk)
    with torch.no_grad():
        yield "E", float(log_evidence + _log_prior(model, log_evidence)), float(log_evidence)
    _maximize(model, statistics, settings)
    with torch.no_grad():
        yield "M", float(free_energy(model, statistics)), None


def _maximize(model: Any, statistics: Statistics, settings: EMSettings) -> None:
    if settings.variant == "generalized":
        ascend(model.parameters(), lambda: penalized_log_joint(model, statistics), settings.inner_steps)
    else:
        model.m_step(statistics)


def _incremental(model: Any, x: Tensor, settings: EMSettings, history: Sequence[HalfStep]) -> Bounds:
    """E of one block, then M with the statistics of all; the first E is of all, so that every q is a posterior."""
    blocks = x.chunk(min(settings.blocks, x.shape[0]))
    parts = [e_step(model, block, chunk=settings.chunk)[0] for block in blocks]
    total = reduce(_added, parts)
    for place in range(len(blocks)):
        if place:
            fresh, _ = e_step(model, blocks[place], chunk=settings.chunk)
            parts[place] = fresh
            total = reduce(_added, parts)  # summed anew: differences of sums would drift
        with torch.no_grad():
            yield "E", float(free_energy(model, total)), None
        model.m_step(total)
        with torch.no_grad():
            yield "M", float(free_energy(model, total)), None


def _log_prior(model: Any, like: Tensor) -> Tensor:
    return model.log_prior() if hasattr(model, "log_prior") else torch.zeros_like(like)


def _added(one: Statistics, other: Statistics) -> Statistics:
    return {name: value + other[name] for name, value in one.items()}
