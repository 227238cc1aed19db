"""Study: rate and distortion. What does a code cost, what does it buy, and how far is that from the linear optimum?"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.assemble import Setup
from inference.config import ConfigError
from inference.console import Console
from inference.diagnostics import elbo_terms
from inference.evaluate import evaluating, held_out
from inference.experiment import open_run
from inference.grid import Point, run_grid
from inference.particles import decode, particles
from inference.studies.linear import check_linear, named, transition, water_filling_curve
from inference.studies.rate_distortion_figures import draw_frontier, draw_linear, draw_tradeoff
from inference.study import Section, words_with_error, write_study
from inference.table import Table, over_seeds
from models.likelihoods import FixedGaussian

MEASURED = (
    "test/kl",
    "test/distortion",
    "test/squared_error",
    "test/elbo",
    "test/nll",
    "test/mutual_information",
    "test/active_units",
    "above_envelope",
    "train/rate",
    "train/squared_error",
)
BUDGET = {
    "trainer.steps": "3000",
    "trainer.learning_rate": "0.002",
    "trainer.schedule": "cosine",
    "decoder.hidden": "[200]",
    "encoder.hidden": "[200]",
    "evaluation.particles": "200",
    "evaluation.draws": "10",
}
DRAWS = 4  # of z for each datum
MOST_DATA = 2000  # training data on which the runs' rate and squared error are measured


@dataclass
class RateDistortionSettings:
    """What is varied.

    Args:
        betas: weights of the KL, of the deep and of the linear models.
        seeds: of the deep runs of each.
        scale: standard deviation of the noise of the default likelihood, in the units of the data.
        linear_dim: number of latents of the linear VAE.
        linear_steps: of its training at most, on at most 5,000 data at once.
        jobs: runs at a time; 0 for one per CPU core.
    """

    betas: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0])
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    scale: float = 0.2
    linear_dim: int = 20
    linear_steps: int = 2000
    jobs: int = 0


def rate_distortion(
    arguments: list[str], settings: RateDistortionSettings, folder: Path, console: Console, command: str
) -> Path:
    """A sweep of beta: rate, distortion in nats and in squared error, beside the linear model's water-filling."""
    if not settings.betas or not settings.seeds:
        raise ConfigError("study.betas and study.seeds need at least one entry each")
    if twice := [beta for beta in settings.betas if settings.betas.count(beta) > 1]:
        raise ConfigError(f"study.betas: {twice[0]:g} is there twice")
    check_linear("study.betas", settings.betas, settings.linear_dim, settings.scale)
    points = _points(arguments, settings)
    _, results = run_grid(points, folder / "runs", console, settings.jobs, run_dir=folder)
    if failed := [result for result in results if result.get("error")]:
        raise ConfigError(f"{failed[0]['run']} failed: {failed[0]['error']}")
    with console.stage("distortions") as progress:
        for done, result in enumerate(results, start=1):
            result.update(_measure(open_run(folder / "runs" / result["run"])))
            progress(done, len(results))
    _place_under_envelope(results)
    table, figures = over_seeds(results, ["beta", "seed"], MEASURED), folder / "figures"
    sections = _sections(table, results, figures)
    if results[0]["train/squared_error"] is not None:
        table, section = _beside_linear(table, results, folder, settings, console)
        sections.append(section)
    return write_study(folder, "Rate and distortion", _intro(results, settings), sections, table, command)


def _beside_linear(
    table: Table, results: list[dict[str, Any]], folder: Path, settings: RateDistortionSettings, console: Console
) -> tuple[Table, Section]:
    """The table with a linear VAE's numbers at each beta beside those of the runs, and the section about them."""
    setup = open_run(folder / "runs" / results[0]["run"])
    noise = float(setup.model.likelihood.scale) if isinstance(setup.model.likelihood, FixedGaussian) else settings.scale
    x = training_data(setup)
    with console.stage("linear VAEs") as progress:
        linear = transition(
            x, settings.betas, noise, settings.linear_dim, settings.linear_steps,
            on_progress=progress,
        )  # fmt: skip
    curve = water_filling_curve(x, settings.linear_dim)
    rows = [{**row, **{f"linear/{k}": v for k, v in exact.items() if k != "beta"}}
            for row, exact in zip(table.records(), linear, strict=True)]  # fmt: skip
    picture = draw_linear(results, linear, curve, folder / "figures")
    section = Section("Beside the linear model", _about_linear(noise), _linear_table(linear), [picture])
    return Table.from_records(rows), section


def _points(arguments: Sequence[str], settings: RateDistortionSettings) -> list[Point]:
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if own := [key for key in given if key in ("objective", "objective.beta")]:
        raise ConfigError(f"{own[0]}={given[own[0]]}: the study is about objective=beta, with the weights study.betas")
    words = {key: value for key, value in BUDGET.items() if key.partition(".")[0] not in given}  # options of other nets
    if "trainer.epochs" in given:
        del words["trainer.steps"]
    if "data" not in given:
        words["data.binarization"] = "none"
    if "likelihood" not in given:
        words |= {"likelihood": "gaussian", "likelihood.scale": f"{settings.scale:g}"}
    kl = "monte_carlo" if {"prior", "guide"} & set(given) else "analytic"  # many pairs have no closed form
    points = []
    for beta in settings.betas:
        for seed in settings.seeds:
            objective = {"objective": "beta", "objective.beta": named(beta), "objective.kl": kl}
            whole = {**words, **objective, **given, "seed": str(seed)}
            labels = {"beta": named(beta), "seed": str(seed)}
            points.append(Point(labels, tuple(f"{key}={value}" for key, value in whole.items())))
    return points


