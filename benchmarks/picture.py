"""How many times faster than stock Pyro: a panel for each batch size, a band for each model, a line for each way."""

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from benchmarks.contenders import CASES, COMPILED, EAGER, HAND, HAND_COMPILED, SCAN, SEVERAL, STOCK
from benchmarks.timing import Times, ratio
from inference.canvas import BLUE, HAIRLINE, INK, MUTED, PAPER, RUST, WIDTH, axis_labels, heading, panel, save, sheet

# Whose it is is a colour, and what compiles the whole step is filled.
SHOWN: dict[str, dict[str, Any]] = {
    HAND: {"color": MUTED, "markerfacecolor": PAPER, "marker": "o"},
    HAND_COMPILED: {"color": MUTED, "marker": "o"},
    SCAN: {"color": BLUE, "marker": "o"},
    EAGER: {"color": RUST, "markerfacecolor": PAPER, "marker": "o"},
    COMPILED: {"color": RUST, "marker": "o"},
    SEVERAL: {"color": RUST, "marker": "D"},
}
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100)
ROW, BETWEEN, LEFT, GAP, BELOW, ABOVE = 25, 26, 310, 46, 105, 235  # pixels; BETWEEN parts two models


def picture(cases: dict[str, Any], which: str, path: Path) -> None:
    """Draw the ratios of a benchmark.

    Args:
        cases: by model and batch size, the times of each contender.
        which: of the times, as in "processor milliseconds".
        path: of the PNG.
    """
    found = {case: {size: _ratios(row[which]) for size, row in cases[case].items()} for case in CASES if case in cases}
    sizes = sorted({size for rows in found.values() for size in rows}, key=int)
    ends = [end for rows in found.values() for row in rows.values() for one in row.values() for end in one.values()]
    tall = len(found) * (len(SHOWN) * ROW + BETWEEN)
    figure = sheet(WIDTH, BELOW + tall + ABOVE)
    wide = (WIDTH - LEFT - 40 - GAP * (len(sizes) - 1)) / len(sizes)
    for place, size in enumerate(sizes):
        axes = panel(figure, LEFT + place * (wide + GAP), BELOW, wide, tall, spines="bottom")
        heading(axes, f"batch {size}")
        for band, rows in enumerate(found.values()):
            _band(axes, band, rows.get(size, {}))
        _frame(axes, list(found), named=place == 0)
        axes.set_xlim(min(ends) / 1.15, max(ends) * 1.7)  # room for the number behind
    middle = figure.axes[len(sizes) // 2]
    axis_labels(middle, f"times faster than Pyro's SVI in {which.rpartition(' ')[0] or 'clock'} time")
    handles = [Line2D([], [], linestyle="none", markersize=6, label=name, **style) for name, style in SHOWN.items()]
    corner = (LEFT - 20) / WIDTH, 1 - 20 / (BELOW + tall + ABOVE)
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=corner, ncols=2, frameon=False, fontsize=10.5, labelcolor=INK
    )
    save(figure, path)


def _ratios(times: Times) -> dict[str, dict[str, float]]:
    """How many times faster than Pyro's SVI, of each way that is shown and was measured."""
    return {name: ratio(times, STOCK, name) for name in SHOWN if name in times and STOCK in times}


def _band(axes: Axes, band: int, found: dict[str, dict[str, float]]) -> None:
    """The lines of one model: from 1, which is Pyro's SVI, to the median, and the quartiles across its end."""
    for row, (name, style) in enumerate(SHOWN.items()):
        if name not in found:
            continue
        middle, low, high = (found[name][which] for which in ("median", "low quartile", "high quartile"))
        at = _at(band, row)
        axes.plot([1, middle], [at, at], color=style["color"], linewidth=0.8, alpha=0.5)
        axes.plot([low, high], [at, at], color=style["color"], linewidth=2.2)
        axes.plot(middle, at, markersize=5.5, linestyle="none", **style)
        if name == COMPILED:
            axes.annotate(f"{middle:.1f}", (max(middle, high), at), (8, 0), textcoords="offset points", va="center",
                          fontsize=10, color=RUST)  # fmt: skip
    if not found:
        at = (_at(band, 0) + _at(band, len(SHOWN) - 1)) / 2
        axes.annotate("not measured", (1, at), (8, 0), textcoords="offset points", va="center", fontsize=10,
                      color=MUTED)  # fmt: skip


def _at(band: int, row: int) -> float:
    """Pixels from the top of a panel."""
    return band * (len(SHOWN) * ROW + BETWEEN) + BETWEEN / 2 + (row + 0.5) * ROW


def _frame(axes: Axes, cases: list[str], named: bool) -> None:
    axes.set_xscale("log")
    axes.set_ylim(_at(len(cases), 0) - (BETWEEN + ROW) / 2, 0)
    axes.minorticks_off()
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_yticks([])
    for tick in TICKS:
        axes.axvline(tick, color=INK if tick == 1 else HAIRLINE, linewidth=0.8 if tick == 1 else 0.6, zorder=0)
    for band in range(1, len(cases)):
        axes.axhline(_at(band, 0) - (BETWEEN + ROW) / 2, color=HAIRLINE, linewidth=0.6, zorder=0)
    if not named:
        return
    for band, case in enumerate(cases):
        middle = (_at(band, 0) + _at(band, len(SHOWN) - 1)) / 2
        name = "\n".join(textwrap.wrap(CASES[case], 21, break_on_hyphens=False))
        axes.annotate(name, (0, middle), (-10, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", va="center", fontsize=10.5, color=INK)  # fmt: skip
