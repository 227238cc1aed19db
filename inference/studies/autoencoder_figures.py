"""Pictures of the study of autoencoder and VAE."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inference.canvas import (
    BLUE,
    CLASS_COLOURS,
    INK,
    RUST,
    WIDTH,
    axis_labels,
    colour,
    dots,
    ground_is_low,
    heading,
    mosaic,
    panel,
    save,
    sheet,
    thin,
)
from inference.figures import Figure

COLUMNS = 10


class Seen(NamedTuple):
    """What the pictures show of a model: images ``(n, *shape)``, codes ``(n, D)``, prior draws ``(m, D)``, labels."""

    originals: np.ndarray
    reconstructions: np.ndarray
    samples: np.ndarray
    codes: np.ndarray
    prior: np.ndarray
    labels: np.ndarray | None


def draw_images(pair: Mapping[str, Seen], folder: Path) -> Figure:
    """Data, reconstructions and samples of two models side by side."""
    first = next(iter(pair.values()))
    shape, low = first.originals.shape[1:], ground_is_low(first.originals, (0.0, 1.0))
    width = 740
    heights = [rows * (shape[1] + 2) / (COLUMNS * (shape[2] + 2)) * width for rows in (1, 1, 3)]
    figure = sheet(WIDTH, int(sum(heights) + 3 * 62 + 30))
    for column, (name, seen) in enumerate(pair.items()):
        top = sum(heights) + 3 * 62 + 20
        for kind, rows, height in zip(("originals", "reconstructions", "samples"), (1, 1, 3), heights, strict=True):
            top -= height + 62
            images = getattr(seen, kind)[: rows * COLUMNS]
            tiles = colour(images.reshape(rows, COLUMNS, *shape), (0.0, 1.0), low)
            axes = panel(figure, 40 + column * 780, top, width, height, spines="")
            axes.imshow(mosaic(tiles), interpolation="nearest", aspect="auto")
            axes.set(xticks=[], yticks=[])
            heading(axes, f"{name}: held-out data" if kind == "originals" else kind)
    path = folder / "images.png"
    save(figure, path)
    caption = (
        "Held-out data, their reconstructions, and what codes drawn from the prior decode to."
        + " The autoencoder was never told of the prior." * ("autoencoder" in pair)
    )
    return Figure("images", "Reconstructions and samples", caption, path)


def draw_codes(pair: Mapping[str, Seen], folder: Path) -> Figure:
    """Codes over the prior, each model on the two principal directions of its own codes."""
    figure = sheet(WIDTH, 830)
    for column, (name, seen) in enumerate(pair.items()):
        axes = panel(figure, 100 + column * 790, 105, 660, 660)
        centre = seen.codes.mean(0)
        directions = np.linalg.svd(seen.codes - centre, full_matrices=False)[2][:2]
        codes, prior = seen.codes @ directions.T, seen.prior @ directions.T
        tints: str | list[str] = BLUE
        if seen.labels is not None:
            ranks = np.unique(seen.labels, return_inverse=True)[1]
            tints = np.array(CLASS_COLOURS)[thin(ranks) % len(CLASS_COLOURS)].tolist()
        dots(axes, thin(codes), tints, size=14, opacity=0.65)
        radius = np.sqrt(-2 * np.log(1 - np.array([0.5, 0.9])))  # of the discs that hold so much of N(0, I)
        turn = np.linspace(0, 2 * np.pi, 200)
        middle, spread = prior.mean(0), prior.std(0)
        for r in radius:
            axes.plot(middle[0] + spread[0] * r * np.cos(turn), middle[1] + spread[1] * r * np.sin(turn), color=RUST,
                      linewidth=1.3)  # fmt: skip
        half = 1.08 * max(np.abs(codes - codes.mean(0)).max(), 3.0)
        axes.set(xlim=codes[:, 0].mean() + np.array([-half, half]), ylim=codes[:, 1].mean() + np.array([-half, half]))
        heading(axes, name)
        axis_labels(axes, "first principal direction of the codes", "second" if column == 0 else "")
    path = folder / "codes.png"
    save(figure, path)
    caption = (
        "Codes of held-out data, coloured by label where there is one; the red ellipses hold 50 % and 90 % of the "
        "prior as seen from the same side. A VAE’s codes are to fill them; an autoencoder’s have a place and a scale "
        "of their own, and codes drawn from the prior need not be among them."
    )
    return Figure("codes", "Two latent spaces", caption, path)


def draw_mismatch(rows: Sequence[Mapping[str, Any]], folder: Path) -> Figure:
    """Sample quality against the marginal KL, and reconstructions as the control."""
    rows = [row for row in rows if row["marginal_kl"] is not None]
    figure = sheet(WIDTH, 620)
    panels = (("_nll", "−log density under the yardstick, nats"), ("_sharpness", "sharpness"))
    for place, (tail, title) in enumerate(panels):
        if not all(row[f"sample{tail}"] is not None for row in rows):
            continue
        axes = panel(figure, 110 + place * 790, 115, 660, 430)
        across = [row["marginal_kl"] for row in rows]
        for kind, tint in (("sample", BLUE), ("reconstruction", RUST)):
            axes.errorbar(across, [row[f"{kind}{tail}"] for row in rows],
                          [row[f"{kind}{tail}_stderr"] or 0.0 for row in rows], fmt="o", color=tint, markersize=5,
                          elinewidth=1.2, label=f"{kind}s")  # fmt: skip
        for row in rows:
            axes.annotate(row["kind"].replace("_", " "), (row["marginal_kl"], row[f"sample{tail}"]), xytext=(6, 4),
                          textcoords="offset points", fontsize=10, color=INK)  # fmt: skip
        axes.margins(x=0.12)
        heading(axes, title)
        axis_labels(axes, "marginal KL, nats")
        axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    path = folder / "mismatch.png"
    save(figure, path)
    caption = (
        "Every VAE of the study: how far the codes of all data are from the prior, across, and how like data its "
        "samples are. Where blue and red dots are one, a better prior has nothing left to gain."
    )
    return Figure("mismatch", "Sample quality against the marginal KL", caption, path)
