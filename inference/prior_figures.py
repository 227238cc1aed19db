"""Pictures of priors: a density over the plane with codes on it, and how often codes of bits and one-hots are used."""

from typing import NamedTuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from inference.canvas import (
    BLUE,
    HAIRLINE,
    INK,
    MUTED,
    PAPER,
    RUST,
    WIDTH,
    axis_labels,
    dots,
    heading,
    panel,
    sheet,
    thin,
)
from inference.data_figures import Picture

MASSES = (0.99, 0.9, 0.5)  # of the prior, inside the contours from the outer to the inner one
WARM = LinearSegmentedColormap.from_list("warm", [PAPER, "#f4e4db", "#e6b8a2", "#d98f73"])
COOL = LinearSegmentedColormap.from_list("cool", [PAPER, "#c3d3e2", BLUE, "#173a5e"])


class Density(NamedTuple):
    """A density on a grid of the plane: places ``(g,)`` along both axes, values ``(g, g)``, the second axis upwards."""

    across: np.ndarray
    up: np.ndarray
    value: np.ndarray

    @property
    def mass(self) -> float:
        """What the grid holds of it."""
        return float(self.value.sum() * (self.across[1] - self.across[0]) * (self.up[1] - self.up[0]))

    def level(self, share: float) -> float:
        """The density whose contour holds ``share`` of the mass on the grid."""
        ranked = np.sort(self.value, axis=None)[::-1]
        mass = np.cumsum(ranked) / max(ranked.sum(), 1e-300)
        return float(ranked[min(int(np.searchsorted(mass, share)), len(ranked) - 1)])


def prior_density(density: Density, prior: np.ndarray, codes: np.ndarray) -> Picture:
    """The prior's density over the plane, with its own draws ``(M, 2)`` and with the codes of data ``(N, 2)``."""
    figure = sheet(WIDTH, 830)
    levels = sorted({density.level(share) for share in MASSES})
    for place, (points, tint, title) in enumerate(
        ((prior, INK, "draws of the prior"), (codes, BLUE, "codes of held-out data"))
    ):
        axes = panel(figure, 110 + place * 780, 105, 660, 660)
        axes.pcolormesh(density.across, density.up, density.value.T, cmap=WARM, shading="nearest", rasterized=True)
        if levels[-1] > 0:
            axes.contour(density.across, density.up, density.value.T, levels=levels, colors=RUST, linewidths=0.9)
        dots(axes, thin(points, 1500), tint, size=7, opacity=0.45)
        axes.set(xlim=density.across[[0, -1]], ylim=density.up[[0, -1]])
        heading(axes, title)
        axis_labels(axes, "$z_1$", "$z_2$" if place == 0 else "")
    caption = (
        "The density of the prior, computed on a grid; the contours hold 50 %, 90 % and 99 % of it, and the whole "
        f"window {100 * density.mass:.1f} %. Left with its own draws, right with one code z ~ q(z|x) for each datum: a "
        "good prior has its mass where the codes are."
    )
    return Picture("The prior's density", caption, figure)


def is_binary(draws: np.ndarray, prior: np.ndarray) -> bool:
    """Whether all latents, of data ``(N, D)`` and of the prior ``(M, D)``, are zeros and ones."""
    return all(bool(np.isin(values, (0.0, 1.0)).all()) for values in (draws, prior))


def code_usage(draws: np.ndarray, prior: np.ndarray, states: int) -> Picture:
    """How often each code occurs among the codes of data ``(N, D)``, beside the prior ``(M, D)``.

    Args:
        draws: one draw of q(z|x) for each datum: zeros and ones.
        prior: draws of the prior.
        states: number of values of a latent, D a multiple of it; 1 for bits.
    """
    return _one_hots(draws, prior, states) if states > 1 else _bits(draws, prior)


def _one_hots(draws: np.ndarray, prior: np.ndarray, states: int) -> Picture:
    usage, expected = (values.mean(0).reshape(-1, states) for values in (draws, prior))  # (latents, states)
    ranked = -np.sort(-usage, axis=1)
    order = np.argsort(-_perplexity(usage), kind="stable")
    rows = len(usage)
    height = int(np.clip(34 * rows, 160, 800))
    figure = sheet(WIDTH, height + 190)
    axes = panel(figure, 110, 105, 860, height, spines="")
    image = axes.imshow(ranked[order], cmap=COOL, vmin=0, vmax=max(ranked.max(), 2 / states), aspect="auto")
    step = -(-states // 24)
    axes.set_xticks(range(0, states, step), [f"{state + 1}" for state in range(0, states, step)])
    step = -(-rows // 24)
    axes.set_yticks(range(0, rows, step), [f"{order[row] + 1}" for row in range(0, rows, step)])
    axes.tick_params(length=0)
    heading(axes, "how often each state is drawn")
    axis_labels(axes, "states of each latent, the commonest first", "latent")
    scale = panel(figure, 700, 105 + height + 14, 270, 14, spines="")
    figure.colorbar(image, cax=scale, orientation="horizontal").outline.set_visible(False)
    scale.xaxis.set_ticks_position("top")
    scale.tick_params(labelsize=8, colors=MUTED, length=2)
    used = panel(figure, 1060, 105, 480, height, spines="bottom")
    used.barh(range(rows), _perplexity(usage)[order], color=BLUE, height=0.7)
    used.plot(_perplexity(expected)[order], range(rows), "|", color=RUST, markersize=max(4, height / rows / 2.4))
    used.set(ylim=(rows - 0.5, -0.5), xlim=(0, states * 1.05), yticks=[])
    used.grid(axis="x", color=HAIRLINE, linewidth=0.6)
    heading(used, "states in use")
    axis_labels(used, "exp of the entropy of all codes together")
    caption = (
        f"Left: {rows} latents of {states} states; how often each state is drawn for held-out data, the commonest "
        "first. Right: to how many equally common states that amounts; the red marks are the prior’s. A latent with "
        "one state says nothing; one that uses all of them alike fills its prior."
    )
    return Picture("Codes in use, against the prior", caption, figure)


def _bits(draws: np.ndarray, prior: np.ndarray) -> Picture:
    share, expected = draws.mean(0), prior.mean(0)
    order = np.argsort(-share, kind="stable")
    figure = sheet(WIDTH, 620)
    axes = panel(figure, 110, 115, WIDTH - 150, 430)
    places = np.arange(len(order))
    axes.bar(places, share[order], color=BLUE, width=0.7)
    axes.plot(places, expected[order], "_", color=RUST, markersize=max(4, min(30, 900 / len(order))))
    axes.set(ylim=(0, 1), xlim=(-0.7, len(order) - 0.3))
    step = -(-len(order) // 32)
    axes.set_xticks(places[::step], [f"{bit + 1}" for bit in order[::step]])
    axes.tick_params(axis="x", length=0)
    axis_labels(axes, "bit, the one that is on most often first", "share of the data")
    caption = (
        "How often each bit is on among the codes of held-out data; the red marks are the prior’s. A bit that is "
        "always on or always off says nothing."
    )
    return Picture("Codes in use, against the prior", caption, figure)


def _perplexity(usage: np.ndarray) -> np.ndarray:
    """exp H of each row ``(L, K) -> (L,)``."""
    share = np.clip(usage, 1e-12, None)
    return np.exp(-(usage * np.log(share)).sum(1))
