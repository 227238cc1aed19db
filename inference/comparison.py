"""Finished runs as rows of a table: what differs between them, and what that is worth on the same held-out data."""

import csv
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.catalog import DEFAULTS
from inference.checkpoint import CheckpointError
from inference.config import ConfigError, chosen, read_recipe
from inference.experiment import reopen
from inference.rundir import expect_run, read_summary
from inference.table import Table, mean_and_stderr

MEASURED = (
    "test/elbo",
    "test/nll",
    "test/kl",
    "test/mutual_information",
    "test/marginal_kl",
    "test/active_units",
    "test/nll_per_token",
    "test/perplexity",
)
# What may differ without a difference to these numbers, beyond rounding.
INDIFFERENT = {
    "run": ("dir",),
    "data": ("root", "resident", "workers"),
    "trainer": ("log_every", "validations", "surgery_data", "gap_particles", "checkpoint_seconds", "engine",
                "steps_per_call"),
    "evaluation": ("khat_data", "draws", "posterior_data", "engine"),
}  # fmt: skip
UNASKED = {"device", "threads", *(f"{group}.{name}" for group, names in INDIFFERENT.items() for name in names)}


@dataclass(frozen=True)
class Finished:
    """A run that was trained and scored."""

    folder: Path
    words: dict[str, Any]  # what it was asked for, without its seed
    seed: int
    summary: dict[str, Any]
    rows: np.ndarray  # (N,) places of the held-out data in their split, ascending
    log_p: np.ndarray  # (N,) nats, in the order of the rows


@dataclass(frozen=True)
class _Start:
    """Where a run started from: the same place as any run that was asked for the same, with whatever seed."""

    folder: str
    asked: str

    def __repr__(self) -> str:
        return self.asked

    def __str__(self) -> str:
        return self.folder


@dataclass(frozen=True)
class Kind:
    """Runs that differ in seed alone."""

    words: dict[str, Any]  # those that not all kinds share
    runs: tuple[Finished, ...]

    @property
    def name(self) -> str:
        """Its words, without the groups that an option belongs to."""
        return ", ".join(_readable(*word) for word in self.words.items()).replace("_", " ") or "as by default"


# --- reading -----------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> Finished:
    """What a finished run's files say.

    Raises:
        ConfigError: it is no run.
        CheckpointError: it is not finished, or a file is damaged.
    """
    expect_run(folder)
    summary = read_summary(folder)
    if summary.get("test/nll", 0.0) is None:
        raise ConfigError(f"{folder} has no log p(x) to be compared: its guide is one point for each datum")
    words, seed = _asked(folder)
    path = folder / "evidence.csv"
    try:
        with path.open(newline="") as file:
            scores = sorted((int(line["row"]), float(line["log_p"])) for line in csv.DictReader(file))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Try: python run.py evaluate {shlex.quote(str(folder))}") from None
    except (ValueError, TypeError, KeyError):
        scores = []
    if not scores:
        raise CheckpointError(f"{path} is damaged. Try: python run.py evaluate {shlex.quote(str(folder))}")
    rows, log_p = (np.array(values) for values in zip(*scores, strict=True))
    return Finished(folder, words, seed, summary, rows, log_p)


def _asked(folder: Path) -> tuple[dict[str, Any], int]:
    """What a run was asked for that may make a difference, without its seed, and the seed."""
    asked = {**DEFAULTS, **chosen(read_recipe(str(folder / "config.yaml")))}  # a group that is not there is as usual
    words = {key: value for key, value in asked.items() if key not in UNASKED}
    seed = int(words.pop("seed", 0))
    if start := words.get("run.start"):
        words["run.start"] = _started_from(Path(start))
    return words, seed


def _started_from(folder: Path) -> _Start:
    """The run in a folder, as a start; where its recipe is gone, its folder says all there is to say."""
    try:
        words, _ = _asked(folder)
    except ConfigError:
        return _Start(str(folder), str(folder))
    return _Start(str(folder), repr(sorted(item for item in words.items() if not item[0].startswith("evaluation."))))


def in_kinds(runs: Sequence[Finished]) -> list[Kind]:
    """Runs that differ in seed alone together, in the order of the first of each."""
    together: dict[str, list[Finished]] = {}
    for run in runs:
        members = together.setdefault(repr(sorted(run.words.items())), [])
        if twin := [other for other in members if other.seed == run.seed]:
            raise ConfigError(f"{twin[0].folder} and {run.folder} have the same options and seed; give one of them")
        members.append(run)
    groups = [sorted(members, key=lambda run: run.seed) for members in together.values()]
    if len(groups) == 1:
        raise ConfigError("these runs differ in seed alone; accepted: runs that differ in something else as well")
    keys = dict.fromkeys(key for members in groups for key in members[0].words)
    absent = object()
    varied = [key for key in keys if len({repr(members[0].words.get(key, absent)) for members in groups}) > 1]
    return [
        Kind({key: members[0].words[key] for key in varied if key in members[0].words}, tuple(members))
        for members in groups
    ]


