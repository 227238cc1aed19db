"""A run from configuration to report, and what can be done with its directory afterwards."""

import contextlib
import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from inference import checkpoint
from inference.assemble import Setup, assemble, start_from_data
from inference.checkpoint import CheckpointError, write_atomically
from inference.config import Config, ConfigError, load, read_recipe
from inference.console import Console
from inference.em_trainer import EMTrainer
from inference.evaluate import evaluate, evaluating, evidence_table, held_out, repeated, training_bound
from inference.export import import_arviz, write_posterior
from inference.log import read_rows
from inference.parameters import in_modules
from inference.particles import generate
from inference.rundir import choose_folder, expect_run, locked, make_folder, read_summary, refuse_used, resumable
from inference.signals import Pending, deferred
from inference.trainer import Trainer


@in_modules()
def train(config: Config, console: Console) -> Path:
    """Train, evaluate and report; returns the run's directory.

    Nothing is written before everything that can be checked without a step has been.

    Raises:
        ConfigError: an option is bad, or ``run.dir`` holds a run already.
    """
    run = begin(config, console)
    with locked(run.folder), resumable(run.folder):
        record(run)
        _fit_and_finish(*run, console)
    return run.folder


class Run(NamedTuple):
    """A run that can take steps."""

    setup: Setup
    folder: Path
    trainer: Trainer | EMTrainer


def begin(config: Config, console: Console) -> Run:
    """Everything that comes before the first file; the folder is there afterwards, and empty."""
    folder = choose_folder(config)
    set_threads(config)
    setup = assemble(config)
    start_from_data(setup)
    trainer = _trainer(setup, folder, console)
    trainer.check()
    trainer.folder = folder = make_folder(folder, asked=bool(config.values.run.dir))
    return Run(setup, folder, trainer)


@in_modules()
def rehearse(config: Config) -> None:
    """All of :func:`begin` but its folder: whatever can be found wrong without a step is found.

    Raises:
        ConfigError: an option is bad, or the parts do not fit.
        StructureError: the same, found when the first batch is scored.
        DataError: the data do not do.
    """
    set_threads(config)
    setup = assemble(config)
    start_from_data(setup)
    _trainer(setup, Path(), None).check()


def record(run: Run) -> None:
    """Write the configuration, inside the folder's lock."""
    refuse_used(run.folder)  # once more, now that nobody else can start one
    recipe = run.setup.config.tree()
    recipe["run"]["dir"] = str(run.folder)
    if recipe["run"].get("start"):
        recipe["run"]["start"] = str(Path(recipe["run"]["start"]).resolve())
    for name in ("root", "path"):  # resume and report may be asked for from another directory
        if recipe["data"].get(name):
            recipe["data"][name] = str(Path(recipe["data"][name]).resolve())
    write_atomically(run.folder / "config.yaml", yaml.safe_dump(recipe, sort_keys=False))


@in_modules()
def resume(folder: Path, console: Console) -> Path:
    """Continue a run from its last checkpoint to its end, as if it had not stopped."""
    setup = reopen(folder)
    with locked(folder):
        run = take_up(setup, folder, console)
        if is_finished(run):
            console.say(f"finished  nothing is left to do in {folder}; its report is {folder / 'report.html'}")
        else:
            _fit_and_finish(*run, console)
    return folder


def take_up(setup: Setup, folder: Path, console: Console) -> Run:
    """A run as its last checkpoint left it, inside the folder's lock."""
    trainer = _trainer(setup, folder, console)
    if checkpoint.exists(folder / "checkpoint"):
        trainer.restore()
    elif read_rows(folder / "metrics.jsonl"):
        raise CheckpointError(f"{folder / 'checkpoint'} is gone, although the run was under way; train again")
    else:  # stopped between its configuration and its first checkpoint
        start_from_data(setup)
    return Run(setup, folder, trainer)


@in_modules()
def reevaluate(folder: Path, arguments: list[str], console: Console) -> dict[str, Any]:
    """Score a run again, with other ``evaluation.*`` options if asked; returns and rewrites its summary."""
    _allow("evaluate", arguments, "evaluation.", "device=", "threads=")
    setup, trainer = _trained(folder, arguments)
    with locked(folder):
        return finish(setup, folder, trainer, console)


@in_modules()
def report(folder: Path, console: Console) -> Path:
    """Draw a run's pictures and page again from its checkpoint and summary."""
    expect_run(folder)
    summary = read_summary(folder)
    setup, _ = _trained(folder, [])
    with locked(folder), deferred():
        return _write_report(setup, folder, summary)


@in_modules()
def open_run(folder: Path) -> Setup:
    """A trained run's data, model and guide, with the parameters of its checkpoint."""
    return _trained(folder, [])[0]


@in_modules()
def sample(folder: Path, count: int, arguments: list[str]) -> Path:
    """Draw from a trained model; writes ``samples.npz`` and returns its path; of images, ``samples.png`` beside it.

    It holds draws of x, the means of p(x|z) where it knows them, the latents, and where these are codes, their numbers.
    """
    import io

    import numpy as np

    from inference.codes import codes_of
    from inference.pictures import print_samples, shown_of

    if count < 1:
        raise ConfigError(f"the number of samples must be at least 1, got {count}")
    _allow("sample", arguments, "seed=", "device=", "threads=")
    setup, _ = _trained(folder, arguments)
    with evaluating(setup.model, seed=setup.config.values.seed):
        like = repeated(held_out(setup.source("test"), count, setup.config.values.seed)[0], count)
        latents, p_x, x = generate(setup.model, like)
        if len(setup.dataset.shape) == 3:
            print_samples(setup, shown_of(p_x, x), like, folder / "samples.png")
        codes = codes_of(setup.model, latents)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"x": x, **{f"latent_{name}": z for name, z in latents.items()}}
    arrays |= {f"codes_{name}": numbers for name, numbers in codes.items()}
    with contextlib.suppress(NotImplementedError):  # of what is drawn entry by entry
        arrays["mean"] = p_x.mean
    np.savez_compressed(buffer, **{name: tensor.cpu().numpy() for name, tensor in arrays.items()})
    write_atomically(folder / "samples.npz", buffer.getvalue())
    return folder / "samples.npz"


