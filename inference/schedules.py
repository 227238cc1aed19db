"""Quantities that change over a run, as functions of its progress alone: nothing to checkpoint."""

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def constant(progress: float) -> float:
    """1 throughout."""
    return 1.0


def linear(progress: float) -> float:
    """From 1 down to 0 along a line."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """From 1 down to 0 along half a cosine (Loshchilov and Hutter 2017, eq. 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def burda(progress: float) -> float:
    """10^(-i/7) over eight stages, each three times as long as the one before (Burda et al. 2016, section 5)."""
    boundaries = [(3**i - 1) / (3**8 - 1) for i in range(1, 8)]
    stage = sum(progress >= boundary for boundary in boundaries)
    return 10 ** (-stage / 7)


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cosine": cosine, "burda": burda}
