"""The page of the study of estimators: one picture, one table, and what each target is held against."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from inference.canvas import BLUE, CLASS_COLOURS, INK, MUTED, RUST, WIDTH, axis_labels, heading, panel, save, sheet
from inference.canvas import Sheet as Canvas
from inference.figures import Figure
from inference.gradient_moments import CLEAR
from inference.studies.estimator_list import (
    BASELINE,
    CONTROLLED,
    KINDS,
    PATH_ONLY,
    PATHWISE,
    RELAXED,
    SCORE,
    SUMMED,
    TARGETS,
    WEIGHTED,
)
from inference.study import Section
from inference.table import Table

if TYPE_CHECKING:
    from inference.studies.estimators import EstimatorsSettings

Record = dict[str, Any]
TINTS = {
    PATHWISE: BLUE,
    PATH_ONLY: CLASS_COLOURS[2],
    SCORE: RUST,
    BASELINE: CLASS_COLOURS[1],
    CONTROLLED: CLASS_COLOURS[5],
    WEIGHTED: CLASS_COLOURS[4],
    RELAXED: CLASS_COLOURS[6],
    SUMMED: MUTED,
}
DASHES: dict[str, Any] = {"ELBO": "-", "IWAE": (0, (5, 2)), "wake": (0, (6, 2, 1, 2))}
ROUNDING = 1e-3  # relative bias that single precision makes by itself where the gradient nearly vanishes
OTHERS = (0, (1, 1.4))
PANELS = (  # title, block, what is drawn
    ("bias / |gradient|", "guide", "bias"),
    ("variance", "guide", "variance"),
    ("S/N in the guide", "guide", "signal_to_noise"),
    ("S/N in the model", "model", "signal_to_noise"),
    ("variance × ms", "guide", "variance_x_milliseconds"),
)


def intro(settings: "EstimatorsSettings") -> list[str]:
    """What is asked, and how it is measured."""
    return [
        f"The gradient of a bound per datum, for one batch of {settings.data} data at fixed parameters, drawn "
        f"{settings.repeats:,} times by each estimator: at the start and along the training of a VAE, on a "
        "linear-Gaussian model whose integrals are in closed form, and with six bits whose states can be summed over. "
        "Estimators of one target have one expectation; what differs is how far a draw lies from it and what it costs.",
        "The squared bias is |E g − exact|² / |exact|² in all directions, with the Monte-Carlo noise of both taken "
        "off, so that it falls on either side of zero for an unbiased estimator. The variance is the trace of the "
        "covariance. Signal to noise is |E g| over the root of the variance, noise taken off again; a dash says "
        "that it cannot be told from none. Milliseconds are of processor time for one loss and gradient; kB are "
        "what autograd keeps between the passes. Baselines have learnt before, at the same parameters, for "
        f"{settings.warm_up} steps.",
    ]


def sections(records: list[Record], folder: Path) -> list[Section]:
    """The picture, the table of the guide's gradient, and the references."""
    rows = [
        {
            "place": r["where"],
            "target": r["target"],
            "estimator": r["estimator"],
            "K": r["particles"],
            "squared bias": _with_error(r, "squared_bias"),
            "variance": _short(r["variance"]),
            "S/N": _short(r["signal_to_noise"]),
            "S/N, model": _short(model["signal_to_noise"]),
            "ms": f"{r['milliseconds']:.2f}",
            "kB": f"{r['saved_bytes'] / 1024:.0f}",
            "variance × ms": _short(r["variance_x_milliseconds"]),
        }
        for r, model in zip(of_block(records, "guide"), of_block(records, "model"), strict=True)
    ]
    found = dict.fromkeys((r["where"], r["target"], r["block"], r["reference"]) for r in records)
    held = [dict(zip(("place", "target", "of the", "held against"), row, strict=True)) for row in found]
    meanings = [f"{name}: {TARGETS[name]}." for name in dict.fromkeys(r["target"] for r in records)]
    return [
        Section("Bias, variance, signal, cost", (), None, [draw(records, folder / "figures" / "estimators.png")]),
        Section(
            "Every estimator", [_ABOUT], Table.from_records(_without_repeats(rows, ("place", "target", "estimator")))
        ),
        Section("What each is held against", meanings, Table.from_records(held)),
    ]


_ABOUT = (
    "Of the gradient in the guide, where not said otherwise; table.csv has the model's too, and the bias along the "
    "exact gradient."
)


def _without_repeats(rows: list[Record], columns: Sequence[str]) -> list[Record]:
    """Each row without those of the first columns that say what the row above says."""
    shown: list[Record] = []
    above: Record = dict.fromkeys(columns)
    for row in rows:
        same = next((i for i, key in enumerate(columns) if row[key] != above[key]), len(columns))
        words = {key: "" if i < same else str(row[key]) for i, key in enumerate(columns)}
        words[columns[-1]] = words[columns[-1]].replace(" ", "\u00a0")
        shown.append({**row, **words})
        above = {key: row[key] for key in columns}
    return shown


