"""Study: colorization. A latent segmentation is learned by a colorizer that needs it, and by no other."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import to_rgb

from inference.canvas import CLASS_COLOURS, HAIRLINE, INK, mosaic, print_images, save
from inference.colorization import (
    LEVELS,
    Pictures,
    best_colorizer,
    coloured,
    draw_pictures,
    information,
    segmentation,
)
from inference.config import ConfigError
from inference.console import Console
from inference.figures import Figure
from inference.study import Section, write_study
from inference.table import Table
from models.conditional_vae import ConditionalModel

SHOWN = 8  # pictures on the page
NAMES = {False: "weak: P(ŷ|z)", True: "universal: P(ŷ|z, x)"}


@dataclass
class ColorizationSettings:
    """The toy and how it is learned.

    Args:
        pictures: to train on, and as many to look at.
        segments: kinds of segments, each with its own grey and colour.
        states: of z.
        starts: random starts of each colorizer, the best of which by its bound is shown.
        steps: of each training.
        seed: of pictures and starts.
    """

    pictures: int = 12
    segments: int = 4
    states: int = 8
    starts: int = 3
    steps: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"pictures": 1, "segments": 2, "states": 2, "starts": 1, "steps": 1, "seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"study.{name} is at least {value}, got {getattr(self, name)}")
        if self.segments > len(CLASS_COLOURS):
            raise ConfigError(f"study.segments is at most {len(CLASS_COLOURS)}, got {self.segments}")


def colorization(
    arguments: list[str], settings: ColorizationSettings, folder: Path, console: Console, command: str
) -> Path:
    """A latent segmentation per pixel, summed out: learned with a weak colorizer, left alone by a universal one."""
    if arguments:
        raise ConfigError(f"{arguments[0]}: the study colorization draws its own pictures; accepted: study.* options")
    train = draw_pictures(settings.pictures, segments=settings.segments, seed=settings.seed)
    test = draw_pictures(settings.pictures, segments=settings.segments, seed=settings.seed + 1)
    models: dict[bool, ConditionalModel] = {}
    records = []
    with console.stage("colorizers") as progress:
        for done, universal in enumerate((False, True), start=1):
            model, bound = best_colorizer(
                train.pixels, settings.states, universal, settings.starts, settings.steps, settings.seed
            )
            models[universal] = model
            records.append(_record(model, bound, universal, test))
            progress(done, 2)
    table = Table.from_records(records)
    shown = Table.from_records([{k: f"{v:.3f}" if isinstance(v, float) else v for k, v in r.items()} for r in records])
    sections = [Section("What z learns", READING, shown, [_draw(models, test, folder)])]
    return write_study(folder, "Colorization with a latent segmentation", _intro(settings), sections, table, command)


READING = [
    "Both colour held-out pictures as well as the noise in the colours allows. The weak colorizer sees nothing but z, "
    "so all it knows of a pixel has to go through z, and z becomes the segment. The universal one sees the grey as "
    "well. It could use z or not; the bound is the same, and training from a start where z says nothing leaves it so."
]


def _intro(settings: ColorizationSettings) -> list[str]:
    return [
        "P(ŷ|x) = Σ P(z|x) P(ŷ|z, x), pixel by pixel: x is the grey of a pixel, ŷ its colour, z a latent of "
        f"{settings.states} states that is summed over, in the bound and in what is shown. Pictures are made of "
        f"cells of {settings.segments} kinds, each with a grey of its own, give or take a level, and a colour of its "
        "own; one pixel in twenty takes any colour instead.",
        f"Each colorizer is trained from {settings.starts} starts on {settings.pictures} pictures, the best by its "
        "bound is kept, and everything below is measured on as many new ones.",
    ]


def _record(model: ConditionalModel, bound: float, universal: bool, test: Pictures) -> dict[str, object]:
    pixels = test.pixels
    p = coloured(model, pixels)
    score = float(p[torch.arange(len(p)), pixels[:, 1].long()].log().mean())
    says, entropy = information(model, test)
    return {
        "colorizer": NAMES[universal],
        "training bound": bound,
        "held-out log P(ŷ|x)": score,
        "I(z; segment)": says,
        "H(segment)": entropy,
    }


def _draw(models: dict[bool, ConditionalModel], test: Pictures, folder: Path) -> Figure:
    """Rows of pictures: what is given, the truth, and for each colorizer its states and its colours."""
    count, side = min(SHOWN, len(test.segment)), test.segment.shape[1]
    palette = np.array([to_rgb(tint) for tint in CLASS_COLOURS])
    grey = np.repeat(1 - test.grey[:count, :, :, None] / (LEVELS - 1), 3, axis=3)
    rows = [("grey, x", grey), ("colour, y", palette[test.colour[:count]])]
    states = np.array([to_rgb(tint) for tint in (*CLASS_COLOURS, INK, HAIRLINE)])
    for universal, model in models.items():
        shares = segmentation(model, test.pixels).double().numpy().reshape(*test.segment.shape, -1)[:count]
        tints = states[np.arange(shares.shape[-1]) % len(states)]
        p = coloured(model, test.pixels).double().numpy().reshape(*test.segment.shape, -1)[:count]
        known = p[..., : len(palette)] / p[..., : len(palette)].sum(-1, keepdims=True)
        name = "universal" if universal else "weak"
        rows += [(f"P(z|x), {name}", shares @ tints), (f"P(ŷ|x), {name}", known @ palette[: known.shape[-1]])]
    bands = [mosaic(np.asarray(tiles).reshape(1, count, side, side, 3)) for _, tiles in rows]
    panels = print_images(bands, margins=(330, 4, 6, 6))
    for axes, (name, _) in zip(panels, rows, strict=True):
        axes.text(-0.012, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize=10.5, color=INK)
    path = folder / "figures" / "colorization.png"
    save(panels[0].get_figure(root=True), path)  # type: ignore[arg-type]
    caption = (
        "New pictures. P(z|x) is painted with a colour for each state, mixed by their probabilities: the weak "
        "colorizer's states are the segments, the universal one's are the same mixture everywhere. P(ŷ|x) mixes the "
        "colours by their predicted probabilities."
    )
    return Figure("colorization", "Grey, colours, segments", caption, path)
