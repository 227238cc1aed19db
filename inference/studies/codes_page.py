"""The page of the study of codes: tables in words, and pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference import canvas
from inference.canvas import BLUE, INK, RUST, WIDTH, axis_labels, panel, save, sheet
from inference.data_figures import image_reconstructions, image_samples
from inference.figures import Figure
from inference.studies.codes_data import Coded
from inference.study import Section
from inference.table import Table
from models.tokens import TokenPrior

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Shown:
    """Everything the page is made of."""

    coded: Coded
    prior: TokenPrior
    best: str
    drawn: Tensor | None
    priors: Rows
    files: Rows
    usage: Rows
    classifiers: Rows
    levels: Rows


def sections(shown: Shown, folder: Path) -> list[Section]:
    """The page, part by part, and its pictures under ``figures/``."""
    figures = folder / "figures"
    made = [
        Section("Reconstructions", _of_usage(), _usage_table(shown), [_reconstructions(shown.coded, figures)]),
        Section(
            "Priors over codes",
            _of_priors(shown),
            Table.from_records([_prior_row(row) for row in shown.priors]),
            [_bars(shown.priors, figures), _samples(shown, figures)],
        ),
        Section("In a file", _of_files(), Table.from_records([_file_row(row) for row in shown.files])),
    ]
    if shown.classifiers:
        rows = Table.from_records([_classifier_row(row) for row in shown.classifiers])
        made.append(Section("Classifiers", _of_classifiers(), rows, _by_class(shown, figures)))
    if shown.levels:
        rows = Table.from_records([_level_row(row) for row in shown.levels])
        made.append(Section("Levels", _of_levels(), rows))
    return made


def _of_usage() -> list[str]:
    return [
        "Perplexity and number of codes in use are of all tokens of a split together. The information that a token has "
        "about its neighbour is above zero where the interval excludes it: then tokens are not independent, and a "
        "prior for each token alone cannot draw pictures. With few images the estimate errs low. Squared errors are "
        "per pixel, of a range of one."
    ]


def _of_priors(shown: Shown) -> list[str]:
    masked = (
        " The masked model was trained to fill in tokens in any order, and is scored in this one."
        if any(row["prior"].startswith("masked") for row in shown.priors)
        else ""
    )
    return [
        "Cost of a held-out grid of tokens under priors fitted to the training tokens; lower is better. The table "
        f"knows each place alone, the Markov table the token before it, the others all tokens before it.{masked}",
        f"The samples are drawn token by token from the best, {shown.best}, and decoded.",
    ]


def _of_files() -> list[str]:
    return [
        "Bits per image of test images. Tokens are written by a range coder as one message and read back; the excess "
        "is over the prior's own −log₂ p. They keep the picture up to the error given; with the residual, the pixels "
        "given the tokens under the likelihood as an ideal code, nothing is lost. PNG is lossless. Neither the "
        "decoder's nor the prior's own size is counted."
    ]


def _of_classifiers() -> list[str]:
    return [
        "Accuracy on real test images of one and the same classifier, trained on as many real images, on their "
        "reconstructions, and on samples of a prior that knows the class. What reconstruction loses, the codes lost; "
        "what samples lose beyond that, the prior did."
    ]


def _of_levels() -> list[str]:
    return [
        "Separate runs with levels of codes, each half as fine as the one below and with an encoder of its own; the "
        "prior of a level reads the level above it (z1 is the finest). Nats are of a whole grid."
    ]


def _prior_row(row: dict[str, Any]) -> dict[str, str]:
    return {
        "prior": row["prior"],
        "nats per token": f"{row['nats_per_token']:.3f}",
        "nats per grid": f"{row['nats_per_grid']:.2f} ± {row['nats_per_grid_stderr']:.2f}",
        "bits per image": f"{row['bits_per_image']:.1f}",
        "seconds": "" if row["seconds"] is None else f"{row['seconds']:.0f}",
    }


def _file_row(row: dict[str, Any]) -> dict[str, str]:
    excess, decoded = row.get("excess"), row.get("decoded")
    return {
        "file": row["file"],
        "bits per image": f"{row['bits_per_image']:.1f}",
        "pixels / file": f"{row['ratio']:.1f}",
        "over −log₂ p": "" if excess is None else f"{100 * excess:+.2f} %",
        "read back": "" if decoded is None else ("the same" if decoded else "NOT the same"),
        "squared error": f"{row['mse']:.4f}",
    }


def _usage_table(shown: Shown) -> Table:
    rows = []
    for row in shown.usage:
        near = "adjacent_nats" in row
        rows.append(
            {
                "split": row["split"],
                "squared error": f"{row['mse']:.4f}",
                "codes in use": f"{row['used']} of {shown.coded.codes}",
                "perplexity": f"{row['perplexity']:.1f}",
                "I(token; neighbour), nats, at least": f"{row['adjacent_nats']:.3f} "
                f"[{row['adjacent_low']:.3f}, {row['adjacent_high']:.3f}]"
                if near
                else "",
            }
        )
    return Table.from_records(rows)


def _classifier_row(row: dict[str, Any]) -> dict[str, str]:
    count = row.get("pictures")
    return {
        "trained on": row["classifier"],
        "pictures": "" if count is None else f"{count:,}",
        "accuracy": f"{100 * row['accuracy']:.1f} %",
    }


def _level_row(row: dict[str, Any]) -> dict[str, str]:
    names = sorted(key.removeprefix("test_nats_") for key in row if key.startswith("test_nats_"))
    rate = {f"NLL {name}, train / test": f"{row[f'train_nats_{name}']:.1f} / {row[f'test_nats_{name}']:.1f}"
            for name in names}  # fmt: skip
    error = {"squared error, train / test": f"{row['train_mse']:.4f} / {row['test_mse']:.4f}"}
    return {"levels": str(row["levels"]), **error, **rate}


def _look(coded: Coded, images: np.ndarray) -> tuple[tuple[float, float], bool]:
    value_range = (0.0, coded.top)
    return value_range, canvas.ground_is_low(images, value_range)


def _numpy(images: Tensor) -> np.ndarray:
    return images.detach().cpu().double().numpy()


def _reconstructions(coded: Coded, figures: Path) -> Figure:
    originals = coded.images["test"][:36]
    shown = image_reconstructions(
        _numpy(originals), _numpy(coded.pictures(coded.tokens["test"][:36])), *_look(coded, _numpy(originals))
    )
    save(shown.sheet, figures / "reconstructions.png")
    return Figure("reconstructions", shown.title, shown.caption, figures / "reconstructions.png")


def _samples(shown: Shown, figures: Path) -> Figure:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        images = _numpy(shown.coded.pictures(shown.prior().sample((72,))))
    picture = image_samples(images, *_look(shown.coded, _numpy(shown.coded.images["test"][:100])))
    save(picture.sheet, figures / "samples.png")
    caption = (
        f"Grids of tokens drawn from the {shown.best} prior, place after place, and decoded. No datum is involved."
    )
    return Figure("samples", "Samples from the learnt prior", caption, figures / "samples.png")


def _by_class(shown: Shown, figures: Path) -> list[Figure]:
    """A row of samples for each of the first ten classes."""
    if shown.drawn is None:
        return []
    classes = len(shown.coded.labels["train"].unique())
    rows, columns = min(classes, 10), min(12, len(shown.drawn) // classes)
    images = _numpy(shown.drawn[: classes * columns]).reshape(columns, classes, *shown.drawn.shape[1:])[:, :rows]
    look = _look(shown.coded, _numpy(shown.coded.images["test"][:100]))
    tiles = canvas.colour(images.swapaxes(0, 1), *look)
    axes = canvas.print_images([canvas.mosaic(tiles)])[0]
    drawing = axes.get_figure(root=True)
    assert isinstance(drawing, canvas.Sheet)
    save(drawing, figures / "by_class.png")
    caption = "Samples of the prior that knows the class, one class in each row: what the last classifier learns from."
    return [Figure("by_class", "Samples by class", caption, figures / "by_class.png")]


def _bars(rows: Sequence[dict[str, Any]], figures: Path) -> Figure:
    """Bits per image under each prior."""
    figure = sheet(WIDTH, 150 + 64 * len(rows))
    axes = panel(figure, 380, 100, WIDTH - 540, 64 * len(rows), spines="bottom")
    least = min(row["bits_per_image"] for row in rows)
    for place, row in enumerate(rows):
        length, error = row["bits_per_image"], row["nats_per_grid_stderr"] / math.log(2)
        axes.barh(place, length, height=0.6, color=RUST if length == least else BLUE)
        axes.errorbar(length, place, xerr=error, color=INK, elinewidth=1.2)
        axes.text(length + 2 * error, place, f"  {length:.1f}", va="center", fontsize=10.5, color=INK)
    axes.set_yticks(range(len(rows)), [row["prior"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", length=0)
    axis_labels(axes, "bits per held-out image, for its tokens")
    save(figure, figures / "priors.png")
    caption = "What a grid of tokens costs under each prior; whiskers are one standard error over test images."
    return Figure("priors", "Bits for the tokens of an image", caption, figures / "priors.png")
