"""Pictures of data: training curves, reconstructions beside their originals, samples, the manifold of decoder means."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy.stats import norm

from inference.canvas import (
    BLUE,
    FAINT,
    HAIRLINE,
    INK,
    MUTED,
    RUST,
    WIDTH,
    Sheet,
    axis_labels,
    colour,
    dots,
    heading,
    mosaic,
    panel,
    print_images,
    sheet,
    thin,
)

TABLE_COLUMNS = 4  # more columns than these make panels too small to read


class Picture(NamedTuple):
    """A drawing with the words that belong to it."""

    title: str
    caption: str
    sheet: Sheet


def latent_grid(size: int) -> np.ndarray:
    """Latents ``(size, size, 2)`` at the normal quantiles of a regular grid on the unit square, as on a map.

    The first latent dimension grows from column to column, the second from the last row up to the first. Every cell of
    the grid has the same mass under a standard normal prior (Kingma and Welling 2014, appendix A).
    """
    quantiles = norm.ppf((np.arange(size) + 0.5) / size)
    return np.stack(np.meshgrid(quantiles, quantiles[::-1], indexing="xy"), axis=-1)


def training_curves(metrics: Sequence[dict[str, Any]]) -> Picture | None:
    """The bound against the step, and the two terms of the ELBO; ``None`` when no row has any of them."""
    curves = {
        key: _curve(metrics, key) for key in ("train/bound", "valid/elbo", "valid/reconstruction", "valid/kl")
    }  # each (n, 2): step, nats
    if not any(len(curve) for curve in curves.values()):
        return None
    figure = sheet(WIDTH, 660)
    bound = panel(figure, 120, 105, 780, 480)
    heading(bound, "Bound (nats per datum)")
    below = _line(bound, curves["train/bound"], FAINT, "training batches", width=0.8)
    below |= _line(bound, curves["valid/elbo"], BLUE, "held-out ELBO", width=1.6)
    axis_labels(bound, "step")
    if bound.get_lines():
        bound.legend(loc="lower right", frameon=False, fontsize=11, labelcolor=INK)
    for key, tint, bottom in (("valid/reconstruction", INK, 385), ("valid/kl", RUST, 105)):
        term = panel(figure, 1060, bottom, 510, 200)
        heading(term, {"valid/reconstruction": "Held-out reconstruction", "valid/kl": "Held-out KL"}[key])
        below |= _line(term, curves[key], tint, key, width=1.6)
        term.yaxis.set_major_locator(MaxNLocator(4))
        term.tick_params(labelbottom=bottom == 105)
        axis_labels(term, "step" if bottom == 105 else "")
    caption = (
        "Left: the bound being maximized, on training batches and on held-out data; higher is better, and a held-out "
        "curve that turns down while the other still rises is overfitting. Right: the two terms whose difference "
        "is the held-out ELBO. A KL that stays at zero means that the latents are not used."
    )
    if below:
        caption += " The first steps lie below the frame."
    return Picture("Training curves", caption, figure)


def _curve(metrics: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    rows = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
    points = np.array(rows, dtype=float).reshape(-1, 2)
    return points[np.isfinite(points).all(axis=1)]


def _line(axes: Axes, curve: np.ndarray, tint: str, label: str, width: float) -> bool:
    """Draw a curve; returns whether its early values were left below the frame to keep the late ones legible."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if not len(curve):
        return False
    marker = "o" if len(curve) < 30 else ""
    axes.plot(*curve.T, color=tint, linewidth=width, label=label, marker=marker, markersize=2.2, solid_capstyle="round")
    values = curve[:, 1]
    typical, top = np.quantile(values, 0.1), values.max()
    if not len(values) > 10 or top - values.min() < 4 * (top - typical) or top == typical:
        return False
    floor = typical - 0.6 * (top - typical)
    axes.set_ylim(bottom=min(floor, *axes.get_ylim()) if axes.get_lines()[1:] else floor)
    return bool(values.min() < axes.get_ylim()[0])


