"""The look of every picture: its colours, its type, sheets measured in pixels, mosaics of images.

Only matplotlib's object-oriented interface is used, with an Agg canvas of its own for each sheet: drawing neither reads
a display nor leaves state behind. The typeface ships with matplotlib, so that pictures look alike everywhere.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Sheet
from matplotlib.text import Text

PAPER, WHITE, INK, MUTED, HAIRLINE = "#fcfbf8", "#ffffff", "#1c2230", "#666c78", "#dcd8ce"
FAINT, BLUE, RUST, PALE_BLUE = "#b4b8bf", "#2a5d8f", "#bf4a26", "#c3d3e2"
CLASS_COLOURS = (
    "#2a5d8f", "#d9822b", "#3f8f5b", "#b83a4b", "#7a5aa6",
    "#8a5a3c", "#d16ba5", "#5d6670", "#a39a1f", "#2aa0a8",
)  # fmt: skip
FONT = "STIXGeneral"
FALLBACK = "DejaVu Sans"  # for characters that the other lacks; both come with matplotlib
DPI = 200  # two pixels for each CSS pixel: sharp on a projector and in print
WIDTH = 1600  # pixels of a full-width sheet
SMALL = 16  # pixels a side


def sheet(width: int, height: int) -> Sheet:
    """An empty sheet of paper, sizes in pixels."""
    figure = Sheet(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def panel(figure: Sheet, left: float, bottom: float, width: float, height: float, spines: str = "left bottom") -> Axes:
    """Axes at a place given in pixels from the lower left corner, framed by the named spines only."""
    across, up = figure.get_size_inches() * DPI
    axes = figure.add_axes((left / across, bottom / up, width / across, height / up))
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in spines.split())
        spine.set_color(MUTED)
        spine.set_linewidth(0.6)
    axes.tick_params(colors=MUTED, labelcolor=MUTED, labelsize=10, width=0.6, length=3, labelfontfamily=FONT)
    return axes


def heading(axes: Axes, text: str) -> None:
    """A short heading above a panel, flush with its left edge."""
    axes.set_title(text, loc="left", fontsize=11.5, color=INK, pad=8)


def axis_labels(axes: Axes, x: str = "", y: str = "") -> None:
    """Name the axes; a single symbol stands upright."""
    axes.set_xlabel(x, fontsize=11, color=INK, labelpad=6)
    axes.set_ylabel(y, fontsize=11, color=INK, labelpad=6, rotation=0 if y.startswith("$") else 90)


def save(figure: Sheet, path: Path) -> None:
    """Write a PNG whose bytes depend on the drawing alone."""
    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_fontfamily([FONT, FALLBACK])
            text.set_math_fontfamily("stix")
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the box in its place says so
        figure.savefig(path, dpi=DPI, facecolor=PAPER, metadata={"Software": None})


def dots(axes: Axes, points: np.ndarray, tint: str | list[str], size: float = 9, opacity: float | None = None) -> None:
    """Scatter points ``(n, 2)``, paler the more there are unless told otherwise."""
    if opacity is None:
        opacity = float(np.clip(25 / np.sqrt(max(len(points), 1)), 0.25, 0.75))
    axes.scatter(points[:, 0], points[:, 1], s=size, c=tint, alpha=opacity, linewidths=0)


def thin(rows: np.ndarray, most: int = 5000) -> np.ndarray:
    """At most ``most`` rows, evenly spaced: more dots than that only make a blot."""
    return rows[:: max(1, -(-len(rows) // most))]


def ground_is_low(images: np.ndarray, value_range: tuple[float, float]) -> bool:
    """Whether high pixel values are ink: true for strokes on an empty ground, false for photographs.

    Half of all pixels in the lowest quarter of the range make an empty ground. Photographs printed with high values as
    ink would be negatives.
    """
    low, high = value_range
    return bool(np.median(images) < low + (high - low) / 4)


def colour(images: np.ndarray, value_range: tuple[float, float], high_is_ink: bool) -> np.ndarray:
    """Images ``(*n, C, H, W)`` as colours ``(*n, H, W, 3)`` in [0, 1].

    Three channels are red, green and blue; one channel runs between white paper and ink; any other number of channels
    is averaged to one. Values outside the range are clipped.
    """
    low, high = value_range
    unit = np.clip(np.nan_to_num((np.asarray(images, dtype=float) - low) / (high - low)), 0.0, 1.0)
    if unit.shape[-3] == 3:
        return np.moveaxis(unit, -3, -1)
    ink = unit.mean(axis=-3)[..., None]  # (*n, H, W, 1)
    if not high_is_ink:
        ink = 1.0 - ink
    return (1.0 - ink) * np.array(to_rgb(WHITE)) + ink * np.array(to_rgb(INK))


def mosaic(tiles: np.ndarray) -> np.ndarray:
    """Tiles ``(rows, columns, H, W, 3)`` laid edge to edge: ``(rows * H, columns * W, 3)``.

    Tiles of at most 16 pixels a side get a white rim: their strokes reach the edges and would run together.
    """
    if max(tiles.shape[2:4]) <= SMALL:
        tiles = np.pad(tiles, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)
    rows, columns, height, width, channels = tiles.shape
    return tiles.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)


def print_images(bands: Sequence[np.ndarray], margins: tuple[int, int, int, int] = (2, 2, 2, 2)) -> list[Axes]:
    """Print mosaics ``(H, W, 3)`` of equal width below each other on one sheet, every pixel a square of whole pixels.

    Args:
        bands: the mosaics, top one first.
        margins: pixels left, right, below and above.

    Returns:
        one panel for each band; its data coordinates count the pixels of the band from its upper left corner.
    """
    left, right, below, above = margins
    height, width = sum(len(band) for band in bands), bands[0].shape[1]
    zoom = max(1, min((WIDTH - left - right) // width, 1400 // height))
    gap = 24 if len(bands) > 1 else 0
    figure = sheet(left + zoom * width + right, below + zoom * height + gap * (len(bands) - 1) + above)
    panels, top = [], below + zoom * height + gap * (len(bands) - 1)
    for band in bands:
        top -= zoom * len(band)
        axes = panel(figure, left, top, zoom * width, zoom * len(band), spines="left right top bottom")
        for spine in axes.spines.values():
            spine.set_color(HAIRLINE)
        enlarged = band.repeat(zoom, axis=0).repeat(zoom, axis=1)
        axes.imshow(enlarged, extent=(0, width, len(band), 0), interpolation="none", aspect="auto")
        axes.set(xticks=[], yticks=[])
        panels.append(axes)
        top -= gap
    return panels
