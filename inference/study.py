"""Studies: questions answered by several runs, on one page and in one table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from inference.checkpoint import write_atomically
from inference.figures import Figure
from inference.report import embedded, render
from inference.table import Table


@dataclass(frozen=True)
class Section:
    """A part of a study's page: what is asked or seen, in words, pictures and numbers."""

    title: str
    paragraphs: Sequence[str] = ()
    table: Table | None = None
    figures: Sequence[Figure] = field(default_factory=tuple)


def write_study(
    folder: Path, title: str, intro: Sequence[str], sections: Sequence[Section], table: Table, command: str
) -> Path:
    """Write ``report.html``, ``table.csv`` and ``table.json`` into a study's folder; returns the page's path.

    Args:
        folder: the study's directory; made if missing.
        title: of the page.
        intro: paragraphs that say what is asked and of what.
        sections: the parts of the page, in order.
        table: every number, for those who compute on.
        command: what repeats the study.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "table.csv", table.to_csv())
    write_atomically(folder / "table.json", table.to_json())
    shown = [(section, [(figure, *embedded(figure.path)) for figure in section.figures]) for section in sections]
    page = render("study.html.j2", title=title, intro=intro, sections=shown, command=command)
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def words_with_error(table: Table, columns: Sequence[str]) -> Table:
    """The same table for readers: each of ``columns`` with its standard error in one cell, other columns kept."""
    records = []
    for row in table.records():
        shown = {}
        for key, value in row.items():
            if key.endswith("_stderr"):
                continue
            error = row.get(f"{key}_stderr")
            if key in columns and value is not None:
                shown[key] = f"{value:.2f}" + (f" ± {error:.2f}" if error is not None else "")
            elif key not in columns and f"{key}_stderr" not in row:
                shown[key] = value
        records.append(shown)
    return Table.from_records(records)
