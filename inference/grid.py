"""Grids of runs: every combination of several words, each a run of its own, in one table."""

import itertools
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException

from inference.checkpoint import write_atomically
from inference.config import ConfigError, load, parse_argument
from inference.console import Console, Quiet
from inference.data import DataError
from inference.groups import in_groups
from inference.signals import Interrupted, raised
from inference.structure import StructureError
from inference.study import Section, draw_grid, words_with_error, write_study
from inference.table import COLUMNS, Table, over_seeds
from inference.workers import WorkerError, jobs_for, spread


class GridError(RuntimeError):
    """Some runs of a grid failed; the others are kept."""


@dataclass(frozen=True)
class Point:
    """One run of a grid: what was varied, and the whole list of arguments."""

    labels: dict[str, str]
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """A folder name that tells the run from its neighbours."""
        words = ",".join(f"{key}={value}" for key, value in self.labels.items()) or "run"
        return "".join(c if c.isalnum() or c in "=,.-_+" else "_" for c in words)


def expand(arguments: Sequence[str]) -> list[Point]:
    """Every combination of the values in ``key=a,b`` and ``key=range(0,3)`` (Hydra's sweep grammar)."""
    axes: list[list[tuple[str, str, bool]]] = []
    for argument in arguments:
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            raise ConfigError(f"{argument!r} is not key=value or key=value,value") from None
        key = override.key_or_group
        if override.type != OverrideType.CHANGE or override.package is not None:
            raise ConfigError(f"{argument!r}: write key=value or key=value,value; options are not added or removed")
        if override.is_sweep_override():
            axes.append([(key, str(value), True) for value in override.sweep_string_iterator()])
            if not axes[-1]:
                raise ConfigError(f"{argument!r} names no value")
        else:
            axes.append([(key, argument.partition("=")[2], False)])
    return [
        Point({k: v for k, v, varied in combination if varied}, tuple(f"{k}={v}" for k, v, _ in combination))
        for combination in itertools.product(*axes)
    ]


