"""A run from configuration to report, and what can be done with its directory afterwards."""

import fcntl
import json
import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from inference import checkpoint
from inference.assemble import Setup, assemble, start_from_data
from inference.checkpoint import CheckpointError, write_atomically
from inference.config import Config, ConfigError, load, read_recipe
from inference.console import Console
from inference.data import Batches
from inference.engine import SVI, SharedOptimizer
from inference.evaluate import evaluate, evaluating, held_out, validation_scores
from inference.export import import_arviz, write_posterior
from inference.particles import generate
from inference.trainer import Trainer, load_programs, read_rows

VALIDATION_DATA = 1000  # validation data scored along the training


def train(config: Config, console: Console) -> Path:
    """Train, evaluate and report; returns the run's directory.

    Raises:
        ConfigError: an option is bad, or ``run.dir`` holds a run already.
    """
    _set_threads(config)
    setup = assemble(config)
    folder = _new_folder(setup.config)
    with _locked(folder):
        recipe = setup.config.tree()
        recipe["run"]["dir"] = str(folder)
        write_atomically(folder / "config.yaml", yaml.safe_dump(recipe, sort_keys=False))
        start_from_data(setup)
        _fit_and_finish(setup, folder, console)
    return folder


def resume(folder: Path, console: Console) -> Path:
    """Continue a run from its last checkpoint to its end, as if it had not stopped."""
    setup = _reopen(folder)
    with _locked(folder):
        _fit_and_finish(setup, folder, console, from_checkpoint=True)
    return folder


def reevaluate(folder: Path, arguments: list[str], console: Console) -> dict[str, Any]:
    """Score a run again, with other ``evaluation.*`` options if asked; returns and rewrites its summary."""
    if other := [a for a in arguments if not a.startswith(("evaluation.", "device=", "threads="))]:
        raise ConfigError(f"{other[0]}: evaluate takes evaluation.*, device and threads; the run is what it is")
    setup, trainer = _trained(folder, arguments)
    with _locked(folder):
        return _finish(setup, folder, trainer, console)


def report(folder: Path, console: Console) -> Path:
    """Draw a run's pictures and page again from its checkpoint and summary."""
    path = folder / "summary.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no summary.json: the run is not finished. Try: python run.py resume {folder}"
        )
    setup, _ = _trained(folder, [])
    with _locked(folder):
        return _write_report(setup, folder, json.loads(path.read_text()))


def sample(folder: Path, count: int, arguments: list[str]) -> Path:
    """Draw from a trained model; writes ``samples.npz`` (means of p(x|z), draws of x, latents) and returns its path."""
    import io

    import numpy as np

    if count < 1:
        raise ConfigError(f"the number of samples must be at least 1, got {count}")
    setup, _ = _trained(folder, arguments)
    with evaluating(setup.model, seed=setup.config.values.seed):
        like = torch.zeros(count, *setup.dataset.shape, device=setup.device)
        latents, p_x, x = generate(setup.model, like)
    buffer = io.BytesIO()
    arrays = {"mean": p_x.mean, "x": x, **{f"latent_{name}": z for name, z in latents.items()}}
    np.savez_compressed(buffer, **{name: tensor.cpu().numpy() for name, tensor in arrays.items()})  # type: ignore[arg-type]
    write_atomically(folder / "samples.npz", buffer.getvalue())
    return folder / "samples.npz"


def _fit_and_finish(setup: Setup, folder: Path, console: Console, from_checkpoint: bool = False) -> None:
    trainer = _trainer(setup, folder, console)
    if from_checkpoint and checkpoint.exists(folder / "checkpoint"):
        trainer.restore()
    elif from_checkpoint:  # stopped between its configuration and its first checkpoint
        start_from_data(setup)
    with console.training(setup.config.words, trainer):
        trainer.fit()
    _finish(setup, folder, trainer, console)


def _trainer(setup: Setup, folder: Path, console: Console | None) -> Trainer:
    settings = setup.config.section("trainer")
    seed = setup.config.values.seed
    programs = torch.nn.ModuleList([setup.model, setup.guide])  # a shared parameter counts once
    optimizer = SharedOptimizer(
        programs.parameters(),
        setup.config.factory("optimizer"),
        settings.learning_rate,
        settings.gradient_clip or None,
    )
    batches = Batches(setup.source("train"), setup.config.section("batching").batch_size, seed)
    valid, _ = held_out(setup.source("valid"), VALIDATION_DATA, seed)
    return Trainer(
        SVI(setup.model, setup.guide, optimizer, setup.objective),
        batches,
        settings,
        folder,
        lambda: validation_scores(setup.model, setup.guide, valid, seed),
        (console,) if console else (),
    )


