"""Pictures of runs beside each other."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from inference.canvas import (
    BLUE,
    CLASS_COLOURS,
    FAINT,
    INK,
    MUTED,
    PAPER,
    WIDTH,
    axis_labels,
    heading,
    panel,
    save,
    sheet,
)
from inference.figures import Figure

BAND = 118  # pixels of a row
WHISKER = 2  # standard errors
LETTERS = 26  # of a line of a row's name


def draw_comparison(records: Sequence[Mapping[str, Any]], folder: Path) -> Figure:
    """KL, information and paired fit of each kind of run, one band each."""
    height = BAND * len(records)
    figure = sheet(WIDTH, height + 190)
    rate = panel(figure, 330, 100, 560, height, spines="left bottom")
    _draw_rates(rate, records)
    fit = panel(figure, 990, 100, 540, height, spines="bottom")
    _draw_gains(fit, records)
    for axes in (rate, fit):
        axes.set_ylim(len(records) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
    path = folder / "compare.png"
    save(figure, path)
    several = any(row.get("log_p_gain_stderr_over_seeds") is not None for row in records)
    caption = (
        "Left: what a code costs and what it knows of its datum"
        + (", whiskers two standard errors over seeds. " if several else ". ")
        + "Right: the gain in log p(x) over the first row, datum by datum; thick whiskers are two standard errors over "
        "data" + (", thin ones over seeds." if several else ".")
    )
    return Figure("compare", "Rate, information and fit", caption, path)


def _draw_rates(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    bars = (("test/kl", FAINT, -0.19), ("test/mutual_information", BLUE, 0.19))
    lowest, top = (ends(ends(row[key] or 0.0 for row in records) for key, *_ in bars) for ends in (min, max))
    for key, tint, shift in bars:
        for place, row in enumerate(records):
            value, error = row[key], WHISKER * (row.get(f"{key}_stderr_over_seeds") or 0.0)
            if value is None:
                continue
            axes.barh(place + shift, value, height=0.34, color=tint)
            if error:
                axes.errorbar(value, place + shift, xerr=error, color=INK, elinewidth=1.0)
            told = f"{value:.3f}" if abs(value) < 0.1 else f"{value:.2f}"
            axes.text(max(value, 0.0) + error + 0.015 * max(top, 1e-3), place + shift, told, va="center", fontsize=10.5,
                      color=INK)  # fmt: skip
    axes.set_yticks(range(len(records)), [_broken(row["kind"]) for row in records])
    axes.tick_params(axis="y", labelcolor=INK, labelsize=11)
    axes.set_xlim(min(0.0, lowest), 1.14 * max(axes.get_xlim()[1], 1e-3))
    heading(axes, "KL (grey) and I(x; z) (blue)")
    axis_labels(axes, "nats for each datum")


def _broken(name: str) -> str:
    """A name of several options in lines, an option whole where it fits."""
    held = ", ".join(option.replace(" ", "\u00a0") for option in name.split(", "))
    return "\n".join(textwrap.wrap(held, LETTERS)).replace("\u00a0", " ")


def _draw_gains(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    axes.plot([0.0, 0.0], [0.0, len(records) - 0.5], color=MUTED, linewidth=0.8)
    for place, row in enumerate(records):
        gain = row.get("log_p_gain") or 0.0
        tint = INK if place == 0 else CLASS_COLOURS[place % len(CLASS_COLOURS)]
        for over, width in (("data", 2.2), ("seeds", 0.9)):
            if (error := row.get(f"log_p_gain_stderr_over_{over}")) is not None:
                axes.errorbar(gain, place, xerr=WHISKER * error, color=tint, elinewidth=width)
        axes.plot(gain, place, "o", color=tint, markersize=6)
        axes.text(gain, place - 0.2, f"−log p(x) = {row['test/nll']:.2f}", ha="center", va="bottom", fontsize=10.5,
                  color=INK, bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.5})  # fmt: skip
    low, high = axes.get_xlim()
    room = 0.18 * max(high - low, 1e-3)  # for the words
    axes.set_xlim(low - room, high + room)
    axes.set_yticks([])
    heading(axes, "Gain in log p(x), the first = 0")
    axis_labels(axes, "nats for each datum; right is better")


def draw_courses(courses: Sequence[tuple[str, Sequence[Sequence[Mapping[str, Any]]]]], folder: Path) -> list[Figure]:
    """Rate, information and bound of the validation set along the training: one picture, or none without them.

    Args:
        courses: for each kind of run its name and the logs of its runs.
        folder: where the picture goes.
    """
    every = (("valid/kl", "KL(q(z|x) ‖ p(z))"), ("valid/mutual_information", "I(x; z)"), ("valid/elbo", "ELBO"))
    panels = [(key, title) for key, title in every
              if all(any(key in row for row in log) for _, logs in courses for log in logs)]  # fmt: skip
    if not panels:
        return []
    figure = sheet(WIDTH, 620)
    for place, (key, title) in enumerate(panels):
        axes = panel(figure, 100 + place * (WIDTH - 40) // len(panels), 170, (WIDTH - 40) // len(panels) - 100, 360)
        late = []
        for order, (name, logs) in enumerate(courses):
            tint = INK if order == 0 else CLASS_COLOURS[order % len(CLASS_COLOURS)]
            for first, log in enumerate(logs):
                line = np.array([(row["step"], row[key]) for row in log if key in row])
                if line.size:
                    axes.plot(*line.T, color=tint, linewidth=1.5, label=name if first == 0 else None)
                    late.append(line[len(line) // 4 :, 1])
        if key == "valid/elbo" and late:  # the first steps may lie outside
            low, high = np.concatenate(late).min(), np.concatenate(late).max()
            axes.set_ylim(low - 0.08 * max(high - low, 1e-6), high + 0.08 * max(high - low, 1e-6))
        elif late:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        heading(axes, title)
        axis_labels(axes, "step", "nats for each datum" if place == 0 else "")
        if place == 0:
            axes.legend(frameon=False, fontsize=10.5, labelcolor=INK, loc="upper left", bbox_to_anchor=(0.0, -0.2),
                        ncols=2)  # fmt: skip
    path = folder / "courses.png"
    save(figure, path)
    return [
        Figure("courses", "Along the training", "The validation set along the training, a line for each run.", path)
    ]
