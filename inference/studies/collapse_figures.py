"""Pictures of the study of posterior collapse."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from inference.canvas import (
    BLUE,
    CLASS_COLOURS,
    HAIRLINE,
    INK,
    MUTED,
    PAPER,
    RUST,
    WIDTH,
    axis_labels,
    colour,
    ground_is_low,
    heading,
    mosaic,
    panel,
    save,
    sheet,
)
from inference.figures import Figure, Gallery

DEPTH = LinearSegmentedColormap.from_list("depth", [PAPER, "#c3d3e2", "#2a5d8f", "#173a5e"])
SHOWN = 8  # images of each kind in a band


def draw_phases(rows: Sequence[Mapping[str, Any]], decoders: Sequence[str], folder: Path) -> Figure:
    """Active units and mutual information over beta and capacity."""
    betas = sorted({float(row["beta"]) for row in rows})
    height = 92 * len(decoders)
    figure = sheet(WIDTH, height + 210)
    panels = (("test/active_units", "Active units", "{:.0f}"), ("test/mutual_information", "I(x; z), nats", "{:.1f}"),
              ("test/nll", "−log p(x), nats", "{:.1f}"))  # fmt: skip
    left = 60 + 14 * max(len(_short(name)) for name in decoders)  # the names stand there
    side = (WIDTH - left - 60 - 2 * 40) // 3
    for place, (key, title, form) in enumerate(panels):
        values = np.full((len(decoders), len(betas)), np.nan)
        for row in rows:
            values[decoders.index(row["decoder"]), betas.index(float(row["beta"]))] = row[key]
        axes = panel(figure, left + place * (side + 40), 105, side, height, spines="")
        top = np.nanmax(values) if place < 2 else np.nan
        shade = values / max(top, 1e-9) if place < 2 else 0.55 * _unit(values)
        axes.imshow(shade, cmap=DEPTH, vmin=0, vmax=1.15, aspect="auto", origin="lower")
        for (i, j), value in np.ndenumerate(values):
            tint = PAPER if shade[i, j] > 0.6 else INK
            axes.text(j, i, form.format(value), ha="center", va="center", fontsize=11, color=tint)
        axes.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
        axes.set_yticks(range(len(decoders)), [_short(name) for name in decoders] if place == 0 else [])
        axes.tick_params(length=0)
        heading(axes, title)
        axis_labels(axes, "β, the weight of the KL")
    path = folder / "phases.png"
    save(figure, path)
    caption = (
        "Weight of the KL across, capacity of the decoder upwards, mean over seeds of held-out data. Left: latent "
        "dimensions whose posterior mean moves. Middle: what the code knows about the datum. Right: the fit, paler is "
        "better. White cells to the left have collapsed."
    )
    return Figure("phases", "β × capacity", caption, path)


def _unit(values: np.ndarray) -> np.ndarray:
    low, high = np.nanmin(values), np.nanmax(values)
    return (values - low) / max(high - low, 1e-9)


def _short(name: str, most: int = 24) -> str:
    """A word of the study, or run.py words without their groups."""
    text = " ".join(word.partition("=")[2] or word for word in name.split()).replace("_", " ")
    return text if len(text) <= most else text[: most - 1] + "…"


def _wrapped(name: str, most: int = 18) -> str:
    """The same of a remedy, one joined by plus signs on as many lines as it takes."""
    if "+" not in name or "=" in name:
        return _short(name, most + 2)
    lines = [""]
    for part in name.replace("_", " ").replace("+", "+\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > most:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def draw_transition(
    linear: Sequence[Mapping[str, Any]],
    stairs: Sequence[tuple[float, int]],
    deep: Sequence[Mapping[str, Any]],
    decoders: Sequence[str],
    folder: Path,
) -> Figure:
    """Active units against beta: the linear VAE on its closed form, and the deep ones."""
    figure = sheet(WIDTH, 640)
    axes = panel(figure, 110, 115, 670, 450)
    betas = [row["beta"] for row in linear]
    axes.step(*zip(*stairs, strict=True), where="post", color=RUST, linewidth=1.2, label="#{λ > β s²}")
    axes.plot(betas, [row["active"] for row in linear], "o", color=BLUE, markersize=5, label="trained linear VAEs")
    _frame(axes, "Linear VAE: active units", betas)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    axes = panel(figure, 880, 115, 670, 450)
    for place, decoder in enumerate(decoders):
        line = sorted((float(r["beta"]), r["test/active_units"], r["test/active_units_stderr"] or 0.0)
                      for r in deep if r["decoder"] == decoder)  # fmt: skip
        if line:
            across, up, error = zip(*line, strict=True)
            axes.errorbar(across, up, error, fmt="o-", color=CLASS_COLOURS[place % len(CLASS_COLOURS)], markersize=4,
                          linewidth=1.3, label=_short(decoder))  # fmt: skip
    _frame(axes, "Deep VAEs: active units", [float(row["beta"]) for row in deep])
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    exact = sum(row["active"] == row["exact_active"] for row in linear)
    path = folder / "transition.png"
    save(figure, path)
    caption = (
        "Left: a linear VAE loses its units one by one as the water level β s² rises past the variances of the data; "
        f"{exact} of {len(linear)} trained models have the number that the formula says. Right: VAEs with nets, "
        "by decoder; whiskers are one standard error over seeds. No formula is known for these."
    )
    return Figure("transition", "The transition", caption, path)


def _frame(axes: Axes, title: str, betas: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(betas)), [f"{beta:g}" for beta in sorted(set(betas))])
    axes.minorticks_off()
    axes.set_ylim(bottom=-0.4)
    axes.grid(axis="y", color=HAIRLINE, linewidth=0.6)
    heading(axes, title)
    axis_labels(axes, "β")


def draw_remedies(rows: Sequence[Mapping[str, Any]], folder: Path) -> Figure:
    """Information and fit of each remedy."""
    names = [_wrapped(row["remedy"]) for row in rows]
    height = max(54, 12 + 42 * max(name.count("\n") + 1 for name in names)) * len(rows)
    figure = sheet(WIDTH, height + 190)
    keys = (("test/mutual_information", "I(x; z), nats", BLUE), ("test/kl_to_posterior", "KL(q ‖ posterior)", MUTED),
            ("test/nll", "−log p(x), lower is better", RUST))  # fmt: skip
    for place, (key, title, tint) in enumerate(keys):
        axes = panel(figure, 250 + place * 450, 100, 400, height, spines="bottom")
        for at, row in enumerate(rows):
            if row[key] is not None:
                axes.errorbar(row[key], at, xerr=row[f"{key}_stderr"] or 0.0, fmt="o", color=tint, markersize=5)
        axes.set_yticks(range(len(rows)), names if place == 0 else [])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", color=HAIRLINE, linewidth=0.6)
        if place < 2:
            axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        heading(axes, title)
    path = folder / "remedies.png"
    save(figure, path)
    caption = (
        "Held-out nats per datum, whiskers one standard error over seeds. A cure moves the blue dot right and does not "
        "move the red one right of its place at none."
    )
    return Figure("remedies", "What each remedy buys", caption, path)


def draw_curves(
    results: Sequence[Mapping[str, Any]], curves: Mapping[str, list[dict[str, float]]], folder: Path
) -> Figure:
    """KL, information, active units, KL to the posterior, -log p(x) and ELBO against the step."""
    panels = (("kl", "KL(q(z|x) ‖ p(z))"), ("mutual_information", "I(x; z)"), ("active_units", "active units"),
              ("kl_to_posterior", "KL(q ‖ posterior)"), ("nll", "−log p(x)"), ("elbo", "ELBO"))  # fmt: skip
    figure = sheet(WIDTH, 1040)
    for place, (key, title) in enumerate(panels):
        axes = panel(figure, 90 + place % 3 * 410, 580 - place // 3 * 480, 330, 370)
        for order, result in enumerate(results):
            line = [(row["step"], row[key]) for row in curves[result["run"]] if key in row]
            if line:
                plain = result["remedy"] == "none"
                tint = INK if plain else CLASS_COLOURS[order % len(CLASS_COLOURS)]
                axes.plot(
                    *np.array(line).T, color=tint, linewidth=2.0 if plain else 1.2, label=_wrapped(result["remedy"])
                )
        if key in ("elbo", "nll"):
            _leave_out_the_start(axes, key == "elbo")
        else:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.tick_params(labelbottom=place >= 3)
        heading(axes, title)
        axis_labels(axes, "step" if place >= 3 else "")
        if place == 2:
            axes.legend(frameon=False, fontsize=10.5, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.04, 1.0))
    path = folder / "curves.png"
    save(figure, path)
    caption = (
        "The validation set along the training, one seed: what the code costs, what it knows, how many units carry it, "
        "how far the guide is from the posterior, and what the model is worth. The heavy line is the plain VAE."
    )
    return Figure("curves", "Per training step", caption, path)


def _leave_out_the_start(axes: Axes, rising: bool) -> None:
    """Late values fill the frame; the first steps may lie outside."""
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()]
    late = np.concatenate([values[len(values) // 4 :] for values in lines]) if lines else np.array([0.0, 1.0])
    low, high = float(np.min(late)), float(np.max(late))
    room = 0.06 * max(high - low, 1e-6)
    axes.set_ylim(low - room, high + room)


def _named(result: Mapping[str, Any]) -> str:
    remedy = "no remedy" if result["remedy"] == "none" else f"remedy {_short(result['remedy'])}"
    return f"β = {result['beta']}, decoder {_short(result['decoder'])}, {remedy}"


def draw_side_by_side(galleries: Sequence[Gallery], results: Sequence[Mapping[str, Any]], folder: Path) -> Figure:
    """Data, reconstructions and samples of a collapsed model and of a cured one."""
    first = galleries[0]
    look = first.value_range, ground_is_low(first.originals, first.value_range)
    high, wide = first.shape[1:]
    zoom = max(1, 700 // (SHOWN * max(wide + 2, 1)))
    band = np.array([SHOWN * (wide + 2), 2 * (high + 2)]) * zoom
    figure = sheet(WIDTH, int(3 * (band[1] + 70) + 40))
    kinds = ("originals", "reconstructions", "samples")
    for column, (drawn, result) in enumerate(zip(galleries, results, strict=True)):
        told = f"I(x; z) = {result['test/mutual_information']:.2f}, −log p(x) = {result['test/nll']:.1f}"
        for row, kind in enumerate(kinds):
            images = getattr(drawn, kind)[: 2 * SHOWN]
            tiles = colour(images.reshape(2, SHOWN, *first.shape), *look)
            axes = panel(figure, 40 + column * 790, 20 + (2 - row) * (band[1] + 70), 730, 730 / band[0] * band[1])
            axes.imshow(mosaic(tiles), interpolation="nearest", aspect="auto")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_visible(False)
            heading(axes, f"{('collapsed', 'cured')[column]}: {told}" if row == 0 else kind)
    path = folder / "side_by_side.png"
    save(figure, path)
    caption = (
        f"Left {_named(results[0])}; right {_named(results[1])}. Above held-out data, in the middle their "
        "reconstructions from one code each, below samples from the prior; of decoders whose pixels depend on each "
        "other, draws, of others means. The collapsed model answers every datum alike: its samples may be as good, but "
        "its code says nothing."
    )
    return Figure("side_by_side", "Collapsed and cured", caption, path)