def _finish(setup: Setup, folder: Path, trainer: Trainer, console: Console) -> dict[str, Any]:
    """Everything after the last step: numbers, posterior draws, pictures, page."""
    config, dataset = setup.config, setup.dataset
    settings, seed = config.section("evaluation"), config.values.seed
    x, _ = held_out(setup.source("test"), settings.data, seed)
    dequantized = dataset.kind == "grey" and setup.representation == "real"
    log_levels = math.log(dataset.levels) if dequantized and dataset.levels else 0.0
    with console.stage("scoring held-out data") as progress:
        numbers, _ = evaluate(setup.model, setup.guide, x, settings, seed, log_levels, progress)
    summary = {**numbers, **_about_training(trainer), **_about_setup(setup)}
    write_atomically(folder / "summary.json", json.dumps(_jsonable(summary), indent=1) + "\n")
    with console.stage("posterior draws and report"):
        with evaluating(setup.model, setup.guide, seed=seed):
            write_posterior(
                folder / "posterior.nc", setup.model, setup.guide, x[: settings.posterior_data], settings.draws
            )
        _write_report(setup, folder, summary)
    console.finished(folder, summary)
    return summary


def _write_report(setup: Setup, folder: Path, summary: dict[str, Any]) -> Path:
    from inference.figures import draw
    from inference.pictures import gallery
    from inference.report import write_report

    pictures = draw(gallery(setup), read_rows(folder / "metrics.jsonl"), folder / "figures", active_threshold=None)
    config_yaml = (folder / "config.yaml").read_text()
    return write_report(folder, summary, config_yaml, setup.dataset.description, pictures)


def _about_training(trainer: Trainer) -> dict[str, Any]:
    return {
        "train/steps": trainer.step,
        "train/epochs": round(trainer.step / len(trainer.batches), 4),
        "train/seconds": round(trainer.seconds, 3),
        "train/steps_per_second": round(trainer.step / trainer.seconds, 3) if trainer.seconds else None,
        "train/parameters": sum(parameter.numel() for parameter in trainer.svi.optim.parameters),
    }


def _about_setup(setup: Setup) -> dict[str, Any]:
    import pyro

    device = torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else "cpu"
    return {
        "device": device,
        "seed": setup.config.values.seed,
        **setup.config.words,
        "binarization": setup.dataset.binarization,
        "data_description": setup.dataset.description,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "arviz": import_arviz().__version__,
        },
    }


def _reopen(folder: Path, arguments: list[str] | None = None) -> Setup:
    path = folder / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a run: it has no config.yaml")
    recipe = read_recipe(str(path))
    recipe.setdefault("run", {})["dir"] = str(folder)
    config = load(arguments or [], recipe)
    _set_threads(config)
    return assemble(config)


def _trained(folder: Path, arguments: list[str]) -> tuple[Setup, Trainer]:
    """A run's parts with the parameters of its checkpoint."""
    setup = _reopen(folder, arguments)
    trainer = _trainer(setup, folder, None)
    tensors, state = checkpoint.load(folder / "checkpoint")
    load_programs(tensors, trainer.programs)
    trainer.step, trainer.seconds = state["step"], state["seconds"]
    return setup, trainer


def _new_folder(config: Config) -> Path:
    asked = config.values.run.dir
    words = f"{config.words['data']}-{config.words['guide']}-{config.words['objective']}".replace(".", "-")
    folder = Path(asked) if asked else Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{words}"
    while not asked and folder.exists():
        folder = folder.with_name(folder.name + "+")
    if (folder / "config.yaml").exists():
        raise ConfigError(f"run.dir={folder} holds a run already; continue it with resume, or choose another directory")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".lock", "")
    except OSError as error:
        raise ConfigError(f"run.dir={folder} cannot be written: {error.strerror}") from None
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second process out of a run's directory."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{folder} is in use by another process") from None
        yield


def _set_threads(config: Config) -> None:
    if config.values.threads > 0:
        torch.set_num_threads(config.values.threads)


def _jsonable(summary: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN: what could not be computed is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}