def training_data(setup: Setup) -> Tensor:
    """The training data as a run's model saw them, flat and less their mean, ``(N, D)``; at most 5,000."""
    source = setup.source("train")
    x = source.fixed(torch.arange(min(len(source), 5000))).flatten(1)  # (N, *event) -> (N, D)
    return x - x.mean(0)


def _measure(setup: Setup) -> dict[str, float | None]:
    """Rate, distortion (nats) and, where the likelihood knows a mean, squared error on held-out and training data."""
    found: dict[str, float | None] = {}
    for split in ("test", "train"):
        x, _ = held_out(setup.source(split), 0 if split == "test" else MOST_DATA, seed=0)
        with evaluating(setup.model, setup.guide, seed=0):
            parts = torch.cat([_parts(setup, some) for some in x.split(256)]).mean(0).tolist()
        names = (f"{split}/rate", f"{split}/distortion", f"{split}/squared_error")
        found |= dict(zip(names, [*parts, None][:3], strict=True))
    return found


def _parts(setup: Setup, x: Tensor) -> Tensor:
    """KL, -log p(x|z) and |x - E[x|z]|^2 of each datum, the last two for the same draws of z, ``(N, 3)``.

    ``(N, 2)``, without the last, where the likelihood knows no mean: pixels or tokens that depend on each other.
    """
    kl = elbo_terms(setup.model, setup.guide, x).kl
    nats, errors = torch.zeros_like(kl), []
    for _ in range(DRAWS):
        draws = particles(setup.model, setup.guide, x)
        nats -= draws.log_likelihood[0] / DRAWS
        with contextlib.suppress(NotImplementedError):
            mean = decode(setup.model, {name: latent.value for name, latent in draws.latents.items()}, x).mean
            errors.append((x - mean).reshape(len(x), -1).square().sum(1))
    return torch.stack([kl, nats, *([torch.stack(errors).mean(0)] if errors else [])], 1)


def _place_under_envelope(results: list[dict[str, Any]]) -> None:
    """How far D + beta R of each run is above the least of all runs, at its own beta; nats."""
    for result in results:
        beta = float(result["beta"])
        least = min(other["test/distortion"] + beta * other["test/rate"] for other in results)
        result["above_envelope"] = result["test/distortion"] + beta * result["test/rate"] - least


# --- the page ----------------------------------------------------------------------------------------------------


def _sections(table: Table, results: list[dict[str, Any]], figures: Path) -> list[Section]:
    columns = [name for name in MEASURED if not name.startswith("train")]
    shown = Table.from_records(
        [{k: v for k, v in row.items() if k.removesuffix("_stderr") in ("beta", *columns)} for row in table.records()]
    )
    return [
        Section("The frontier", _about_frontier(), words_with_error(shown, columns), [draw_frontier(results, figures)]),
        Section("The envelope", _about_envelope(), None, [draw_tradeoff(results, figures)]),
    ]


def _intro(results: list[dict[str, Any]], settings: RateDistortionSettings) -> list[str]:
    first = results[0]
    return [
        f"A VAE (likelihood {first['likelihood']}, prior {first['prior']}, guide {first['guide']}) on {first['data']}, "
        f"trained for {first['train/steps']:,} steps with each of {len(settings.betas)} weights β of the KL; seeds "
        f"{', '.join(map(str, settings.seeds))}. Rate R = E KL(q(z|x) ‖ p(z)) and distortion D = −E log p(x|z), so "
        "that −ELBO = R + D; held-out data, nats per datum.",
        f"The data: {first['data_description']}",
    ]


def _about_frontier() -> list[str]:
    return [
        "β trades one for the other: minimizing D + β R finds the point of the frontier where its slope is −β (Alemi "
        "et al. 2018). Models on one diagonal have one ELBO, and may use their codes a lot or not at all: the bound "
        "alone does not say which."
    ]


def _about_envelope() -> list[str]:
    return [
        "Left: R + D, the negative ELBO, against the rate; in training it is least at β = 1, which optimizes just "
        "that; −log p(x), importance-sampled, lies below it by the guide’s gap. Right: every model is a line D + β R "
        "in β, and the lower envelope of the lines is what the family attains; a model trained well lies on it at its "
        "own β."
    ]


def _about_linear(noise: float) -> list[str]:
    return [
        f"On training data. The curve is reverse water-filling of the data’s covariance: R = ½ Σ log(λ / s), "
        f"D = Σ min(λ, s) for a water level s; a linear VAE with noise {noise:g} and weight β should be at s = β · "
        f"{noise:g}². What a deep VAE has below the curve is what is not Gaussian in the data."
    ]


def _linear_table(linear: list[dict[str, Any]]) -> Table:
    return Table.from_records(
        [
            {
                "β": row["beta"],
                "active units": row["active"],
                "exactly": row["exact_active"],
                "rate": row["rate"],
                "½ Σ log(λ / s)": row["exact_rate"],
                "rate off by, %": 100 * (row["rate"] / row["exact_rate"] - 1) if row["exact_rate"] else None,
                "squared error": row["distortion"],
                "Σ min(λ, s)": row["exact_distortion"],
                "error off by, %": 100 * (row["distortion"] / row["exact_distortion"] - 1),
            }
            for row in linear
        ]
    )
