"""Study: codes. A VQ-VAE's tokens, priors over them, and what these are good for: files, samples, classifiers."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.codes import code_usage, fit_tokens, token_nll
from inference.compression import bits, compress, decompress, png_bits, raw_bits, token_bits
from inference.config import ConfigError, load, words_of
from inference.console import Console, Quiet
from inference.evaluate import evaluating, held_out
from inference.experiment import open_run, train
from inference.particles import decode, particles
from inference.rundir import read_summary
from inference.studies.codes_data import Coded, encode_run
from inference.studies.codes_page import Shown, sections
from inference.study import write_study
from inference.table import Table
from inference.token_statistics import adjacent_information, classification_accuracy, mean_squared_error
from models.tokens import MarkovTable, PositionTable, TokenPrior

BASE = {
    "guide": "quantized",
    "objective": "vq",
    "encoder": "local",
    "decoder": "local",
    "tokens": "pixelcnn",
    "data.binarization": "none",
    "likelihood": "logistic",
    "model.codes": "32",
    "model.grid": "[4,4]",
    "model.ema": "true",
    "model.restart_below": "0.5",
    "trainer.steps": "2000",
    "trainer.learning_rate": "0.002",
    "trainer.schedule": "cosine",
    "evaluation.surgery_data": "200",
}


@dataclass
class CodesSettings:
    """What is measured.

    Args:
        run: the directory of a trained run of model=vq; without one, the study trains one with the other options.
        priors: words of the priors over codes that are fitted to its tokens, as a second phase.
        conditional: the word of the prior that is fitted class by class, for samples with labels; none for none.
        steps: of each fit; tables are counted.
        learning_rate: of each fit, at the start.
        train_data: training images whose tokens are used; 0 for all.
        data: held-out images, for validation and test each; 0 for all.
        coded: test images that are written to a file by an entropy coder and read back.
        samples: pictures drawn class by class, to train a classifier on.
        classifier_steps: of Adam, for each classifier.
        levels: numbers of levels of VQ-VAE-2 runs; [] for none.
    """

    run: str = ""
    priors: list[str] = field(default_factory=lambda: ["table", "markov", "pixelcnn", "transformer", "masked"])
    conditional: str = "pixelcnn"
    steps: int = 1500
    learning_rate: float = 2e-3
    train_data: int = 0
    data: int = 0
    coded: int = 500
    samples: int = 2000
    classifier_steps: int = 1000
    levels: list[int] = field(default_factory=lambda: [1, 2, 3])

    def __post_init__(self) -> None:
        known = [word for word in words_of("tokens") if word != "uniform"]
        for word in (*self.priors, *({self.conditional} - {"none"})):
            if word not in known:
                raise ConfigError(
                    f"study.priors and study.conditional: {word!r} is not known; accepted: {', '.join(known)}"
                )
        if min(self.steps, self.coded, self.samples, *self.levels) < 1 or not self.priors:
            raise ConfigError("study.steps, coded, samples and levels must be at least 1, and priors name one")


def codes(arguments: list[str], settings: CodesSettings, folder: Path, console: Console, command: str) -> Path:
    """Codes and priors over them: nats, bits in a file, samples, classifiers, levels."""
    options = _options(arguments)
    with console.stage("codes") as progress:
        total = len(settings.priors) + len(settings.levels) + 3
        run = Path(settings.run) if settings.run else folder / "runs" / "one_level"
        if not settings.run:
            _train([*options, "model=vq"], run)
        seed = read_summary(run)["seed"]
        coded = encode_run(open_run(run), settings.train_data, settings.data, seed)
        torch.manual_seed(seed)
        fitted, own = _learnt_with_the_codes(coded)
        records = [_uniform(coded)]
        for done, word in enumerate(settings.priors, start=1):
            progress(done, total)
            fitted[word], record = _fit(word, coded, settings)
            records.append(record)
        records += own
        best = min(fitted, key=lambda word: next(r["nats_per_grid"] for r in records if r["prior"] == word))
        files = _files(fitted, best, coded, settings.coded)
        progress(total - 2, total)
        usage = _usage(coded)
        drawn, scores = _classifiers(coded, settings, seed)
        levels = []
        for count in settings.levels:
            levels.append(_level(options, count, folder / "runs" / f"{count}_levels"))
        progress(total, total)
    shown = Shown(coded, fitted[best], best, drawn, records, files, usage, scores, levels)
    parts = {"prior": records, "file": files, "usage": usage, "classifier": scores, "levels": levels}
    table = Table.from_records([{"part": part, **row} for part, rows in parts.items() for row in rows])
    return write_study(folder, "Codes", _intro(coded), sections(shown, folder), table, command)


def _options(arguments: list[str]) -> list[str]:
    given = {argument.partition("=")[0] for argument in arguments}
    if given & {"model", "guide"}:
        raise ConfigError("the study of codes chooses model and guide itself: accepted: model.* options, tokens, ...")
    return [*(f"{key}={value}" for key, value in BASE.items() if key not in given), *arguments]


def _train(options: list[str], run: Path) -> None:
    if not (run / "summary.json").exists():
        train(load([*options, f"run.dir='{run}'"]), Quiet())


def _uniform(coded: Coded) -> dict[str, Any]:
    nats = coded.places * math.log(coded.codes)
    return _prior_record("uniform", coded, torch.full((2,), nats), None)


def _learnt_with_the_codes(coded: Coded) -> tuple[dict[str, TokenPrior], list[dict[str, Any]]]:
    """The prior that the run itself has learnt, if it has."""
    prior, word = coded.prior.tokens, coded.setup.config.words["tokens"]
    if not isinstance(prior, TokenPrior):
        return {}, []
    name = f"{word}, learnt with the codes"
    nll = token_nll(prior, coded.tokens["test"], chunk=256)
    return {name: prior}, [_prior_record(name, coded, nll, None)]


def _prior_record(word: str, coded: Coded, nll: Tensor, seconds: float | None) -> dict[str, Any]:
    nats = float(nll.double().mean())
    return {
        "prior": word,
        "nats_per_token": nats / coded.places,
        "nats_per_grid": nats,
        "nats_per_grid_stderr": float(nll.double().std() / math.sqrt(len(nll))),
        "bits_per_image": nats / math.log(2),
        "seconds": seconds,
    }


def build_prior(word: str, coded: Coded, classes: int = 0) -> TokenPrior:
    """A prior over a run's grids by its word, class by class if there are any."""
    factory = load([f"tokens={word}"]).factory("tokens")
    prior = factory(event_shape=coded.grid, codes=coded.codes, context_codes=classes)
    return prior.to(coded.setup.device)