def of_block(records: list[Record], block: str) -> list[Record]:
    """The records of one block of parameters."""
    return [record for record in records if record["block"] == block]


def _with_error(record: Record, name: str) -> str:
    if record[name] is None:
        return "—"
    return f"{record[name]:+.1g}\u202f±\u202f{record[f'{name}_stderr']:.1g}"


def _short(value: float | None) -> str:
    return "—" if value is None else f"{value:.3g}"


def draw(records: list[Record], path: Path) -> Figure:
    """A row of panels for each place, everything against the number of particles."""
    places = list(dict.fromkeys(record["where"] for record in records))
    pitch, top, foot = 270, 70, 250
    figure = sheet(WIDTH, top + pitch * len(places) + foot)
    for row, place in enumerate(places):
        here = [record for record in records if record["where"] == place]
        bottom = foot + pitch * (len(places) - 1 - row) + 30
        _name_row(figure, place, bottom + 100)
        for column, (title, block, key) in enumerate(PANELS):
            axes = panel(figure, 225 + 278 * column, bottom, 200, 195)
            if row == 0:
                heading(axes, title)
                axes.title.set_fontsize(9)
            _draw_panel(axes, of_block(here, block), key)
            if row == len(places) - 1:
                axis_labels(axes, "particles K")
    _legend(figure)
    save(figure, path)
    return Figure(
        path.stem,
        "Estimators of the gradient",
        "One row for each place, everything against the number of particles; colours say how a gradient is taken, "
        "lines what it is the gradient of. Bias, in all directions: filled circles can be told from zero by "
        f"{CLEAR:.0f} standard errors; open triangles are unbiased as far as could be seen, and stand at that limit. "
        "Relaxed draws, and normalized weights for the targets of TVO and wake-sleep, are biased by design. S/N, "
        "signal to noise: higher is better; that of importance-weighted bounds sinks in the guide as K grows "
        "and rises in the model. Variance × ms: lower is better, the variance bought at a given time.",
        path,
    )


def _name_row(figure: Canvas, place: str, height: float) -> None:
    across, up = figure.get_size_inches() * figure.dpi
    words = "\n".join(textwrap.wrap(place.replace("-", "- "), 11)).replace("- ", "-")
    figure.text(20 / across, height / up, words, fontsize=9.5, color=INK, va="center")


def _draw_panel(axes: Axes, records: list[Record], key: str) -> None:
    for target, name in dict.fromkeys((r["target"], r["estimator"]) for r in records):
        line = [r for r in records if (r["target"], r["estimator"]) == (target, name)]
        tint, dashes = TINTS[line[0]["kind"]], DASHES.get(_family(target), OTHERS)
        points = _biases(axes, line, tint) if key == "bias" else [(r["particles"], r[key]) for r in line if r[key]]
        if points:
            axes.plot(*zip(*points, strict=True), "o", linestyle=dashes, color=tint, markersize=2.6, linewidth=0.9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    counts = sorted({r["particles"] for r in records})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlim(counts[0] / 1.3, counts[-1] * 1.3)
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,), numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8)


def _tick(value: float) -> str:
    return f"{value:g}" if 1e-3 <= value < 1e4 else f"$10^{{{round(math.log10(value))}}}$"


def _biases(axes: Axes, line: list[Record], tint: str) -> list[tuple[int, float]]:
    """The biases that are there; of the others the limit is marked, below which they would not be seen."""
    seen = []
    for record in line:
        value, error = record["squared_bias"], record["squared_bias_stderr"]
        if value is None:
            continue
        if value > max(CLEAR * error, ROUNDING**2):
            seen.append((record["particles"], value**0.5))
        elif error > 0:
            limit = (max(value, 0.0) + CLEAR * error) ** 0.5
            axes.plot(record["particles"], limit, "v", color=tint, fillstyle="none", markersize=3, markeredgewidth=0.5,
                      alpha=0.7)  # fmt: skip
    return seen


def _family(target: str) -> str:
    return "wake" if target in ("wake", "sleep", "wake and sleep") else target


def _legend(figure: Canvas) -> None:
    across, up = figure.get_size_inches() * figure.dpi
    kinds = [Line2D([], [], color=TINTS[kind], marker="o", markersize=4, linewidth=1.6, label=kind) for kind in KINDS]
    names = {"ELBO": "of the ELBO", "IWAE": "of the IWAE bound", "wake": "of wake-sleep's targets"}
    lines = [Line2D([], [], color=INK, linestyle=DASHES[key], linewidth=1.2, label=names[key]) for key in DASHES]
    lines.append(Line2D([], [], color=INK, linestyle=OTHERS, linewidth=1.2, label="of other bounds"))
    for handles, height, columns in ((kinds, 130, 4), (lines, 50, 4)):
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(215 / across, height / up), ncols=columns,
                      frameon=False, fontsize=9, labelcolor=INK, borderpad=0, columnspacing=1.6)  # fmt: skip