def grid(arguments: Sequence[str], console: Console) -> Path:
    """Run the grid that the arguments span and write its page; returns the page's path.

    ``run.dir`` names the grid's folder; ``grid.jobs`` how many processes work at a time, 0 for one per CPU core.
    ``grid.together`` says whether runs that differ in values alone train in one step: auto where it pays, yes, no.

    Raises:
        ConfigError: a bad option, or no option with several values.
    """
    own, rest = split_arguments(arguments, ("run.dir", "grid.jobs", "grid.together"))
    points = expand(rest)
    _refuse_twice([point.name for point in points])
    labels = list(points[0].labels)
    if not labels:
        raise ConfigError("-m runs a grid: give some option several values, such as seed=0,1,2 or guide=diagonal,full")
    jobs = own.get("grid.jobs", "0")
    if not jobs.isdecimal():
        raise ConfigError(f"grid.jobs={jobs} is not a number of processes; 0 takes one per core")
    together = own.get("grid.together", "auto")
    if together not in ("auto", "yes", "no"):
        raise ConfigError(f"grid.together={together} is not one of auto, yes, no")
    folder = Path(own.get("run.dir") or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-grid")
    table, results = run_grid(points, folder, console, int(jobs), together=together)
    failed = [result for result in results if result.get("error")]
    page = write_study(
        folder,
        "A grid of runs",
        [f"{len(points)} runs over {', '.join(labels)}. Mean ± standard error over seeds, in nats per held-out datum."],
        [
            Section("Results", table=words_with_error(table, COLUMNS), figures=draw_grid(table, labels, folder)),
            *([Section("Failed", [f"{r['run']}: {r['error']}" for r in failed])] if failed else []),
        ],
        table,
        f"python run.py -m {shlex.join(arguments)}",
    )
    console.say(f"table     {folder / 'table.csv'}\nreport    {page}")
    if failed:
        raise GridError(f"{len(failed)} of {len(points)} runs failed; the others are kept. {failed[0]['error']}")
    return page


def _refuse_twice(names: Sequence[str]) -> None:
    """Each run has the folder of its name to itself."""
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ConfigError(f"the grid has {name} twice; accepted: each combination once")


def split_arguments(arguments: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The values of those arguments that set one of ``keys``, and the other arguments."""
    own = dict(parse_argument(a) for a in arguments if a.partition("=")[0] in keys)
    return {key: str(value) for key, value in own.items()}, [a for a in arguments if a.partition("=")[0] not in keys]


def run_grid(
    points: Sequence[Point],
    folder: Path,
    console: Console,
    jobs: int = 0,
    run_dir: Path | None = None,
    together: str = "no",
) -> tuple[Table, list[dict]]:
    """Train every point in a folder of its own and collect the results.

    A run that is finished already is read, not trained again; one that was interrupted goes on. A run that fails is
    recorded with its error, and the others go on.

    Args:
        points: the runs.
        folder: where they are kept, and ``table.csv``, ``table.json`` and ``runs.json`` are written.
        console: who is told.
        jobs: how many run at a time, each in a process of its own (1: in this one); 0 for one per CPU core.
        run_dir: what ``run.dir`` has to be to go on after an interruption, where that is not ``folder``.
        together: whether runs that differ in values alone train in one step: auto where it pays, yes, no.

    Returns:
        The table of means and standard errors over seeds, and the results one by one.
    """
    _rehearse(points, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir={folder} cannot be made: {error.strerror}; accepted: a new directory") from None
    _remember(points, folder / "grid.json")
    jobs = jobs_for(jobs, points)
    groups = in_groups([point.arguments for point in points], jobs, together)
    if sharing := [group for group in groups if len(group) > 1]:
        sizes = " + ".join(str(len(group)) for group in sharing)
        console.say(
            f"together  {sizes} runs that differ in values alone share compiled steps; grid.together=no parts them"
        )
    results: list[dict[str, Any]] = [{} for _ in points]
    try:
        with console.stage(f"{len(points)} runs, {jobs} at a time") as progress:
            work = [tuple(points[place] for place in group) for group in groups]
            done = 0
            for place, found in spread(partial(_run_in, folder), work, min(jobs, len(work))):
                for member, result in zip(groups[place], found, strict=True):
                    results[member] = result
                done += len(found)
                progress(done, len(points))
    except WorkerError as error:
        again = f"give the same command, with run.dir={run_dir or folder} and a smaller grid.jobs"
        raise GridError(f"{error}; to go on, {again}") from None
    except Interrupted as stop:
        raise Interrupted(stop.signum, f". To go on, give the same command, with run.dir={run_dir or folder}") from None
    labels = list(dict.fromkeys(key for point in points for key in point.labels))
    table = over_seeds(results, labels)
    write_atomically(folder / "runs.json", json.dumps(results, indent=1) + "\n")
    write_atomically(folder / "table.csv", table.to_csv())
    write_atomically(folder / "table.json", table.to_json())
    return table, results


def _rehearse(points: Sequence[Point], folder: Path) -> None:
    """Find bad options and parts that do not fit before anything is trained; seeds are no different for that."""
    from inference import experiment

    configs = [load(point.arguments) for point in points]
    seen = set()
    for point, config in zip(points, configs, strict=True):
        same = tuple(argument for argument in point.arguments if not argument.startswith("seed="))
        if len(points) == 1 or same in seen or (folder / point.name / "config.yaml").exists():
            continue  # one run says it itself, and what has begun has been through it
        seen.add(same)
        try:
            experiment.rehearse(config)
        except (ConfigError, DataError, StructureError) as error:
            raise ConfigError(f"{point.name}: {error}") from None
        except (RuntimeError, MemoryError):
            continue  # numbers that are not finite, say: recorded with the run, while the others go on


def _remember(points: Sequence[Point], path: Path) -> None:
    """Note what every folder holds, so that a later grid does not take another run's result for its own."""
    try:
        known = dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError):
        raise ConfigError(f"{path} is damaged; choose another run.dir") from None
    for point in points:
        if known.setdefault(point.name, list(point.arguments)) != list(point.arguments):
            raise ConfigError(
                f"run.dir={path.parent} holds {point.name} with other options ({' '.join(known[point.name])}); "
                "choose another directory"
            )
    write_atomically(path, json.dumps(known, indent=1) + "\n")


def _run_in(folder: Path, points: Sequence[Point]) -> list[dict[str, Any]]:
    if len(points) == 1:
        return [run_point(points[0], folder / points[0].name)]
    from inference.together import train_together

    results = train_together([(point.arguments, folder / point.name) for point in points])
    return [{**p.labels, "run": p.name, **result} for p, result in zip(points, results, strict=True)]


def run_point(point: Point, folder: Path) -> dict[str, Any]:
    """One run of a grid, from wherever it is to its summary; what was varied is among the keys."""
    from inference import experiment

    summary_path = folder / "summary.json"
    try:
        with raised():
            if (folder / "config.yaml").exists():
                experiment.resume(folder, Quiet())  # does nothing where nothing is left to do
            else:
                experiment.train(load([*point.arguments, f"run.dir={json.dumps(str(folder))}"]), Quiet())
        return {**point.labels, "run": point.name, **json.loads(summary_path.read_text())}
    except Exception as error:  # one bad run must not cost the others theirs
        return {**point.labels, "run": point.name, "error": f"{type(error).__name__}: {error}"}
