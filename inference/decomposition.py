"""Geometry of the drawing that takes the bound apart: log p(x) >= ELBO = reconstruction - KL."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

LEFT, RIGHT = 330.0, 860.0  # of the plotting area, in the drawing's own units
FIT = 3.0  # zero is on the scale if the nearest value is within this many times the values' spread of it
EDGE = 0.35  # of the spread: what is left of a bar that is broken because its other end, zero, is far away


@dataclass(frozen=True)
class Bar:
    """A segment of a row: ``kind`` names its colour, ``x`` and ``width`` are in the drawing's units."""

    kind: str
    x: float
    width: float


@dataclass(frozen=True)
class Decomposition:
    """What the template needs: rows of bars, ticks, and text; values are nats per datum.

    Args:
        bars: bars of each row by the row's name: ``reconstruction``, ``kl``, ``elbo``, ``evidence``.
        at: place of each known value on the scale.
        ticks: place and text of the scale's marks.
        broken: where the broken bars are cut, or ``None`` if they all reach zero.
        values: numbers by name: ``reconstruction``, ``kl``, ``elbo``; where known ``evidence``, ``gap``,
            ``mutual_information``, ``marginal_kl``, ``particles``.
    """

    bars: dict[str, list[Bar]]
    at: dict[str, float]
    ticks: list[tuple[float, str]]
    broken: float | None
    values: dict[str, float]


def decompose(summary: Mapping[str, Any]) -> Decomposition | None:
    """Lay the drawing out; ``None`` when the summary lacks one of the ELBO and its two terms."""
    values = _values(summary)
    if values is None:
        return None
    points = {name: values[name] for name in ("reconstruction", "elbo", "evidence") if name in values}
    low, high, base = _scale(list(points.values()))

    def place(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * (value - low) / (high - low)

    def bar(kind: str, start: float, end: float) -> Bar:
        ends = sorted((place(start), place(end)))
        return Bar(kind, round(ends[0], 2), round(ends[1] - ends[0], 2))

    reconstruction, elbo = values["reconstruction"], values["elbo"]
    bars = {
        "reconstruction": [bar("reconstruction", base, reconstruction)],
        "kl": [bar("kl", reconstruction, elbo)],
        "elbo": [bar("elbo", base, elbo)],
    }
    if {"mutual_information", "marginal_kl"} <= values.keys():
        cut = max(elbo, reconstruction - max(values["mutual_information"], 0.0))
        bars["kl"] = [bar("information", reconstruction, cut), bar("marginal", cut, elbo)]
    if "evidence" in values:
        bars["evidence"] = [bar("evidence", base, values["evidence"])]
        if values["gap"] > 0:
            bars["evidence"].append(bar("gap", elbo, values["evidence"]))
    ticks = [(round(place(tick), 2), f"{tick:g}".replace("-", "−")) for tick in _ticks(low, high, base)]
    broken = None if base == 0 else round(place(base), 2)
    return Decomposition(bars, {name: round(place(value), 2) for name, value in points.items()}, ticks, broken, values)


def _values(summary: Mapping[str, Any]) -> dict[str, float] | None:
    keys = {
        "elbo": "test/elbo",
        "reconstruction": "test/reconstruction",
        "kl": "test/kl",
        "mutual_information": "test/mutual_information",
        "marginal_kl": "test/marginal_kl",
        "particles": "test/nll_particles",
        "evidence": "test/nll",
    }
    known = {name: summary[key] for name, key in keys.items() if isinstance(summary.get(key), int | float)}
    values = {name: float(value) for name, value in known.items() if math.isfinite(value)}
    if not {"elbo", "reconstruction", "kl"} <= values.keys():
        return None
    if "evidence" in values and values.get("particles") == 1:  # the bound itself, of which no more is known
        del values["evidence"]
    if "evidence" in values:
        values["evidence"] = -values["evidence"]
        values["gap"] = values["evidence"] - values["elbo"]
    return values


def _scale(points: list[float]) -> tuple[float, float, float]:
    """Ends of the scale and the value where the bars begin: zero if it is near enough, else a cut."""
    low, high = min(points), max(points)
    spread = max(high - low, 0.04 * max(abs(low), abs(high)), 1e-6)  # a tiny KL shall look tiny
    nearest = 0.0 if low <= 0 <= high else high if high < 0 else low
    if abs(nearest) <= FIT * spread:
        low, high = min(low, 0.0), max(high, 0.0)
        return low - 0.04 * (high - low), high + (0.04 * (high - low) if high > 0 else 0.0), 0.0
    if high < 0:
        return low - 0.1 * spread, high + EDGE * spread, high + EDGE * spread
    return low - EDGE * spread, high + 0.1 * spread, low - EDGE * spread


def _ticks(low: float, high: float, base: float) -> list[float]:
    room = 0.04 * (high - low)
    marks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(mark) for mark in marks if low <= mark <= high and (base == 0 or abs(mark - base) > room)]