def _fit(word: str, coded: Coded, settings: CodesSettings, classes: int = 0) -> tuple[TokenPrior, dict[str, Any]]:
    """The second phase: a prior fitted to the training tokens, scored on the test tokens."""
    prior = build_prior(word, coded, classes)
    start = time.monotonic()
    labels = {split: coded.labels[split] if classes else None for split in coded.tokens}
    if isinstance(prior, PositionTable | MarkovTable):
        prior.fit(coded.tokens["train"], labels["train"], smoothing=0.1)
    else:
        few = slice(0, 300)
        context = labels["valid"]
        valid = coded.tokens["valid"][few], None if context is None else context[few]
        fit_tokens(
            prior,
            coded.tokens["train"],
            labels["train"],
            settings.steps,
            learning_rate=settings.learning_rate,
            valid=valid,
        )
    seconds = time.monotonic() - start
    nll = token_nll(prior, coded.tokens["test"], labels["test"], chunk=256)
    return prior, _prior_record(word, coded, nll, seconds)


def _files(fitted: dict[str, TokenPrior], best: str, coded: Coded, count: int) -> list[dict[str, Any]]:
    """Test images as files: pixels, PNG, tokens under each of two priors and the residual that makes them lossless."""
    tokens, images = coded.tokens["test"][:count], coded.images["test"][:count]
    raw = raw_bits(coded.setup.dataset.shape, coded.levels)
    squared = mean_squared_error([coded.pictures(tokens)], [images], coded.top)
    rows: list[dict[str, Any]] = [{"file": "pixels", "bits_per_image": raw, "mse": 0.0}]
    if coded.setup.representation != "real" and coded.setup.dataset.shape[0] in (1, 3):
        rows.append({"file": "PNG", "bits_per_image": png_bits(images.cpu().numpy(), coded.levels).mean(), "mse": 0.0})
    rows.append({"file": "tokens, uniform", "bits_per_image": token_bits(coded.places, coded.codes), "mse": squared})
    for word in dict.fromkeys((*(w for w in ("markov",) if w in fitted), best)):
        message = compress(fitted[word], tokens)
        back = decompress(fitted[word], message, len(tokens))
        ideal = float(token_nll(fitted[word], tokens).double().sum()) / math.log(2)
        rows.append(
            {
                "file": f"tokens, {word}",
                "bits_per_image": bits(message) / len(tokens),
                "nll_bits_per_image": ideal / len(tokens),
                "excess": bits(message) / ideal - 1,
                "decoded": bool(torch.equal(back, tokens)),
                "mse": squared,
            }
        )
    if coded.setup.representation != "real":
        residual = -float(coded.log_likelihood(tokens, images).double().mean()) / math.log(2)
        total = rows[-1]["bits_per_image"] + residual
        rows.append({"file": f"tokens, {best}, and residual", "bits_per_image": total, "mse": 0.0})
    return [{**row, "images": len(tokens), "ratio": raw / row["bits_per_image"]} for row in rows]


