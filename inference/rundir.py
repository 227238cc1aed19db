"""A run's directory: chosen, made, locked, recognized."""

import fcntl
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from inference.checkpoint import CheckpointError
from inference.config import Config, ConfigError
from inference.signals import Interrupted, how_to_resume


def choose_folder(config: Config) -> Path:
    """``run.dir``, or a new name under ``runs/``; nothing is made yet."""
    asked = config.values.run.dir
    groups = ("guide", "objective") if config.words["inference"] == "svi" else ("model", "inference")
    words = "-".join(config.words[group] for group in ("data", *groups)).replace(".", "-")
    if not asked:
        return Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{words}"
    refuse_used(Path(asked))
    return Path(asked)


def refuse_used(folder: Path) -> None:
    """Refuse a directory that holds files of a run."""
    for name in ("config.yaml", "checkpoint", "metrics.jsonl", "summary.json"):
        try:
            used = (folder / name).exists()
        except OSError as error:
            raise ConfigError(f"run.dir={folder} cannot be used: {error.strerror}; accepted: a new directory") from None
        if used:
            raise ConfigError(
                f"run.dir={folder} holds a run already: there is a {name}; continue it with resume, or choose another "
                "directory"
            )


def make_folder(folder: Path, asked: bool) -> Path:
    """Make the directory, under another name if it was not asked for and is somebody else's by now."""
    try:
        while not asked and _is_made(folder):
            folder = folder.with_name(folder.name + "+")
        folder.mkdir(parents=True, exist_ok=True)
        open(folder / ".lock", "a").close()
        return folder
    except OSError as error:
        raise ConfigError(f"run.dir={folder} cannot be written: {error.strerror}; accepted: a new directory") from None


def _is_made(folder: Path) -> bool:
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        return True
    return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second process out of a run's directory.

    The lock is the process's own: workers that read data ahead do not inherit it, and one that outlives a run for a
    moment does not hold up its resumption.
    """
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(f"{folder} is in use by another process") from None
        yield


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Says with the news of a signal how to go on."""
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(stop.signum, f"{stop.what}. {how_to_resume(folder)}") from None


def expect_run(folder: Path) -> None:
    """Refuse a directory that is no run."""
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is not a run: it has no config.yaml")


def read_summary(folder: Path) -> dict[str, Any]:
    """What ``summary.json`` says."""
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text())
        if isinstance(summary, dict):
            return summary
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no summary.json: the run is not finished. {how_to_resume(folder)}"
        ) from None
    except ValueError:
        pass
    raise CheckpointError(f"{path} is damaged. Try: python run.py evaluate {shlex.quote(str(folder))}")
