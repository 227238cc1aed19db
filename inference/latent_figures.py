"""Pictures of latents: the KL of each dimension, the aggregated posterior against the prior, codes by label."""

from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from scipy.ndimage import gaussian_filter

from inference.canvas import (
    BLUE,
    CLASS_COLOURS,
    HAIRLINE,
    INK,
    MUTED,
    PALE_BLUE,
    PAPER,
    RUST,
    WIDTH,
    Sheet,
    axis_labels,
    dots,
    heading,
    panel,
    sheet,
    thin,
)
from inference.data_figures import Picture

MASSES = (0.5, 0.9)  # of the prior, inside the inner and the outer contour


def kl_bars(kl: np.ndarray, active: np.ndarray | None, threshold: float | None) -> Picture:
    """Sorted bars of the KL ``(D,)`` in nats; ``active`` ``(D,)`` says which dimensions count as used."""
    order = np.argsort(-kl, kind="stable")
    width = int(np.clip(160 + 130 * len(kl), 640, WIDTH))
    figure = sheet(width, 560)
    axes = panel(figure, 120, 115, width - 140, 400, spines="bottom")
    tints = [BLUE if active is None or active[dimension] else PALE_BLUE for dimension in order]
    axes.bar(np.arange(len(kl)), kl[order], width=0.72 if len(kl) > 3 else 0.5, color=tints)
    axes.axhline(0, color=MUTED, linewidth=0.6)
    axes.set_xlim(-0.7, len(kl) - 0.3)
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=HAIRLINE, linewidth=0.6)
    axes.set_axisbelow(True)
    _name_dimensions(axes, order)
    axis_labels(axes, "latent dimension, largest KL first", "nats")
    if len(kl) <= 12:
        for place, value in enumerate(kl[order]):
            text = f"{value:.2f}".replace("-", "−")
            axes.text(place, max(value, 0.0) + 0.02 * kl.max(), text, ha="center", fontsize=10.5, color=INK)
    caption = (
        f"Mean over held-out data of KL(q(z|x) ‖ p(z)), dimension by dimension; the bars add up to "
        f"{kl.sum():.2f} nats. A dimension at zero repeats the prior whatever the datum: it is not used."
    )
    if active is not None and threshold is not None:
        caption += (
            f" Dark bars are the {int(active.sum())} active units of {len(kl)}: the variance over the data of their "
            f"posterior mean exceeds {threshold:g} (Burda, Grosse and Salakhutdinov 2016)."
        )
    return Picture("KL per latent dimension", caption, figure)