def expect_the_same_data(kinds: Sequence[Kind]) -> None:
    """Refuse runs whose partners were scored on other data, or on others' noise or units.

    Raises:
        ConfigError: there is no partner with the same seed, or it was scored on something else.
    """
    known: dict[Path, Tensor] = {}

    def scored(run: Finished) -> Tensor:
        if run.folder not in known:
            known[run.folder] = reopen(run.folder, ["device=cpu"]).source("test").fixed(torch.from_numpy(run.rows))
        return known[run.folder]

    for kind in kinds[1:]:
        for run, other in pairs(kind, kinds[0]):
            what = f"{run.folder} and {other.folder} were not scored on the same held-out data"
            if not np.array_equal(run.rows, other.rows):
                raise ConfigError(
                    f"{what}: {len(run.rows)} and {len(other.rows)} rows, not all the same; score them again with the "
                    "same evaluation.data"
                )
            if scored(run).shape != scored(other).shape or not bool((scored(run) == scored(other)).all()):
                raise ConfigError(
                    f"{what}: the observations differ; accepted: the same data set and binarization, and likelihoods "
                    "that score the same numbers"
                )


def pairs(kind: Kind, first: Kind) -> list[tuple[Finished, Finished]]:
    """Each run with the first kind's run of the same seed."""
    partner = {run.seed: run for run in first.runs}
    if lonely := [run for run in kind.runs if run.seed not in partner]:
        raise ConfigError(
            f"{lonely[0].folder} has seed {lonely[0].seed}, and none of {', '.join(str(r.folder) for r in first.runs)} "
            "has; accepted: for each seed a run like the first"
        )
    return [(run, partner[run.seed]) for run in kind.runs]


# --- numbers -----------------------------------------------------------------------------------------------------


def table_of(kinds: Sequence[Kind]) -> Table:
    """One row for each kind, without columns that no row has anything in.

    Means over seeds, with ``_stderr_over_data`` and, where there are several, ``_stderr_over_seeds``; ``log_p_gain`` is
    log p(x) less that of the first kind, in nats for each datum.
    """
    records = [_row(kind, kinds[0]) for kind in kinds]
    words = dict.fromkeys(key for kind in kinds for key in kind.words)
    keys = dict.fromkeys(["kind", *words, *(key for record in records for key in record)])
    kept = [key for key in keys if any(record.get(key) is not None for record in records)]
    return Table.from_records([{key: record.get(key) for key in kept} for record in records])


def _row(kind: Kind, first: Kind) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": kind.name, **{key: _shown(value) for key, value in kind.words.items()}}
    row |= {"runs": " ".join(str(run.folder) for run in kind.runs), "seeds": " ".join(str(r.seed) for r in kind.runs)}
    for key in MEASURED:
        values = [run.summary[key] for run in kind.runs if run.summary.get(key) is not None]
        row[key], row[f"{key}_stderr_over_seeds"] = mean_and_stderr(values)
        if key == "test/nll":
            row[f"{key}_stderr_over_data"] = mean_over_data(
                [run.rows for run in kind.runs], [-run.log_p for run in kind.runs]
            )[1]
    row["test/nll_particles"] = _one_or_all(run.summary.get("test/nll_particles") for run in kind.runs)
    row["test/data"] = _one_or_all(len(run.rows) for run in kind.runs)
    gains = [run.log_p - other.log_p for run, other in pairs(kind, first)]
    if kind is not first:
        row["log_p_gain"], row["log_p_gain_stderr_over_data"] = mean_over_data([run.rows for run in kind.runs], gains)
        row["log_p_gain_stderr_over_seeds"] = mean_and_stderr([float(gain.mean()) for gain in gains])[1]
    return row


def mean_over_data(rows: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> tuple[float, float | None]:
    """Mean over runs of the mean over data, and its standard error from the spread over data.

    Several runs may have been scored on the same datum: what they say of it is one draw, not several (the standard
    error is clustered by datum; Liang and Zeger 1986).

    Args:
        rows: the place of each datum, one array ``(N,)`` for each run.
        values: one number for each datum, the same shapes.
    """
    weight = np.concatenate([np.full(len(v), 1 / (len(values) * len(v))) for v in values])
    value = np.concatenate(list(values))
    mean = float(weight @ value)
    _, datum = np.unique(np.concatenate(list(rows)), return_inverse=True)
    shares = np.bincount(datum, weights=weight * (value - mean))  # of each datum in the error
    if len(shares) < 2:
        return mean, None
    return mean, float(np.sqrt(len(shares) / (len(shares) - 1) * (shares**2).sum()))


def _one_or_all(values: Any) -> Any:
    different = list(dict.fromkeys(values))
    return different[0] if len(different) == 1 else " ".join(map(str, different))


def _readable(key: str, value: Any) -> str:
    if key == "run.start":
        return f"from {Path(str(value)).name}"
    return f"{key.rpartition('.')[2]} {_shown(value)}" if "." in key else _shown(value)


def _shown(value: Any) -> str:
    """A value as on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return str({True: "true", False: "false"}[value] if isinstance(value, bool) else "null" if value is None else value)
