"""Pictures of the study of rate and distortion."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from inference.canvas import BLUE, FAINT, HAIRLINE, INK, RUST, WIDTH, axis_labels, heading, panel, save, sheet
from inference.figures import Figure


def draw_frontier(results: Sequence[Mapping[str, Any]], folder: Path) -> Figure:
    """Distortion against rate, in nats and, where there is one, in squared error."""
    figure = sheet(WIDTH, 760)
    panels = [("test/distortion", "D = −E log p(x|z), nats")]
    if all(result["test/squared_error"] is not None for result in results):
        panels.append(("test/squared_error", "D = E |x − x′|²"))
    for place, (key, title) in enumerate(panels):
        axes = panel(figure, 120 + place * 790, 115, 660, 570)
        points = np.array([(r["test/rate"], r[key]) for r in results])
        if place == 0:
            _diagonals(axes, points)
        _marked(axes, results, points, name_at="upper right")
        hull = lower_hull(points)
        axes.plot(*hull.T, color=BLUE, linewidth=1.2, zorder=1)
        heading(axes, title)
        axis_labels(axes, "rate R, nats")
    path = folder / "frontier.png"
    save(figure, path)
    caption = (
        "Each dot is a run, named by its β; the line is the lower convex hull of them all. Along a grey diagonal "
        "R + D, and with it the ELBO, is the same."
    )
    if len(panels) > 1:
        caption += " Right: the same runs with the squared error of the reconstruction."
    return Figure("frontier", "Rate and distortion", caption, path)


def lower_hull(points: np.ndarray) -> np.ndarray:
    """The lower left convex hull of points ``(n, 2)``, from the left, as long as it falls."""
    hull: list[np.ndarray] = []
    for point in points[np.lexsort((points[:, 1], points[:, 0]))]:
        while len(hull) > 1 and _turns_right(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    lowest = int(np.argmin([point[1] for point in hull]))
    return np.array(hull[: lowest + 1])


def _turns_right(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> bool:
    (a, b), (c, d) = second - first, third - second
    return bool(a * d - b * c <= 0)


def _diagonals(axes: Axes, points: np.ndarray) -> None:
    """Lines of constant R + D across the frame of the points."""
    low, high = points.min(0), points.max(0)
    room = 0.06 * (high - low)
    axes.set(xlim=(low[0] - room[0], high[0] + room[0]), ylim=(low[1] - room[1], high[1] + room[1]))
    sums = np.linspace(points.sum(1).min(), points.sum(1).max(), 6)
    for total in sums:
        axes.axline((low[0], total - low[0]), slope=-1, color=HAIRLINE, linewidth=0.8, zorder=0)


def _marked(axes: Axes, results: Sequence[Mapping[str, Any]], points: np.ndarray, name_at: str) -> None:
    """Dots, the first of each beta with its name."""
    named: set[str] = set()
    axes.plot(*points.T, "o", color=BLUE, markersize=4.5)
    for result, (across, up) in zip(results, points, strict=True):
        if result["beta"] not in named:
            named.add(result["beta"])
            axes.annotate(
                result["beta"], (across, up), xytext=(5, 5), textcoords="offset points", fontsize=10, color=INK
            )


def draw_tradeoff(results: Sequence[Mapping[str, Any]], folder: Path) -> Figure:
    """R + D against R, and the lines D + beta R with their envelope."""
    figure = sheet(WIDTH, 700)
    axes = panel(figure, 120, 115, 620, 500)
    ordered = sorted(results, key=lambda r: r["test/rate"])
    rate = np.array([r["test/rate"] for r in ordered])
    total = np.array([r["test/rate"] + r["test/distortion"] for r in ordered])
    axes.plot(rate, total, "o-", color=BLUE, markersize=4.5, linewidth=1.0, label="R + D = −ELBO")
    axes.plot(rate, [r["test/nll"] for r in ordered], "o-", color=RUST, markersize=4, linewidth=1.0, label="−log p(x)")
    best = int(np.argmin(total))
    axes.annotate(f"β = {ordered[best]['beta']}", (rate[best], total[best]), xytext=(0, 9), textcoords="offset points",
                  fontsize=10.5, color=INK, ha="center")  # fmt: skip
    heading(axes, "R + D")
    axis_labels(axes, "rate R, nats", "nats")
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    axes = panel(figure, 900, 115, 660, 500)
    own = np.array([float(r["beta"]) for r in results])
    betas = np.geomspace(own.min() / 1.5, own.max() * 1.5, 200)
    rates, distortions = (np.array([r[f"test/{name}"] for r in results]) for name in ("rate", "distortion"))
    lines = distortions[:, None] + betas * rates[:, None]  # (runs, betas)
    for line in lines:
        axes.plot(betas, line, color=FAINT, linewidth=0.6)
    envelope = lines.min(0)
    axes.plot(betas, envelope, color=INK, linewidth=1.6, label="lower envelope")
    axes.plot(own, distortions + own * rates, "o", color=BLUE, markersize=4.5, label="each run at its own β")
    axes.set_xscale("log")
    axes.set_xticks(np.unique(own), [f"{beta:g}" for beta in np.unique(own)])
    axes.minorticks_off()
    room = 0.08 * np.ptp(envelope)
    axes.set_ylim(envelope.min() - room, envelope.max() + 3 * room)
    heading(axes, "D + β R")
    axis_labels(axes, "β")
    axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="lower right")
    path = folder / "envelope.png"
    save(figure, path)
    caption = (
        "Left: the bound is best at the β that is named, on training data at 1; to its left the code is too poor, to "
        "its right it costs more than it saves. Right: a dot above the black line is a run that another run, trained "
        "for another β, beats at its own game."
    )
    return Figure("envelope", "What R and D add up to", caption, path)


def draw_linear(
    results: Sequence[Mapping[str, Any]],
    linear: Sequence[Mapping[str, Any]],
    curve: Sequence[tuple[float, float]],
    folder: Path,
) -> Figure:
    """Squared error against rate: water-filling, linear VAEs trained by gradient, deep ones."""
    figure = sheet(WIDTH, 800)
    axes = panel(figure, 130, 115, 1000, 620)
    line = np.array(curve)
    deep = np.array(sorted((r["train/rate"], r["train/squared_error"]) for r in results))
    axes.plot(*line.T, color=RUST, linewidth=1.4, label="reverse water-filling")
    axes.plot([r["rate"] for r in linear], [r["distortion"] for r in linear], "o", color=RUST, markersize=6,
              label="linear VAEs, trained")  # fmt: skip
    axes.plot(*deep.T, "o-", color=BLUE, markersize=5, linewidth=1.0, label="deep VAEs")
    for row in linear:
        axes.annotate(f"{row['beta']:g}", (row["rate"], row["distortion"]), xytext=(6, 5), textcoords="offset points",
                      fontsize=10, color=INK)  # fmt: skip
    top = max(deep[:, 0].max(), max(row["rate"] for row in linear))
    axes.set_xlim(-0.02 * top, 1.05 * top)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=11, labelcolor=INK)
    axis_labels(axes, "rate R, nats", "squared error, training data")
    path = folder / "linear.png"
    save(figure, path)
    caption = (
        "Red: the Gaussian optimum and linear VAEs trained by gradient, named by their β. Blue: VAEs with nets. "
        "Below the curve a net uses what is not Gaussian in the data; above it, it does worse than a linear code can."
    )
    return Figure("linear", "Against reverse water-filling", caption, path)