def _fit_and_finish(setup: Setup, folder: Path, trainer: Trainer | EMTrainer, console: Console) -> None:
    with console.training(setup.config.words, trainer):
        trainer.fit()
    if note := trainer.note():
        console.say(note)
    finish(setup, folder, trainer, console)


def is_finished(run: Run) -> bool:
    """Whether summary, draws and page are there, in the order in which a run writes them, of its last step."""
    files = [run.folder / name for name in ("summary.json", "posterior.nc", "report.html")]
    if not run.trainer.finished or not all(file.is_file() for file in files):
        return False
    times = [file.stat().st_mtime_ns for file in files]
    try:
        return times == sorted(times) and read_summary(run.folder)["train/steps"] == run.trainer.step
    except (CheckpointError, KeyError):
        return False


def _trainer(setup: Setup, folder: Path, console: Console | None) -> Trainer | EMTrainer:
    return setup.build(
        "inference",
        (Trainer, EMTrainer),
        setup=setup,
        folder=folder,
        observers=(console,) if console else (),
        guide=setup.guide,
        objective=setup.objective,
        optimizer=lambda parameters, lr: setup.build("optimizer", torch.optim.Optimizer, parameters=parameters, lr=lr),
    )


def finish(setup: Setup, folder: Path, trainer: Trainer | EMTrainer, console: Console) -> dict[str, Any]:
    """Everything after the last step: numbers, posterior draws, pictures, page."""
    config, dataset = setup.config, setup.dataset
    settings, seed = config.section("evaluation"), config.values.seed
    x, index = held_out(setup.source("test"), settings.data, seed)
    dequantized = dataset.kind == "grey" and setup.representation == "real"
    log_levels = math.log(dataset.levels) if dequantized and dataset.levels else 0.0
    with deferred() as pending:
        with console.stage("scoring held-out data") as progress:
            watch = _interruptible(progress, pending)
            numbers, evidence = evaluate(setup.model, setup.guide, x, settings, seed, log_levels, watch)
            seen, _ = held_out(setup.source("train"), len(x), seed)
            numbers["train/elbo"] = training_bound(setup.model, setup.guide, seen, settings, seed)
        summary = {**numbers, **trainer.summary(), **_about_setup(setup)}
        write_atomically(folder / "evidence.csv", evidence_table(index, evidence).to_csv())
        write_atomically(folder / "summary.json", json.dumps(_jsonable(summary), indent=1) + "\n")
        pending.deliver()
        with console.stage("posterior draws and report"):
            with evaluating(setup.model, setup.guide, seed=seed):
                posterior_x = x[: settings.posterior_data]
                write_posterior(folder / "posterior.nc", setup.model, setup.guide, posterior_x, settings.draws)
            _write_report(setup, folder, summary)
    console.finished(folder, summary)
    pending.deliver(" after the run's last file was written")  # a grid has other runs to stop
    return summary


def _interruptible(progress: Callable[[int, int], None], pending: Pending) -> Callable[[int, int], None]:
    def on_progress(done: int, total: int) -> None:
        pending.deliver()
        progress(done, total)

    return on_progress


def _write_report(setup: Setup, folder: Path, summary: dict[str, Any]) -> Path:
    from inference.figures import draw
    from inference.pictures import gallery
    from inference.report import write_report

    pictures = draw(gallery(setup), read_rows(folder / "metrics.jsonl"), folder / "figures", active_threshold=None)
    config_yaml = (folder / "config.yaml").read_text()
    return write_report(folder, summary, config_yaml, setup.dataset.description, pictures)


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


def _allow(verb: str, arguments: list[str], *starts: str) -> None:
    if other := [argument for argument in arguments if not argument.startswith(starts)]:
        accepted = ", ".join(start.rstrip("=") + ("*" if start.endswith(".") else "") for start in starts)
        raise ConfigError(f"{other[0]}: {verb} takes {accepted}; the rest of the run is what it is")


def reopen(folder: Path, arguments: list[str] | None = None) -> Setup:
    """The parts of a run as they were built."""
    expect_run(folder)
    recipe = read_recipe(str(folder / "config.yaml"))
    run = recipe.setdefault("run", {})
    if isinstance(run, dict):
        run["dir"] = str(folder)
    config = load(arguments or [], recipe)
    set_threads(config)
    return assemble(config)


def _trained(folder: Path, arguments: list[str]) -> tuple[Setup, Trainer | EMTrainer]:
    """A run's parts with the parameters of its checkpoint."""
    setup = reopen(folder, arguments)
    trainer = _trainer(setup, folder, None)
    tensors, state = checkpoint.load(folder / "checkpoint")
    trainer.recall(tensors, state)
    return setup, trainer


def set_threads(config: Config) -> None:
    if config.values.threads > 0:
        torch.set_num_threads(min(config.values.threads, os.cpu_count() or 1))


def _jsonable(summary: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN: what could not be computed is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}