def image_reconstructions(
    originals: np.ndarray,
    reconstructions: np.ndarray,
    value_range: tuple[float, float],
    high_is_ink: bool,
    drawn: bool = False,
) -> Picture:
    """Pairs of images ``(n, C, H, W)``, the original above its reconstruction, at most three bands of ten or twelve."""
    columns = min(len(originals), 12 if originals.shape[-1] <= 20 else 10)
    bands = max(1, min(3, len(originals) // columns))
    count = bands * columns
    pairs = np.stack([originals[:count], reconstructions[:count]])  # (2, n, C, H, W)
    tiles = colour(pairs, value_range, high_is_ink)  # (2, n, H, W, 3)
    tiles = tiles.reshape(2, bands, columns, *tiles.shape[2:]).swapaxes(0, 1)  # (bands, 2, columns, H, W, 3)
    panels = print_images([mosaic(pair) for pair in tiles], margins=(196, 2, 4, 4))
    for axes in panels:
        for row, name in enumerate(("original", "reconstruction")):
            axes.text(-0.012, 0.75 - 0.5 * row, name, transform=axes.transAxes, ha="right", va="center", fontsize=9.5,
                      color=(INK, BLUE)[row])  # fmt: skip
        axes.axhline(axes.get_ylim()[0] / 2, color=HAIRLINE, linewidth=0.6)
    lost = "What is lost between the two rows is what the code does not carry"
    caption = (
        f"Held-out images, each with its reconstruction directly below it: {'a draw' if drawn else 'the mean'} of "
        f"p(x|z) for one code z drawn from q(z|x). {lost}"
    ) + (", and is made up by the decoder." if drawn else "; blur is the decoder’s uncertainty.")
    return Picture("Reconstructions", caption, _sheet_of(panels[0]))


def image_samples(
    samples: np.ndarray, value_range: tuple[float, float], high_is_ink: bool, drawn: bool = False
) -> Picture:
    """Images ``(m, C, H, W)`` edge to edge, at most six rows of twelve or ten."""
    columns = min(len(samples), 12 if samples.shape[-1] <= 20 else 10)
    rows = max(1, min(6, len(samples) // columns))
    tiles = colour(samples[: rows * columns], value_range, high_is_ink)
    panels = print_images([mosaic(tiles.reshape(rows, columns, *tiles.shape[1:]))])
    caption = (
        f"What the model makes up: {'draws' if drawn else 'means'} of p(x|z) for codes z drawn from the prior; no "
        "datum, no guide is involved."
        " Samples worse than the reconstructions point to regions where the prior has mass but no datum has its code."
    )
    return Picture("Samples from the prior", caption, _sheet_of(panels[0]))


def image_components(
    means: np.ndarray, shares: np.ndarray, value_range: tuple[float, float], high_is_ink: bool
) -> Picture:
    """The mean image of every state of a mixture, ``(K, C, H, W)``, in the order given; at most 256 of them."""
    count = min(len(means), 256)
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    padded = np.full((rows * columns, *means.shape[1:]), value_range[0] if high_is_ink else value_range[1])
    padded[:count] = means[:count]
    tiles = colour(padded, value_range, high_is_ink)
    axes = print_images([mosaic(tiles.reshape(rows, columns, *tiles.shape[1:]))])[0]
    perplexity = float(np.exp(-np.sum(shares * np.log(np.maximum(shares, 1e-300)))))
    shown = f"All {len(means)} components" if count == len(means) else f"The first {count} of {len(means)} components"
    caption = (
        f"{shown}: the mean of p(x|z) for each state z, those first that most held-out data are in. Their shares have "
        f"a perplexity of {perplexity:.1f}; it would be {len(means)} if all were used alike."
    )
    return Picture("The components", caption, _sheet_of(axes))


def image_manifold(
    manifold: np.ndarray, value_range: tuple[float, float], high_is_ink: bool, drawn: bool = False
) -> Picture:
    """Decoder means ``(g, g, C, H, W)`` at :func:`latent_grid`: first latent to the right, second upwards."""
    size = len(manifold)
    tiles = colour(manifold, value_range, high_is_ink)  # (g, g, H, W, 3)
    axes = print_images([mosaic(tiles)], margins=(110, 24, 100, 12))[0]
    ticks = np.array([-2, -1, 0, 1, 2])
    ticks = ticks[np.abs(ticks) <= norm.ppf(1 - 0.5 / size)]
    names = [f"{tick}".replace("-", "−") for tick in ticks]
    axes.set_xticks(norm.cdf(ticks) * axes.get_xlim()[1], names)
    axes.set_yticks((1 - norm.cdf(ticks)) * axes.get_ylim()[0], names)
    axis_labels(axes, "$z_1$", "$z_2$")
    caption = (
        f"{'Draws of p(x|z)' if drawn else 'The decoder’s mean'} over the whole latent plane: {size} × {size} codes at "
        "equal steps of prior mass, the unit square sent through the inverse normal distribution function (so the "
        "scales stretch outwards). Neighbours should change smoothly; every tile is equally probable under a standard "
        "normal prior."
    )
    return Picture("The manifold", caption, _sheet_of(axes))


def table_manifold(manifold: np.ndarray, originals: np.ndarray) -> Picture:
    """Decoder means ``(g, g, 2)`` at :func:`latent_grid` as a bent lattice over the data ``(n, 2)``."""
    figure = sheet(1200, 900)
    axes = panel(figure, 130, 110, 1030, 760)
    dots(axes, thin(originals), MUTED, opacity=0.5)
    for lattice, tint in ((manifold.swapaxes(0, 1), BLUE), (manifold, RUST)):
        for line in lattice:
            axes.plot(*line.T, color=tint, linewidth=0.7, alpha=0.8)
    axis_labels(axes, "column 1", "column 2")
    caption = (
        "Where the decoder’s mean puts a regular grid of codes (equal steps of prior mass) among held-out data (grey). "
        "Blue lines hold the first latent dimension fixed, red lines the second; crowded lines are codes that decode "
        "alike, and lines that collapse on a curve show a latent plane used in one direction only."
    )
    return Picture("The manifold", caption, figure)


def table_reconstructions(originals: np.ndarray, reconstructions: np.ndarray) -> Picture:
    """Reconstructed against original value, one panel for each of the first columns of rows ``(n, D)``."""
    columns = min(originals.shape[1], TABLE_COLUMNS)
    side = min(560, (WIDTH - 60) // columns - 120)
    figure = sheet(columns * (side + 120) + 60, side + 190)
    for column in range(columns):
        axes = panel(figure, 145 + column * (side + 120), 115, side, side)
        pairs = np.stack([originals[:, column], reconstructions[:, column]], axis=1)
        margin = 0.05 * max(np.ptp(pairs), 1e-6)
        ends = (pairs.min() - margin, pairs.max() + margin)
        axes.set(xlim=ends, ylim=ends)
        axes.plot(ends, ends, color=HAIRLINE, linewidth=1.2, zorder=0)
        dots(axes, pairs, BLUE, size=10, opacity=0.6)
        heading(axes, f"column {column + 1}")
        axis_labels(axes, "original", "reconstructed" if column == 0 else "")
    caption = (
        "Held-out values against the mean of p(x|z) for a code drawn from q(z|x). Dots on the line are perfect; a flat "
        "cloud is a column that the code does not carry." + _first_columns(originals.shape[1])
    )
    return Picture("Reconstructions", caption, figure)


def table_samples(originals: np.ndarray, samples: np.ndarray) -> Picture:
    """Held-out rows ``(n, D)`` and draws of the model ``(m, D)``: marginals on the diagonal, pairs below it."""
    columns = min(originals.shape[1], TABLE_COLUMNS)
    side = min(460, (WIDTH - 160) // columns - 40)
    whole = columns * (side + 40) + np.array([160, 150 if columns > 1 else 240])  # pixels across, up
    figure = sheet(*whole)
    for row in range(columns):
        for column in range(row + 1):
            place = (120 + column * (side + 40), 110 + (columns - 1 - row) * (side + 40))
            axes = panel(figure, *place, side, side, spines="bottom" if row == column else "left bottom")
            _pair(axes, originals, samples, row, column)
            last, first = row == columns - 1, column == 0 and row > 0
            axes.tick_params(labelbottom=last, labelleft=first)
            axis_labels(axes, f"column {column + 1}" if last else "", f"column {row + 1}" if first else "")
    for line, (name, tint) in enumerate((("held-out data", INK), ("samples of the model", RUST))):
        place = np.array([whole[0] - 40 - side, whole[1] - 60 - 60 * line]) / whole
        figure.text(place[0], place[1], f"●  {name}", color=tint, fontsize=12, va="top")
    caption = (
        "Held-out data (dark) and draws from the model (red): each column's distribution on the diagonal, pairs of "
        "columns below it. Both clouds should cover the same ground." + _first_columns(originals.shape[1])
    )
    return Picture("Samples from the model", caption, figure)


def _pair(axes: Axes, originals: np.ndarray, samples: np.ndarray, row: int, column: int) -> None:
    both = np.concatenate([originals, samples])
    low, high = both[:, column].min(), both[:, column].max()
    if row == column:
        count = int(np.clip(2 * len(originals) ** (1 / 3), 8, 30))  # Rice's rule
        bins = np.linspace(low, high + 1e-9 * (1 + abs(high)), count + 1).tolist()
        axes.hist(originals[:, column], bins=bins, density=True, color=INK, alpha=0.2)
        axes.hist(samples[:, column], bins=bins, density=True, color=RUST, histtype="step", linewidth=1.2)
        axes.set_yticks([])
        return
    dots(axes, thin(samples)[:, [column, row]], RUST, size=7, opacity=0.45)
    dots(axes, thin(originals)[:, [column, row]], INK, size=7, opacity=0.6)


def _first_columns(columns: int) -> str:
    return f" The first {TABLE_COLUMNS} of {columns} columns." if columns > TABLE_COLUMNS else ""


def _sheet_of(axes: Axes) -> Sheet:
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Sheet)
    return figure
