"""Study: adversarial. One decoder trained by a bound and in a game: what can be asked of each?"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from inference.adversarial import train_adversarially
from inference.assemble import assemble, start_from_data
from inference.canvas import WIDTH, colour, ground_is_low, mosaic, panel, save, sheet
from inference.config import ConfigError, load
from inference.console import Console, Quiet
from inference.data import Batches
from inference.evaluate import evaluating, held_out
from inference.experiment import open_run, train
from inference.figures import Figure
from inference.particles import generate
from inference.rundir import read_summary
from inference.sample_quality import energy_test, sharpness
from inference.study import Section, write_study
from inference.table import Table
from models.implicit import NO_DENSITY
from models.nets import MLP

BASE = {
    "data.binarization": "none",
    "model.latent_dim": "8",
    "trainer.steps": "3000",
    "trainer.learning_rate": "0.002",
    "trainer.schedule": "cosine",
    "evaluation.particles": "200",
}
SIDE = 10  # pictures along a side of each panel


@dataclass
class AdversarialSettings:
    """How the generator is trained.

    Args:
        steps: of generator and discriminator, in turn.
        learning_rate: of both.
        hidden: width of the discriminator's two layers.
        saturating: whether the generator lowers E log(1 - D), the minimax game to the letter, or raises E log D.
        samples: drawn from each model, and compared with as many held-out data.
    """

    steps: int = 4000
    learning_rate: float = 1e-3
    hidden: int = 200
    saturating: bool = False
    samples: int = 300

    def __post_init__(self) -> None:
        if min(self.steps, self.hidden) < 1 or self.samples < 100 or not self.learning_rate > 0:
            raise ConfigError("study.steps, hidden and learning_rate must be above 0, study.samples at least 100")


def adversarial(
    arguments: list[str], settings: AdversarialSettings, folder: Path, console: Console, command: str
) -> Path:
    """A VAE and a generator without density (GAN) with one decoder: numbers and samples of both."""
    given = {argument.partition("=")[0] for argument in arguments}
    if "likelihood" in given:
        raise ConfigError("the study of adversarial training chooses the likelihoods itself: leave out likelihood=...")
    options = [*(f"{key}={value}" for key, value in BASE.items() if key not in given), *arguments]
    with console.stage("adversarial") as progress:
        run = folder / "runs" / "vae"
        if not (run / "summary.json").exists():
            train(load([*options, "likelihood=gaussian", f"run.dir='{run}'"]), Quiet())
        progress(1, 3)
        vae, summary = open_run(run), read_summary(run)
        generator, values, seconds = _play(options, settings)
        progress(2, 3)
        real, _ = held_out(vae.source("test"), settings.samples, summary["seed"])
        draws = {"VAE": _samples(vae.model, real), "GAN": _samples(generator, real)}
        records = [{"model": "held-out data", **_quality(real, None)}]
        for name, x in draws.items():
            records.append({"model": name, **_quality(x, real)})
        records[1] |= {"elbo": summary["test/elbo"], "log_p": -summary["test/nll"], "seconds": summary["train/seconds"]}
        records[2] |= {"value": float(np.mean(values[-100:])), "seconds": seconds}
        progress(3, 3)
    picture = _draw({"held-out data": real, **draws}, folder)
    section = Section(
        "What can be asked of each", _reading(), Table.from_records([_row(r) for r in records]), [picture]
    )
    intro = [f"The prior and decoder of one model, trained twice. The data: {summary['data_description']}"]
    return write_study(folder, "With and without a density", intro, [section], Table.from_records(records), command)


def _play(options: list[str], settings: AdversarialSettings) -> tuple[nn.Module, list[float], float]:
    """The generator after the game, the game's value at each step, and the seconds it took."""
    setup = assemble(load([*options, "likelihood=implicit"]))
    start_from_data(setup)
    batching = setup.config.section("batching")
    source = setup.source("train")
    batches = Batches(source, batching.batch_size, setup.config.values.seed)

    def endless() -> Any:
        while True:
            yield from batches

    width = (settings.hidden, settings.hidden)
    judge = MLP(setup.dataset.shape, (1,), hidden=width, activation="leaky_relu").to(setup.device)
    stream, start = endless(), time.monotonic()
    values = train_adversarially(
        setup.model, judge, lambda: next(stream), settings.steps, settings.learning_rate, settings.saturating
    )
    return setup.model, values, time.monotonic() - start


def _samples(model: nn.Module, like: Tensor) -> Tensor:
    with evaluating(model, seed=0):
        return generate(model, like)[1].mean


def _quality(x: Tensor, real: Tensor | None) -> dict[str, Any]:
    row: dict[str, Any] = {}
    if real is not None:
        test = energy_test(_flat(x), _flat(real))
        row = {"energy": test.statistic, "energy_threshold": test.threshold}
    if x.dim() == 4:
        row["sharpness"] = sharpness(x.cpu().double().numpy())
    return row


def _flat(x: Tensor) -> np.ndarray:
    return x.flatten(1).cpu().double().numpy()


def _row(record: dict[str, Any]) -> dict[str, str]:
    def shown(key: str, digits: int) -> str:
        return f"{record[key]:.{digits}f}".replace("-", "−") if key in record else ""

    has_none = "none" if record["model"] == "GAN" else ""
    return {
        "model": record["model"],
        "ELBO": shown("elbo", 1) or has_none,
        "log p(x)": shown("log_p", 1) or has_none,
        "energy distance": shown("energy", 3),
        "its 95 % threshold": shown("energy_threshold", 3),
        "sharpness": shown("sharpness", 3),
        "value of the game": shown("value", 3),
        "seconds": shown("seconds", 0),
    }


def _reading() -> list[str]:
    return [
        "Both models draw a latent from N(0, I) and decode it. The VAE's decoder is the mean of a Gaussian, its "
        "training climbs a bound on log p(x), and every datum can be scored. The other's output is the datum itself: "
        "its training is a game against a discriminator, and asked for a density it answers: " + NO_DENSITY + ".",
        "The energy distance compares the pictures with held-out data and is below its threshold in 95 of 100 cases "
        "where the two have one distribution. The value of the game is E log D(x) + E log(1 − D(G(z))), −log 4 = "
        "−1.386 where the discriminator cannot tell them apart. Densities are of dequantized pixels, in nats.",
    ]


def _draw(kinds: dict[str, Tensor], folder: Path) -> Figure:
    """A square of pictures of each kind, side by side."""
    side = 480
    figure = sheet(WIDTH, side + 110)
    originals = next(iter(kinds.values()))[: SIDE**2].cpu().double().numpy()
    for place, (name, x) in enumerate(kinds.items()):
        axes = panel(figure, 40 + place * (side + 40), 20, side, side, spines="left right top bottom")
        axes.set_title(name, loc="left", fontsize=11.5, pad=8)
        axes.set(xticks=[], yticks=[])
        images = x[: SIDE**2].cpu().double().numpy()
        if images.ndim == 4:
            tiles = colour(images, (0.0, 1.0), ground_is_low(originals, (0.0, 1.0)))
            axes.imshow(mosaic(tiles.reshape(SIDE, SIDE, *tiles.shape[1:])), interpolation="nearest", aspect="auto")
        else:
            axes.scatter(images[:, 0], images[:, -1], s=6)
    save(figure, folder / "figures" / "samples.png")
    caption = "Held-out data, and draws of the two models: means of p(x|z) of the VAE, and G(z) of the other."
    return Figure("samples", "Samples", caption, folder / "figures" / "samples.png")
