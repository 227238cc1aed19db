"""Pictures of the study of EM beside SVI."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse, Patch
from torch import Tensor

from inference.canvas import (
    BLUE,
    CLASS_COLOURS,
    HAIRLINE,
    INK,
    MUTED,
    RUST,
    WIDTH,
    axis_labels,
    dots,
    heading,
    panel,
    save,
    sheet,
    thin,
)
from inference.figures import Figure
from inference.studies.counterexample import STEP, Outcome, log_densities
from inference.studies.traces import Point, Trace
from models.gmm import GaussianMixture

SHOWN = 6  # iterations in the bars
LEAST = 1e-7  # what a logarithmic scale shows of less
TINTS = {"EM": INK, "variational EM": CLASS_COLOURS[4], "exact": BLUE, "amortized": CLASS_COLOURS[1],
         "relaxed": CLASS_COLOURS[2], "uniform": RUST, "diagonal": RUST}  # fmt: skip


def bars(trace: Trace, folder: Path) -> Figure:
    """Bound and gap after each half step of those iterations in which most happens, and the gap along the whole run."""
    name = trace.way.replace(" ", "_")
    figure = sheet(WIDTH, 800)
    left = panel(figure, 160, 200, 870, 500)
    points = _liveliest(_half_steps(trace))
    _stack(left, points)
    heading(left, f"{trace.way[0].upper()}{trace.way[1:]}, iterations {points[0].iteration} to {points[-1].iteration}")
    axis_labels(left, "", "nats per datum")
    labels = [Patch(color=BLUE, label="bound F(q, θ)"), Patch(color=RUST, label="gap, log p(x) − F")]
    below: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.18), "ncols": 2}  # where no bar can be
    left.legend(handles=labels, frameon=False, fontsize=10.5, labelcolor=INK, **below)
    right = panel(figure, 1180, 200, 390, 500)
    _gap_by_half_step(right, _half_steps(trace))
    heading(right, "The gap along the run")
    axis_labels(right, "iteration", "nats per datum")
    save(figure, folder / f"bars_{name}.png")
    what = (
        "After every E step there is no red: q is the posterior. Every M step lifts the blue, and the top by more."
        if trace.way == "EM"
        else "E steps move a network's q towards the posterior and do not reach it, so that some red stays. M steps "
        "are those of EM, of that q: log p(x) may then fall, while the bound, which every half step climbs, does not."
    )
    caption = (
        "The top of each bar is log p(x), the blue part the bound, and the red rest the gap, KL(q ‖ posterior), with "
        f"its size above. {what} Right: the gap after E steps (dots) and after M steps (rings)."
    )
    title = "EM: E closes the gap, M opens it" if trace.way == "EM" else "Variational EM: E narrows the gap"
    return Figure(f"bars_{name}", title, caption, folder / f"bars_{name}.png")


def _half_steps(trace: Trace) -> list[Point]:
    """All but those of the first iteration, whose rise would dwarf every other, where there are others."""
    points = [point for point in trace.points if point.kind in ("E", "M")]
    return points[2:] or points


def _liveliest(points: Sequence[Point]) -> Sequence[Point]:
    """The half steps of those successive iterations in which the gap opens most."""
    windows = [points[start : start + 2 * SHOWN] for start in range(0, max(1, len(points) - 2 * SHOWN + 1), 2)]
    return max(windows, key=lambda some: sum(point.gap for point in some))


def _stack(axes: Axes, points: Sequence[Point]) -> None:
    places = np.arange(len(points)) + 0.35 * (np.arange(len(points)) // 2)  # pairs stand together
    bound, top = np.array([p.bound for p in points]), np.array([p.log_p for p in points])
    rise = top.max() - bound.min()
    floor = bound.min() - 0.15 * rise
    tints = [BLUE if p.kind == "E" else "#6f96bd" for p in points]
    axes.bar(places, bound - floor, bottom=floor, width=0.86, color=tints)
    axes.bar(places, top - bound, bottom=bound, width=0.86, color=RUST)
    axes.hlines(top, places - 0.43, places + 0.43, color=INK, linewidth=1.4)
    for place, point in zip(places, points, strict=True):
        gap = 0.0 if abs(point.gap) < 1e-9 else point.gap
        text = "0" if gap == 0 else f"{gap:.3f}" if gap >= 5e-4 else "<0.0005"
        axes.text(place, point.log_p + 0.015 * rise, text, ha="center", color=RUST, fontsize=8.5)
    axes.set_xticks(places, [f"{p.kind}\n{p.iteration if p.kind == 'E' else ' '}" for p in points])
    axes.set_ylim(floor, top.max() + 0.1 * rise)
    axes.tick_params(axis="x", length=0)


def _gap_by_half_step(axes: Axes, points: Sequence[Point]) -> None:
    for kind, face, label in (("M", "none", "after M"), ("E", INK, "after E")):
        some = [p for p in points if p.kind == kind]
        gap = np.maximum([p.gap for p in some], 0.0)
        places = [p.iteration + (0.5 if kind == "M" else 0.0) for p in some]
        tint = RUST if kind == "M" else INK
        axes.scatter(places, gap, s=14, facecolors=face if kind == "M" else tint, edgecolors=tint, linewidths=0.9,
                     label=label, zorder=3)  # fmt: skip
    order = [(p.iteration + (0.5 if p.kind == "M" else 0.0), max(p.gap, 0.0)) for p in points]
    axes.plot(*np.array(order).T, color=HAIRLINE, linewidth=0.9, zorder=1)
    axes.set_ylim(bottom=-0.03 * max(gap for _, gap in order))
    axes.set_xscale("log")  # most happens in the first few of perhaps hundreds
    axes.legend(frameon=False, fontsize=10.5, labelcolor=INK)


def curves(traces: Sequence[Trace], folder: Path) -> Figure:
    """log p(x) against passes over the data, and how far each is from EM's end."""
    figure = sheet(WIDTH, 1180)
    top, bottom = panel(figure, 140, 660, 1080, 460), panel(figure, 140, 110, 1080, 440)
    best = max(max(trace.log_p) for trace in traces)
    for trace in traces:
        passes = np.array([point.passes for point in trace.points])
        width = 2.2 if trace.way == "EM" else 1.1
        top.plot(passes, trace.log_p, color=_tint(trace), linewidth=width, label=trace.way)
        bottom.plot(passes, np.maximum(best - np.array(trace.log_p), LEAST), color=_tint(trace), linewidth=width)
    low = min(trace.points[-1].log_p for trace in traces)
    low = min(low, float(np.quantile(np.concatenate([trace.log_p for trace in traces]), 0.1)))
    top.set_ylim(low - 0.25 * (best - low), best + 0.12 * (best - low))
    for axes in (top, bottom):
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=0)
    bottom.set_yscale("log")
    heading(top, "log p(x) of the training data")
    heading(bottom, "How far below the best")
    axis_labels(top, "", "nats per datum")
    axis_labels(bottom, "passes over the data", "nats per datum")
    bottom.axhline(0.02, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    bottom.text(0.05, 0.021, "0.02 nats", color=MUTED, fontsize=9, va="bottom")
    top.legend(frameon=False, fontsize=11, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    save(figure, folder / "curves.png")
    caption = (
        "EM (dark) rises with every iteration. SVI wavers on the way, by the noise of its batches and, where q is not "
        "the posterior, because the bound and log p(x) want different things; its learning rate falls to zero at the "
        "end. The lower panel shows the same as a distance from the best log p(x) of all, on a logarithmic scale."
    )
    return Figure("curves", "log p(x) along the way", caption, folder / "curves.png")


def gaps(traces: Sequence[Trace], folder: Path) -> Figure:
    """The gap of every fit against passes over the data."""
    figure = sheet(WIDTH, 640)
    axes = panel(figure, 140, 110, 1080, 460)
    for trace in traces:
        points = [p for p in trace.points if p.kind != "E" or trace.way != "EM"]
        passes, gap = [p.passes for p in points], [max(p.gap, LEAST) for p in points]
        style = ".--" if trace.way == "EM" else "-"
        label = "EM, after M steps" if trace.way == "EM" else trace.way
        axes.plot(passes, gap, style, color=_tint(trace), linewidth=1.2, markersize=7, label=label)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=LEAST / 2)
    axis_labels(axes, "passes over the data", "log p(x) − bound, nats per datum")
    axes.legend(frameon=False, fontsize=11, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    save(figure, folder / "gaps.png")
    caption = (
        f"KL(q(z|x) ‖ p(z|x)) along the way, {LEAST:g} standing for anything below. EM's is zero after every E "
        "step; that of SVI under the exact posterior is always zero. A network follows the posterior at a "
        "distance. A fixed q has no gap in the end only where the model has given up what such a q cannot express."
    )
    return Figure("gaps", "The gap along the way", caption, folder / "gaps.png")


def ellipses(fitted: Mapping[str, Any], x: Tensor, folder: Path) -> list[Figure]:
    """The components of every fit of a mixture over data of two numbers; nothing for other models and data."""
    models = {way: getattr(model, "mixture", model) for way, model in fitted.items()}
    if x.shape[1:] != (2,) or not all(isinstance(model, GaussianMixture) for model in models.values()):
        return []
    width = (WIDTH - 120) // len(models)
    figure = sheet(WIDTH, width + 170)
    rows = thin(x.cpu().numpy())
    ends = rows.min(0), rows.max(0)
    margin = 0.3 * (ends[1] - ends[0])
    for place, (way, model) in enumerate(models.items()):
        axes = panel(figure, 90 + place * width, 100, width - 30, width - 30)
        dots(axes, rows, MUTED, size=5, opacity=0.5)
        for component in range(model.num_states):
            _ellipse(axes, model, component)
        axes.set(xlim=(ends[0][0] - margin[0], ends[1][0] + margin[0]))
        axes.set(ylim=(ends[0][1] - margin[1], ends[1][1] + margin[1]))
        axes.tick_params(labelleft=place == 0)
        heading(axes, way)
    save(figure, folder / "fits.png")
    caption = "The mixtures at the end: each component's ellipses hold 50 % and 90 % of it; the darker, the heavier."
    return [Figure("fits", "What was fitted", caption, folder / "fits.png")]


@torch.no_grad()
def _ellipse(axes: Axes, model: GaussianMixture, component: int) -> None:
    values, vectors = np.linalg.eigh(model.covariances[component].cpu().numpy())
    angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
    centre, weight = model.loc[component].cpu().numpy(), float(model.weights[component])
    for mass in (0.5, 0.9):
        radius = np.sqrt(-2 * np.log(1 - mass))
        size = 2 * radius * np.sqrt(values)
        shape = Ellipse((centre[0], centre[1]), size[1], size[0], angle=angle, fill=False, edgecolor=BLUE,
                        linewidth=1.3, alpha=min(1.0, 0.25 + weight))  # fmt: skip
        axes.add_patch(shape)


def counterexample(outcomes: Mapping[str, Outcome], folder: Path) -> Figure:
    """log p(x) and the held bound as functions of theta, and where one step of each leads."""
    figure = sheet(WIDTH, 720)
    axes = panel(figure, 130, 110, 1010, 530)
    ends = [0.0, *(outcome.theta for outcome in outcomes.values())]
    theta = torch.linspace(min(ends) - 0.9, max(ends) + 0.5, 400, dtype=torch.float64)
    log_p, bound = log_densities(theta)
    axes.plot(theta, log_p, color=INK, linewidth=1.8, label="log p(x)")
    axes.plot(theta, bound, color=BLUE, linewidth=1.8, label="bound with q held at 0.1")
    svi, em = outcomes["SVI"], outcomes["EM"]
    for outcome, tint, label in ((svi, RUST, "a step of SVI"), (em, CLASS_COLOURS[2], "an iteration of EM")):
        _arrow(axes, (0.0, outcome.log_p_before), (outcome.theta, outcome.log_p_after), tint)
        axes.plot([], [], color=tint, linewidth=1.8, label=label)
    _arrow(axes, (0.0, svi.bound_before), (svi.theta, svi.bound_after), RUST)
    axes.plot([0, 0], [svi.bound_before, svi.log_p_before], "o", color=INK, markersize=5, zorder=4)
    axes.set_ylim(float(bound[theta < 0.5].min()) - 0.1, float(log_p.max()) + 0.15)
    axis_labels(axes, "θ, the log-odds of the component at the datum", "nats")
    axes.legend(frameon=False, fontsize=11, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    save(figure, folder / "counterexample.png")
    caption = (
        "From θ = 0 the bound under a poor q goes up to the left, and a gradient step follows it "
        f"(learning rate {STEP:g}): the bound rises, log p(x) falls. EM first makes q the posterior, and goes right."
    )
    return Figure("counterexample", "Hill climbing on the wrong hill", caption, folder / "counterexample.png")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], tint: str) -> None:
    style = {"arrowstyle": "-|>", "color": tint, "linewidth": 2.0, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
    axes.annotate("", xy=end, xytext=start, arrowprops=style, zorder=5)


def _tint(trace: Trace) -> str:
    return TINTS[trace.way.rpartition(", ")[2]]