def _usage(coded: Coded) -> list[dict[str, Any]]:
    rows = []
    for split, tokens in coded.tokens.items():
        usage = code_usage(tokens, coded.codes)
        row = {"split": split, "perplexity": usage.perplexity, "used": usage.used}
        if min(tokens.shape[1:]) > 1:
            found = adjacent_information(tokens, coded.codes, torch.Generator().manual_seed(0))
            row |= {"adjacent_nats": found.value, "adjacent_low": found.low, "adjacent_high": found.high}
        error = mean_squared_error([coded.pictures(tokens)], [coded.images[split]], coded.top)
        rows.append({**row, "mse": error})
    return rows


def _classifiers(coded: Coded, settings: CodesSettings, seed: int) -> tuple[Tensor | None, list[dict[str, Any]]]:
    """Pictures drawn class by class, and how well classifiers trained on each kind of picture do on real ones."""
    if len(coded.labels) < 3 or settings.conditional == "none":
        return None, []
    classes = int(coded.labels["train"].max()) + 1
    prior, record = _fit(settings.conditional, coded, settings, classes)
    labels = torch.arange(settings.samples, device=coded.setup.device) % classes
    with torch.no_grad():
        tokens = torch.cat([prior(some).sample() for some in labels.split(500)])
    samples = coded.pictures(tokens)
    chosen = torch.randperm(len(coded.labels["train"]))[: settings.samples]
    real, real_labels = coded.images["train"][chosen], coded.labels["train"][chosen]
    kinds = {
        "real": (real, real_labels),
        "reconstructed": (coded.pictures(coded.tokens["train"][chosen]), real_labels),
        f"sampled, {settings.conditional} given the class": (samples, labels),
    }
    test = coded.images["test"] / coded.top, coded.labels["test"]
    rows = [
        {
            "classifier": kind,
            "pictures": len(images),
            "accuracy": classification_accuracy((images / coded.top, given), test, seed, settings.classifier_steps),
        }
        for kind, (images, given) in kinds.items()
    ]
    rows[-1]["nats_per_grid"] = record["nats_per_grid"]
    share = float(torch.bincount(coded.labels["test"]).max()) / len(coded.labels["test"])
    return samples, [*rows, {"classifier": "always the commonest class", "accuracy": share}]


def _level(options: list[str], count: int, run: Path) -> dict[str, Any]:
    """Rate by level and distortion of a run with so many levels."""
    kept = [o for o in options if not o.startswith(("guide=", "model="))]
    _train([*kept, "model=vq_levels", f"model.levels={count}", "guide=quantized_levels"], run)
    setup = open_run(run)
    row: dict[str, Any] = {"levels": count}
    for split in ("train", "test"):
        x, _ = held_out(setup.source(split), 1000, 0)
        top = (setup.dataset.observed_levels or 2) - 1.0 if setup.representation == "levels" else 1.0
        with evaluating(setup.model, setup.guide, seed=0):
            draws = [particles(setup.model, setup.guide, some) for some in x.split(250)]
            means = [
                decode(setup.model, {name: z.value for name, z in d.latents.items()}, some).mean
                for d, some in zip(draws, x.split(250), strict=True)
            ]
            rates = [d.site_kls() for d in draws]
        row[f"{split}_mse"] = mean_squared_error([m.reshape(-1, *x.shape[1:]) for m in means], x.split(250), top)
        for name in rates[0]:
            row[f"{split}_nats_{name}"] = float(torch.cat([r[name].reshape(-1) for r in rates]).double().mean())
    return row


def _intro(coded: Coded) -> list[str]:
    height, width = coded.grid
    raw = raw_bits(coded.setup.dataset.shape, coded.levels)
    return [
        f"Each image becomes {height} × {width} tokens of {coded.codes} codes, "
        f"{token_bits(coded.places, coded.codes):.0f} bits in place of {raw:,}, and is reconstructed from them. A "
        "prior fitted to the tokens afterwards says which grids are likely: the better it knows them, the shorter the "
        "file and the better the samples.",
        f"The data: {coded.setup.dataset.description}",
    ]
