"""Study: autoencoder against VAE. Does it generate, has it a density, what is its latent space, and why the blur?"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from inference.assemble import Setup, assemble, start_from_data
from inference.codes import is_certain
from inference.config import ConfigError, load
from inference.console import Console
from inference.diagnostics import posterior_means
from inference.evaluate import evaluating, held_out
from inference.experiment import open_run
from inference.grid import Point, run_grid
from inference.particles import decode, generate, particles
from inference.sample_quality import Yardstick, energy_test, normal_kl, sharpness
from inference.studies.autoencoder_figures import Seen, draw_codes, draw_images, draw_mismatch
from inference.studies.linear import density_as_noise_vanishes, directions
from inference.study import Section, words_with_error, write_study
from inference.table import Table, over_seeds

MODELS: dict[str, str] = {
    "autoencoder": "guide=deterministic objective=beta objective.beta=0",
    "beta_tenth": "objective=beta objective.beta=0.1 objective.kl=analytic",
    "vae": "objective=elbo objective.kl=analytic",
    "beta_4": "objective=beta objective.beta=4 objective.kl=analytic",
    "vamp": "prior=vamp prior.components=100 objective=elbo",
    "realnvp": "prior=realnvp objective=elbo",
}
BUDGET = {
    "trainer.steps": "3000",
    "trainer.learning_rate": "0.002",
    "trainer.schedule": "cosine",
    "encoder.hidden": "[200]",
    "decoder.hidden": "[200]",
    "model.latent_dim": "8",
    "evaluation.particles": "200",
    "evaluation.draws": "10",
}
# column: what a reader sees
MEASURED = {
    "squared_error": "squared error",
    "nll": "−log p(x)",
    "mutual_information": "I(x; z)",
    "marginal_kl": "marginal KL",
    "code_kl": "KL(normal fit ‖ N(0, I))",
    "sample_nll": "samples",
    "fitted_nll": "samples from fitted codes",
    "halfway_nll": "halfway codes",
    "reconstruction_nll": "reconstructions",
    "energy": "energy distance",
    "energy_threshold": "its 95 % threshold",
    "sample_sharpness": "sharpness of samples",
    "reconstruction_sharpness": "of reconstructions",
    "accuracy": "15-NN accuracy",
}


@dataclass
class AutoencoderSettings:
    """What is compared.

    Args:
        models: words of this study (autoencoder, beta_tenth, vae, beta_4, vamp, realnvp) or any run.py words; the first
            is drawn beside vae, or beside the second.
        seeds: of the runs of each.
        scale: standard deviation of the noise of the default likelihood.
        samples: drawn from each model; halves are compared with as many held-out data.
        noises: standard deviations at which a linear model's density is followed to zero noise.
        jobs: runs at a time; 0 for one per CPU core.
    """

    models: list[str] = field(default_factory=lambda: list(MODELS))
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    scale: float = 0.15
    samples: int = 300
    noises: list[float] = field(default_factory=lambda: [0.3, 0.1, 0.03, 0.01, 0.003, 0.001])
    jobs: int = 0


def autoencoder(
    arguments: list[str], settings: AutoencoderSettings, folder: Path, console: Console, command: str
) -> Path:
    """Generation, density and latent space of an autoencoder and of VAEs, in numbers; blur and prior mismatch."""
    if not settings.models or not settings.seeds:
        raise ConfigError("study.models and study.seeds need at least one entry each")
    if settings.samples < 20:
        raise ConfigError(f"study.samples: {settings.samples} is below 20, too few to compare")
    points = _points(arguments, settings)
    _check_parts(points)
    _, results = run_grid(points, folder / "runs", console, settings.jobs, run_dir=folder)
    if failed := [result for result in results if result.get("error")]:
        raise ConfigError(f"{failed[0]['run']} failed: {failed[0]['error']}")
    seen: dict[str, Seen] = {}
    with console.stage("samples") as progress:
        setup = open_run(folder / "runs" / results[0]["run"])
        data = _data(setup)
        for done, (point, result) in enumerate(zip(points, results, strict=True), start=1):
            name = point.labels["kind"]
            numbers, arrays = _measure(open_run(folder / "runs" / result["run"]), data, settings.samples)
            result.update(
                {**point.labels, "nll": result["test/nll"] if numbers.pop("has_density") else None, **numbers}
            )
            for key in ("mutual_information", "marginal_kl"):
                result[key] = result[f"test/{key}"] if result["nll"] is not None else None
            seen.setdefault(name, arrays)
            progress(done, len(points))
    table = over_seeds(results, ["kind", "seed"], tuple(MEASURED))
    train = torch.as_tensor(data.train)
    latent_dim = min(next(iter(seen.values())).codes.shape[1], directions(train) - 1)  # some noise has to be left
    linear = density_as_noise_vanishes(train, latent_dim, settings.noises) if latent_dim > 0 else []
    sections = _sections(table, seen, data, (latent_dim, linear), folder / "figures")
    return write_study(folder, "Autoencoder against VAE", _intro(results, settings), sections, table, command)


def _check_parts(points: Sequence[Point]) -> None:
    """Refuse what cannot be compared: models of several latents, and likelihoods that know no mean."""
    for point in {point.labels["kind"]: point for point in points}.values():
        setup = assemble(load(point.arguments))
        start_from_data(setup)
        with evaluating(setup.model, setup.guide, seed=0):
            latents, p_x, _ = generate(setup.model, setup.source("test").fixed(torch.arange(1)))
        if len(latents) != 1:
            raise ConfigError(
                f"{point.labels['kind']}: the study compares one latent with its prior; model="
                f"{setup.config.words['model']} has {', '.join(latents)}"
            )
        try:
            p_x.mean  # noqa: B018  (asked for what it raises)
        except NotImplementedError:
            raise ConfigError(
                f"{point.labels['kind']}: the study compares means, and likelihood={setup.config.words['likelihood']} "
                "knows none; accepted: one of independent entries, such as gaussian or bernoulli"
            ) from None


def _points(arguments: Sequence[str], settings: AutoencoderSettings) -> list[Point]:
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if any(key.partition(".")[0] == "objective" for key in given):
        raise ConfigError("each of study.models has an objective of its own: leave out objective=... and its options")
    base = {key: value for key, value in BUDGET.items() if key.partition(".")[0] not in given}  # options of other parts
    if "trainer.epochs" in given:
        del base["trainer.steps"]
    if "data" not in given:
        base["data.binarization"] = "none"
    if "likelihood" not in given:
        base |= {"likelihood": "gaussian", "likelihood.scale": f"{settings.scale:g}"}
    points = []
    for name in settings.models:
        own = dict(word.partition("=")[::2] for word in MODELS.get(name, name).split())
        if bad := [key for key, value in own.items() if not value]:
            known = ", ".join(MODELS)
            raise ConfigError(f"study.models: {bad[0]!r} is neither one of {known} nor key=value words of a run")
        for seed in settings.seeds:
            words = {**base, **given, **own, "seed": str(seed)}
            arguments_ = tuple(f"{key}={value}" for key, value in words.items())
            points.append(Point({"kind": name, "seed": str(seed)}, arguments_))
    return points


@dataclass(frozen=True)
class Data:
    """What all runs are held against, flat: training and held-out data, their labels, and a density of the data."""

    train: np.ndarray
    test: np.ndarray
    labels: tuple[np.ndarray, np.ndarray] | None
    shape: tuple[int, ...]
    yardstick: Yardstick


def _data(setup: Setup) -> Data:
    (train, at_train), (test, at_test) = (held_out(setup.source(split), 2000, seed=0) for split in ("train", "test"))
    labels = None
    if {"train", "test"} <= set(setup.dataset.labels):
        labels = (setup.dataset.labels["train"][at_train].numpy(), setup.dataset.labels["test"][at_test].numpy())
    flat = [_flat(x) for x in (train, test)]
    return Data(flat[0], flat[1], labels, tuple(setup.dataset.shape), Yardstick(flat[0]))


def _flat(x: Tensor) -> np.ndarray:
    return x.detach().flatten(1).double().cpu().numpy()


def _measure(setup: Setup, data: Data, count: int) -> tuple[dict[str, Any], Seen]:
    """The answers of one run, and what its pictures show."""
    model, guide = setup.model, setup.guide
    train, _ = held_out(setup.source("train"), 2000, seed=0)
    test, _ = held_out(setup.source("test"), 2000, seed=0)
    like = test[:1].expand(count, *test.shape[1:])
    with evaluating(model, guide, seed=0):
        (name,) = particles(model, guide, test[:1]).latents
        codes = {split: posterior_means(guide, x) for split, x in (("train", train), ("test", test))}
        drawn = particles(model, guide, test).latents[name].value.reshape(len(test), -1)

        def shown(z: Tensor) -> Tensor:
            return decode(model, {name: z}, test[:1].expand(len(z), *test.shape[1:])).mean

        prior, p_x, x_drawn = generate(model, like)
        reconstructions, samples = shown(drawn), p_x.mean
        order = torch.randperm(len(test))
        pairs = min(count, len(test))
        halfway = shown((codes["test"] + codes["test"][order])[:pairs] / 2)
        covariance = torch.cov(codes["train"].T).reshape(codes["train"].shape[1], -1)
        fitted = torch.distributions.MultivariateNormal(
            codes["train"].mean(0), covariance + 1e-6 * torch.eye(len(covariance))
        )
        from_fit = shown(fitted.sample(torch.Size([count])))
        certain = is_certain(guide, test)
    real = data.test[:count]
    two = energy_test(_flat(x_drawn)[: len(real)], real)
    side = [codes[split].double().cpu().numpy() for split in ("train", "test")]
    numbers = {
        "has_density": not certain,
        "squared_error": float((reconstructions - test).flatten(1).square().sum(1).mean()),
        "code_kl": normal_kl(drawn.double().cpu().numpy()),
        "sample_nll": data.yardstick.nll(_flat(samples)),
        "fitted_nll": data.yardstick.nll(_flat(from_fit)),
        "halfway_nll": data.yardstick.nll(_flat(halfway)),
        "reconstruction_nll": data.yardstick.nll(_flat(reconstructions)),
        "energy": two.statistic,
        "energy_threshold": two.threshold,
        "sample_sharpness": _sharpness(samples),
        "reconstruction_sharpness": _sharpness(reconstructions),
        "accuracy": KNeighborsClassifier(15).fit(side[0], data.labels[0]).score(side[1], data.labels[1])
        if data.labels is not None
        else None,
    }
    test_, reconstructed, made = (x.double().cpu().numpy() for x in (test, reconstructions, samples))
    test_labels = None if data.labels is None else data.labels[1]
    return numbers, Seen(test_, reconstructed, made, drawn.double().cpu().numpy(), _flat(prior[name]), test_labels)


def _sharpness(images: Tensor) -> float | None:
    return sharpness(images.double().cpu().numpy()) if images.dim() == 4 else None


# --- the page ----------------------------------------------------------------------------------------------------


def _sections(
    table: Table, seen: dict[str, Seen], data: Data, linear: tuple[int, list[dict[str, float]]], figures: Path
) -> list[Section]:
    pair = dict(list(seen.items())[:1] + [item for item in list(seen.items())[1:] if item[0] == "vae"])
    if len(pair) < 2:
        pair = dict(list(seen.items())[:2])
    generation = ("squared_error", "reconstruction_nll", "sample_nll", "fitted_nll", "energy", "energy_threshold")
    density, latent = ("nll", "mutual_information", "marginal_kl"), ("code_kl", "halfway_nll", "accuracy")
    blur = ("marginal_kl", "sample_nll", "reconstruction_nll", "sample_sharpness", "reconstruction_sharpness")
    images = [draw_images(pair, figures)] if len(data.shape) == 3 else []
    codes = [draw_codes(pair, figures)] if all(one.codes.shape[1] > 1 for one in pair.values()) else []
    noise = [Section("Without noise there is no density", _about_noise(linear[0]), _noise_table(linear[1]))]
    return [
        Section("Can it generate?", _about_generation(data), _shown(table, generation), images),
        Section("Has it a density?", _about_density(), _shown(table, density)),
        *(noise if linear[1] else []),
        Section("What is its latent space?", _about_latents(), _shown(table, latent), codes),
        Section("Blur and the mismatch of prior and codes", _about_blur(data), _shown(table, blur),
                [draw_mismatch(table.records(), figures)]),
    ]  # fmt: skip


def _shown(table: Table, columns: Sequence[str]) -> Table:
    """Some columns of the table with their errors, under the names that readers see."""
    rows = [
        {"model": row["kind"]}
        | {MEASURED[c] + tail: row[c + tail] for c in columns for tail in ("", "_stderr")}
        for row in table.records()
    ]  # fmt: skip
    return words_with_error(Table.from_records(rows), [MEASURED[c] for c in columns])


def _noise_table(linear: list[dict[str, float]]) -> Table:
    return Table.from_records(
        [
            {
                "noise": row["scale"],
                "mean log p(x), training data": row["off"],
                "of points that it can decode": row["on"],
            }
            for row in linear
        ]
    )


def _intro(results: list[dict[str, Any]], settings: AutoencoderSettings) -> list[str]:
    first = results[0]
    return [
        f"The same nets, trained for {first['train/steps']:,} steps as an autoencoder and as VAEs on {first['data']}; "
        f"likelihood {first['likelihood']}, seeds {', '.join(map(str, settings.seeds))}. An autoencoder encodes each "
        "datum as one point and pays nothing for it: the VAE whose posterior has no width and whose KL has no weight. "
        "Numbers are of held-out data, ± one standard error over seeds.",
        f"The data: {first['data_description']}",
    ]


def _about_generation(data: Data) -> list[str]:
    return [
        "The autoencoder reconstructs and does not generate: it was never told what codes to expect, and N(0, I) "
        "meets none of them. Samples, reconstructions and the like are scored under a density fitted to the training "
        f"data (a Gaussian mixture of principal components, nats; lower is better, held-out data score "
        f"{data.yardstick.nll(data.test):.1f}). A normal fitted to its codes afterwards makes it a generator of sorts "
        "(Ghosh et al. 2020). The energy distance compares draws of x, noise included, with as many held-out data; "
        "above its threshold the two are told apart.",
    ]


def _about_density() -> list[str]:
    return [
        "A VAE has one: −log p(x) by importance sampling. The autoencoder has none: its training error is "
        "−log p(x|z) at one z, with nothing integrated, so that no entry is given for it."
    ]


def _about_noise(latent_dim: int) -> list[str]:
    return [
        f"Nor would a deterministic decoder x = G(z) have a density. Probabilistic PCA with as many latents "
        f"({latent_dim}), fitted, its noise then taken away: data off its plane become impossible and points on it "
        "infinitely dense."
    ]


def _about_latents() -> list[str]:
    return [
        "A VAE’s codes fill the prior, so that between two of them lie others; an autoencoder’s lie where they like. "
        "Halfway codes: the mean of two data’s codes, decoded and scored as above."
    ]


def _about_blur(data: Data) -> list[str]:
    images = data.test.reshape(-1, *data.shape)
    return [
        "Are samples blurred because codes and prior differ? The marginal KL is that difference, KL(q(z) ‖ p(z)). It "
        "is reported beside the quality of samples and, as a control, of reconstructions, which need no prior: blur "
        "that reconstructions share is the likelihood’s and not the prior’s"
        + (f" (held-out data have sharpness {sharpness(images):.3f})." if len(data.shape) == 3 else ".")
    ]
