"""The verb compare: finished runs beside each other on a page."""

import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from inference.compare_figures import draw_comparison, draw_courses
from inference.comparison import MEASURED, Kind, expect_the_same_data, in_kinds, read_run, table_of
from inference.config import ConfigError
from inference.console import Console
from inference.figures import Figure
from inference.grid import split_arguments
from inference.log import read_rows
from inference.report import format_value
from inference.study import Section, write_study
from inference.table import Table

SHOWN = ("reconstructions", "samples", "interpolations", "manifold", "prior_density", "aggregated_posterior")


def compare(arguments: Sequence[str], console: Console) -> Path:
    """Compare finished runs and write a page, a table and pictures; returns the page's path.

    log p(x) is compared datum by datum: each run with the run of the first kind that has its seed, so that what the
    data have in common cancels. Runs that differ in seed alone are one kind, and make one row.

    Args:
        arguments: folders of runs; ``run.dir=FOLDER`` for the page.
        console: who is told.

    Raises:
        ConfigError: too few runs, a folder that is none, or runs that were not scored on the same data.
        CheckpointError: a folder without a finished run.
    """
    own, folders = split_arguments(arguments, ("run.dir",))
    if odd := [folder for folder in folders if "=" in folder and not Path(folder).is_dir()]:
        raise ConfigError(f"compare takes folders of runs and run.dir=FOLDER, got {odd[0]!r}")
    if len(folders) < 2:
        raise ConfigError("compare needs the folders of two runs or more: python run.py compare RUN RUN")
    kinds = in_kinds([read_run(Path(folder)) for folder in folders])
    expect_the_same_data(kinds)
    table = table_of(kinds)
    folder = Path(own.get("run.dir") or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-compare")
    for line in in_words(kinds, table.records()):
        console.say(line)
    command = f"python run.py compare {shlex.join(folders)}"
    page = write_study(folder, "Runs compared", _intro(kinds), _sections(kinds, table, folder), table, command)
    console.say(f"table     {folder / 'table.csv'}\nreport    {page}")
    return page


# --- the page ----------------------------------------------------------------------------------------------------


def in_words(kinds: Sequence[Kind], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Two lines for each kind."""
    lines = []
    for kind, row in zip(kinds, records, strict=True):
        seeds = f" (seeds {row['seeds']})" if len(kind.runs) > 1 else ""
        lines.append(f"{kind.name}{seeds}")
        told = (
            f"          -log p(x) {_with_error(row, 'test/nll')}, KL {row['test/kl']:.3f}, "
            f"I(x; z) {row['test/mutual_information']:.3f}, {row['test/active_units']:g} active units"
        )
        if row.get("log_p_gain") is not None:
            told += f"\n          log p(x) less the first's {_with_error(row, 'log_p_gain', '+')}"
        lines.append(told)
    return lines


def _with_error(row: Mapping[str, Any], key: str, sign: str = "") -> str:
    told = f"{row[key]:{sign}.2f}"
    for over in ("data", "seeds"):
        if row.get(f"{key}_stderr_over_{over}") is not None:
            told += f" +- {row[f'{key}_stderr_over_{over}']:.2f} (over {over})"
    return told


def _intro(kinds: Sequence[Kind]) -> list[str]:
    first = kinds[0].runs[0]
    particles = {run.summary.get("test/nll_particles") for kind in kinds for run in kind.runs}
    estimate = (
        f"log p(x) is estimated with {format_value(next(iter(particles)))} importance samples for each datum"
        if len(particles) == 1
        else "log p(x) is estimated with different numbers of importance samples (test/nll_particles in the table), so "
        "that a part of a difference may be the estimates'"
    )
    return [
        f"{sum(len(kind.runs) for kind in kinds)} runs on {first.summary['data']}, {len(first.rows):,} held-out data "
        "each. The options beside each number are those that not all runs share; everything else is the same.",
        f"{estimate}; on average that is too low, and the lower the more the guide misses of the posterior. Each run "
        "is compared with the first kind's run of the same seed, datum by datum: what the data have in common cancels, "
        "so that the error of a difference is far below that of either number.",
        f"The data: {first.summary['data_description']}",
    ]


def _sections(kinds: Sequence[Kind], table: Table, folder: Path) -> list[Section]:
    figures = folder / "figures"
    courses = [(kind.name, [read_rows(run.folder / "metrics.jsonl") for run in kind.runs]) for kind in kinds]
    drawn = [draw_comparison(table.records(), figures), *draw_courses(courses, figures)]
    sections = [Section("Rate, information and fit", (), _for_readers(table), drawn)]
    for name in SHOWN:
        pictures = [
            Figure(name, f"{name} of {kind.name}", _captioned(kind), path)
            for kind in kinds if (path := kind.runs[0].folder / "figures" / f"{name}.png").is_file()
        ]  # fmt: skip
        if len(pictures) == len(kinds):
            sections.append(Section(name.replace("_", " ").capitalize(), (), None, pictures, side_by_side=True))
    return sections


def _captioned(kind: Kind) -> str:
    summary = kind.runs[0].summary
    return (
        f"{kind.name}, seed {kind.runs[0].seed}: I(x; z) = {summary['test/mutual_information']:.2f}, "
        f"−log p(x) = {summary['test/nll']:.2f} nats"
    )


def _for_readers(table: Table) -> Table:
    """Each number with its errors in one cell; the options as they differ."""
    records = []
    for row in table.records():
        shown = {"": row["kind"], **({"seeds": row["seeds"]} if " " in row["seeds"] else {})}
        for key in (*MEASURED, "log_p_gain"):
            if f"{key}" in row:
                title = {"log_p_gain": "log p(x) − the first's"}.get(key, key.rpartition("/")[2].replace("_", " "))
                shown[title] = _cell(row, key)
        records.append(shown)
    return Table.from_records(records)


def _cell(row: Mapping[str, Any], key: str) -> str | None:
    if row[key] is None:
        return None
    errors = [row.get(f"{key}_stderr_over_{over}") for over in ("data", "seeds")]
    whole = float(row[key]).is_integer() and not any(errors)
    told = f"{row[key]:.0f}" if whole else f"{row[key]:.3f}" if abs(row[key]) < 1 else f"{row[key]:.2f}"
    return (told + "".join(f"\u202f±\u202f{error:.2f}" for error in errors if error is not None)).replace("-", "−")
