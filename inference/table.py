"""Tables of runs: grouped over seeds, and written as CSV and JSON."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLUMNS = (
    "test/elbo",
    "test/reconstruction",
    "test/kl",
    "test/nll",
    "test/mutual_information",
    "test/marginal_kl",
    "test/active_units",
    "train/elbo",
    "train/seconds",
)


@dataclass(frozen=True)
class Table:
    """Named columns of numbers and words; None is a missing value."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    @classmethod
    def from_records(cls, records: Sequence[Mapping[str, Any]]) -> "Table":
        """One row per record; the columns are all keys in order of first appearance."""
        columns = tuple(dict.fromkeys(key for record in records for key in record))
        return cls(columns, tuple(tuple(record.get(key) for key in columns) for record in records))

    def records(self) -> list[dict[str, Any]]:
        """The rows as mappings."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def to_csv(self) -> str:
        """Comma-separated text with a header."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if value is None else value for value in row] for row in self.rows)
        return buffer.getvalue()

    def to_json(self) -> str:
        """A list of objects."""
        return json.dumps(self.records(), indent=1) + "\n"


def mean_and_stderr(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean of the values and its standard error; the error is None for fewer than two."""
    if not values:
        return None, None
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def over_seeds(records: Sequence[Mapping[str, Any]], labels: Sequence[str], columns: Sequence[str] = COLUMNS) -> Table:
    """Mean and standard error (``name``, ``name_stderr``) of the columns, over all records that differ in seed alone.

    Args:
        records: flat results, one per run; a run that failed has an ``error`` and counts in ``failed`` only.
        labels: what was varied; ``seed`` among them is averaged over.
        columns: what is averaged.
    """
    keys = [label for label in labels if label != "seed"]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    rows = []
    for group, members in groups.items():
        good = [record for record in members if not record.get("error")]
        row: dict[str, Any] = {**dict(zip(keys, group, strict=True)), "runs": len(good)}
        for column in columns:
            values = [record[column] for record in good if record.get(column) is not None]
            row[column], row[f"{column}_stderr"] = mean_and_stderr(values)
        row["failed"] = len(members) - len(good)
        rows.append(row)
    return Table.from_records(rows)
