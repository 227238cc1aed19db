"""``metrics.jsonl``: a row per line, whole or not there."""

import json
from pathlib import Path
from typing import Any

from inference.checkpoint import naming, write_atomically


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            break
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row."""
    with naming(path), open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def drop_rows_after(path: Path, step: int) -> None:
    """Leave the rows up to ``step``: those that a run which continues from there has not to write again."""
    kept = [row for row in read_rows(path) if row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
