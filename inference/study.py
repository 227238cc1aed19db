"""Studies: questions answered by several runs, on one page and in one table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from inference.canvas import BLUE, RUST, WIDTH, axis_labels, panel, save, sheet
from inference.checkpoint import write_atomically
from inference.figures import Figure
from inference.report import embedded, render
from inference.table import Table


@dataclass(frozen=True)
class Section:
    """A part of a study's page: what is asked or seen, in words, pictures and numbers.

    ``side_by_side`` puts the pictures beside each other, small, and not one below the other.
    """

    title: str
    paragraphs: Sequence[str] = ()
    table: Table | None = None
    figures: Sequence[Figure] = field(default_factory=tuple)
    side_by_side: bool = False


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


def draw_grid(table: Table, labels: Sequence[str], folder: Path) -> list[Figure]:
    """Bound and log p(x) of each row of a table over seeds, with standard errors: one picture, or none without them."""
    rows = [row for row in table.records() if row.get("test/elbo") is not None]
    keys = [label for label in labels if label != "seed" and all(label in row for row in rows)]
    if not rows or not keys:
        return []
    figure = sheet(WIDTH, 150 + 54 * len(rows))
    axes = panel(figure, 420, 100, WIDTH - 470, 54 * len(rows), spines="bottom")
    for place, row in enumerate(rows):
        for name, sign, tint in (("test/elbo", 1, BLUE), ("test/nll", -1, RUST)):
            if row[name] is None:
                continue
            error = row.get(f"{name}_stderr") or 0.0
            axes.errorbar(sign * row[name], place, xerr=error, fmt="o", color=tint, markersize=5, elinewidth=1.4)
    axes.set_yticks(range(len(rows)), [", ".join(str(row[key]) for key in keys) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axis_labels(axes, "nats per held-out datum, further right is better")
    path = folder / "figures" / "grid.png"
    save(figure, path)
    caption = (
        "Blue: the bound. Red: log p(x) by importance sampling. Whiskers: one standard error over seeds. The distance "
        "between the two is the gap that the guide leaves."
    )
    return [Figure("grid", "Bound and log p(x)", caption, path)]


def words_with_error(table: Table, columns: Sequence[str]) -> Table:
    """The same table for readers: each of ``columns`` with its standard error in one cell, other columns kept."""
    records = []
    for row in table.records():
        shown = {}
        for key, value in row.items():
            if key.endswith("_stderr"):
                continue
            error = row.get(f"{key}_stderr")
            title = key.rpartition("/")[2].replace("_", " ")
            if key in columns and value is not None:
                shown[title] = f"{value:.2f}" + (f"\u202f±\u202f{error:.2f}" if error is not None else "")
            elif key not in columns and f"{key}_stderr" not in row:
                shown[title] = value
        records.append(shown)
    return Table.from_records(records)