def _name_dimensions(axes: Axes, order: np.ndarray, most: int = 32) -> None:
    """Dimensions are counted from one; with more than ``most`` of them only some are named."""
    step = -(-len(order) // most)
    places = np.arange(0, len(order), step)
    axes.set_xticks(places, [f"{order[place] + 1}" for place in places])


def aggregated_posterior(draws: np.ndarray, prior: np.ndarray, kl: np.ndarray | None) -> Picture:
    """One draw of q(z|x) for each datum, ``(N, D)``, against draws of the prior, ``(M, D)``."""
    reading = (
        "The guide’s codes for all held-out data together should fill the prior: prior mass without codes gives "
        "samples unlike any datum, codes outside the prior are data that the model hardly ever generates."
    )
    dimensions = draws.shape[1]
    if dimensions == 1:
        figure = sheet(1200, 620)
        _marginals(panel(figure, 60, 110, 1080, 470, spines="bottom"), draws[:, 0], prior[:, 0], _limits(draws, prior))
        caption = f"Codes z drawn from q(z|x) (blue) and the prior (red line). {reading}"
    elif dimensions == 2:
        figure = _joint(draws, prior)
        caption = (
            "Each dot is a code z drawn from q(z|x) for one held-out datum; the red contours hold 50 % and 90 % of the "
            f"prior. In the margins, blue is the codes and the red line the prior. {reading}"
        )
    else:
        figure, pair = _by_dimension(draws, prior, kl)
        caption = (
            "Left, for each dimension: mean and mean ± one standard deviation of the codes (blue) on those of the "
            f"prior (red band). Right: dimensions {pair[0] + 1} and {pair[1] + 1}"
            + (", the two with the largest KL; " if kl is not None else "; ")
            + f"each dot is the code of one held-out datum, the red contours hold 50 % and 90 % of the prior. {reading}"
        )
    return Picture("Aggregated posterior against the prior", caption, figure)


def _limits(*clouds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A square window that holds nearly all points of every cloud: lower and upper ends, ``(D,)`` each."""
    low = np.min([np.quantile(cloud, 0.002, axis=0) for cloud in clouds], axis=0)
    high = np.max([np.quantile(cloud, 0.998, axis=0) for cloud in clouds], axis=0)
    half = 0.54 * max(float((high - low).max()), 1e-6)
    return (low + high) / 2 - half, (low + high) / 2 + half


def _cloud(axes: Axes, draws: np.ndarray, prior: np.ndarray) -> None:
    """Dots of one cloud ``(N, 2)`` under highest-density contours of the other, in a square window."""
    low, high = _limits(draws, prior)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    dots(axes, thin(draws), BLUE)
    bins, smoothing = 96, 0.18 * len(prior) ** (-1 / 6)  # bandwidth at Scott’s rate in two dimensions
    box = [[low[0], high[0]], [low[1], high[1]]]
    density = gaussian_filter(np.histogram2d(prior[:, 0], prior[:, 1], bins=bins, range=box)[0], sigma=smoothing * bins)
    ranked = np.sort(density, axis=None)[::-1]
    mass = np.cumsum(ranked) / max(ranked.sum(), 1e-12)
    levels = sorted({float(ranked[np.searchsorted(mass, share)]) for share in MASSES})
    centres = [(np.arange(bins) + 0.5) / bins * (high[axis] - low[axis]) + low[axis] for axis in (0, 1)]
    if levels[-1] > 0:
        axes.contour(*centres, density.T, levels=levels, colors=RUST, linewidths=1.1)


def _marginals(axes: Axes, draws: np.ndarray, prior: np.ndarray, ends: tuple, flat: bool = True) -> None:
    bins = np.linspace(float(ends[0].min()), float(ends[1].max()), 41).tolist()
    direction: Literal["vertical", "horizontal"] = "vertical" if flat else "horizontal"
    axes.hist(draws, bins=bins, density=True, color=PALE_BLUE, orientation=direction)
    axes.hist(prior, bins=bins, density=True, histtype="step", color=RUST, linewidth=1.1, orientation=direction)
    axes.set_yticks([]) if flat else axes.set_xticks([])


def _joint(draws: np.ndarray, prior: np.ndarray) -> Sheet:
    figure = sheet(1200, 1200)
    main = panel(figure, 110, 100, 860, 860)
    _cloud(main, draws, prior)
    axis_labels(main, "$z_1$", "$z_2$")
    low, high = _limits(draws, prior)
    for axis, place in enumerate(((110, 985, 860, 190), (995, 100, 190, 860))):
        margin = panel(figure, *place, spines="")
        _marginals(margin, draws[:, axis], prior[:, axis], (low[axis], high[axis]), flat=axis == 0)
        (margin.set_xlim if axis == 0 else margin.set_ylim)(low[axis], high[axis])
        margin.set(xticks=[], yticks=[])
    return figure


def _by_dimension(draws: np.ndarray, prior: np.ndarray, kl: np.ndarray | None) -> tuple[Sheet, tuple[int, int]]:
    """Mean and scale of every dimension beside the scatter of two: those with the largest KL, else the first two."""
    dimensions = draws.shape[1]
    order = np.arange(dimensions) if kl is None else np.argsort(-kl, kind="stable")
    figure = sheet(WIDTH, 720)
    axes = panel(figure, 115, 110, 790, 540)
    places = np.arange(dimensions)
    mean, scale = prior.mean(axis=0)[order], prior.std(axis=0)[order]
    axes.bar(places, 2 * scale, bottom=mean - scale, width=1.0, color=RUST, alpha=0.16, linewidth=0)
    axes.hlines(mean, places - 0.5, places + 0.5, color=RUST, linewidth=0.9, alpha=0.7)
    axes.errorbar(places, draws.mean(axis=0)[order], draws.std(axis=0)[order], fmt="o", color=BLUE, markersize=3.2,
                  elinewidth=1.5)  # fmt: skip
    axes.set_xlim(-0.7, dimensions - 0.3)
    _name_dimensions(axes, order, most=20)
    axes.tick_params(axis="x", length=0)
    heading(axes, "mean ± standard deviation")
    axis_labels(axes, "latent dimension" + ("" if kl is None else ", largest KL first"))
    first, second = int(order[0]), int(order[1])
    pair = panel(figure, 1045, 110, 530, 540)
    _cloud(pair, draws[:, [first, second]], prior[:, [first, second]])
    axis_labels(pair, f"$z_{{{first + 1}}}$", f"$z_{{{second + 1}}}$")
    return figure, (first, second)


def latent_scatter(means: np.ndarray, labels: np.ndarray | None) -> Picture:
    """Posterior means ``(N, D)`` in the plane, coloured by label; for D > 2 their first two principal components."""
    plane, names, how = means, ("$z_1$", "$z_2$"), "Each dot is the posterior mean of one held-out datum"
    if means.shape[1] > 2:
        plane, share = _principal_plane(means)
        names = ("first principal component", "second principal component")
        how += f", projected on the two principal components that hold {100 * share:.0f} % of the variance"
    figure = sheet(1200, 1200)
    axes = panel(figure, 110, 100, 1060, 1060)
    low, high = _limits(plane)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    classes = np.unique(labels) if labels is not None else np.zeros(0)
    if labels is None:
        dots(axes, thin(plane), BLUE, size=11)
        how += ". Separate clouds are kinds of data that the guide tells apart."
    elif len(classes) <= 2 * len(CLASS_COLOURS):
        _classes(axes, plane, labels, classes)
        how += ", coloured by its label; the name of each class stands near its median."
    else:
        shown = thin(plane)
        cloud = axes.scatter(shown[:, 0], shown[:, 1], s=11, c=thin(labels), cmap="viridis", alpha=0.7, linewidths=0)
        bar = figure.colorbar(cloud, cax=axes.inset_axes((0.72, 0.97, 0.26, 0.015)), orientation="horizontal")
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=9, colors=MUTED, length=2)
        how += ", coloured by its label."
    axis_labels(axes, *names)
    return Picture("Codes of held-out data", how, figure)


def _classes(axes: Axes, plane: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> None:
    """Dots in the order of the data, so that no class covers another, and the classes' names over them."""
    tints = np.array([CLASS_COLOURS[rank % len(CLASS_COLOURS)] for rank in range(len(classes))])
    ranks = np.searchsorted(classes, labels)
    dots(axes, thin(plane), tints[thin(ranks)].tolist(), size=13, opacity=0.6)
    centres = np.array([np.median(plane[ranks == rank], axis=0) for rank in range(len(classes))])
    for rank, (name, place) in enumerate(zip(classes, _apart(centres, 0.045 * np.ptp(axes.get_xlim())), strict=True)):
        text = f"{name:g}" if isinstance(name, int | float | np.number) else str(name)
        halo = [withStroke(linewidth=7, foreground=PAPER)]
        axes.text(place[0], place[1], text, color=tints[rank], fontsize=20, ha="center", va="center", path_effects=halo)


def _apart(places: np.ndarray, least: float) -> np.ndarray:
    """Push places ``(n, 2)`` that are nearer to each other than ``least`` apart, so that no name covers another."""
    places = places.copy()
    for _ in range(50):
        towards = places[:, None] - places[None, :]  # (n, n, 2)
        distance = np.linalg.norm(towards, axis=-1)
        np.fill_diagonal(distance, np.inf)
        push = np.clip(least - distance, 0, None) / np.maximum(distance, 1e-9)
        places += 0.5 * (push[..., None] * towards).sum(axis=1)
    return places


def _principal_plane(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Coordinates ``(N, 2)`` on the first two principal components, and their share of the variance."""
    centred = points - points.mean(axis=0)
    rows = np.concatenate([centred, np.zeros((1, centred.shape[1]))])  # two directions even of a single datum
    _, singular, directions = np.linalg.svd(rows, full_matrices=False)
    signs = np.sign(directions[:2][np.arange(2), np.abs(directions[:2]).argmax(axis=1)])  # a sign rule of our own
    share = float((singular[:2] ** 2).sum() / max((singular**2).sum(), 1e-300))
    return centred @ (signs[:, None] * directions[:2]).T, share
