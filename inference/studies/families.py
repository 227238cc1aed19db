"""Study: variational families. Same model, same budget; where does each family lose its nats?"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from inference.canvas import BLUE, INK, PALE_BLUE, RUST, WIDTH, axis_labels, panel, save, sheet
from inference.config import ConfigError
from inference.console import Console
from inference.evaluate import held_out
from inference.experiment import open_run
from inference.figures import Figure
from inference.gap import gaps
from inference.grid import expand, run_grid
from inference.study import Section, draw_grid, words_with_error, write_study
from inference.table import COLUMNS, Table
from inference.workers import jobs_for, spread

GAPS = ("inference_gap", "approximation_gap", "amortization_gap")


@dataclass
class FamiliesSettings:
    """What is compared.

    Args:
        guides: words of the families.
        seeds: of the runs of each.
        data: held-out data whose gaps are measured, chosen at random.
        steps: of the search for each datum's own best member of the family.
        particles: importance samples and draws per datum for the gaps.
        jobs: runs at a time; 0 for one per CPU core.
    """

    guides: list[str] = field(
        default_factory=lambda: ["unconditional", "diagonal", "low_rank", "full", "mixture", "planar", "realnvp", "iaf"]
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    data: int = 100
    steps: int = 300
    particles: int = 1000
    jobs: int = 0


def families(arguments: list[str], settings: FamiliesSettings, folder: Path, console: Console, command: str) -> Path:
    """Guides at equal budget: bound, log p(x), and the gap split into approximation and amortization."""
    if not settings.guides or not settings.seeds:
        raise ConfigError("study.guides and study.seeds need at least one entry each")
    budget = [] if any(a.startswith(("trainer.steps", "trainer.epochs")) for a in arguments) else ["trainer.steps=3000"]
    base = [*arguments, *budget]
    axes = [f"guide={','.join(settings.guides)}", f"seed={','.join(map(str, settings.seeds))}"]
    table, results = run_grid(expand([*base, *axes]), folder / "runs", console, settings.jobs, run_dir=folder)
    if failed := [result for result in results if result.get("error")]:
        raise ConfigError(f"{failed[0]['run']} failed: {failed[0]['error']}")
    with console.stage("gaps") as progress:
        runs = [folder / "runs" / result["run"] for result in results]
        found = spread(partial(_measure, settings), runs, jobs_for(settings.jobs, runs))
        for done, (place, measured) in enumerate(found, start=1):
            results[place].update(measured)
            progress(done, len(results))
    split = _split(results, settings.guides)
    rows = [{**row, **gap} for row, gap in zip(table.records(), split.records(), strict=True)]
    sections = [
        Section("Where the nats go", _reading(settings), words_with_error(split, GAPS), [_draw(split, folder)]),
        Section("All held-out data", (), words_with_error(table, COLUMNS), draw_grid(table, ["guide"], folder)),
    ]
    return write_study(
        folder, "Variational families", _intro(results, settings), sections, Table.from_records(rows), command
    )


def _measure(settings: FamiliesSettings, folder: Path) -> dict[str, np.ndarray]:
    """The gaps of one run, datum by datum."""
    setup = open_run(folder)
    x, _ = held_out(setup.source("test"), settings.data, seed=0)  # the same data for every run
    found = gaps(setup.model, setup.guide, x, 0, settings.steps, particles=settings.particles)
    return {
        "approximation_gap": found.approximation.cpu().double().numpy(),
        "amortization_gap": found.amortization.cpu().double().numpy(),
        "inference_gap": (found.log_p - found.elbo).cpu().double().numpy(),
    }


def _split(results: list[dict[str, Any]], guides: list[str]) -> Table:
    """Mean of each gap over data and seeds; the standard error is over data, of their means over seeds."""
    rows = []
    for guide in guides:
        row: dict[str, Any] = {"guide": guide}
        for name in GAPS:
            by_datum = np.mean([result[name] for result in results if result["guide"] == guide], axis=0)
            row[name] = float(by_datum.mean())
            row[f"{name}_stderr"] = float(by_datum.std(ddof=1) / np.sqrt(len(by_datum))) if len(by_datum) > 1 else None
        rows.append(row)
    return Table.from_records(rows)


def _draw(table: Table, folder: Path) -> Figure:
    rows = table.records()
    height = 60 * len(rows)
    figure = sheet(WIDTH, height + 200)
    axes = panel(figure, 300, 100, WIDTH - 380, height, spines="bottom")
    for place, row in enumerate(rows):
        first, second = row["approximation_gap"], row["amortization_gap"]
        axes.barh(place, first, height=0.6, color=BLUE, label="approximation: the family" if place == 0 else None)
        axes.barh(place, second, left=first, height=0.6, color=PALE_BLUE,
                  label="amortization: the encoder, or too few inner steps" if place == 0 else None)  # fmt: skip
        axes.errorbar(first + second, place, xerr=row["inference_gap_stderr"] or 0.0, color=RUST, elinewidth=1.4)
    axes.set_yticks(range(len(rows)), [row["guide"].replace("_", " ") for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", length=0)
    axis_labels(axes, "log p(x) − ELBO, nats per held-out datum")
    axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    path = folder / "figures" / "gaps.png"
    save(figure, path)
    caption = (
        "The gap between log p(x) and the bound, from left to right: what even the best member of the family for "
        "each datum leaves, and what is lost because one network, or an inner optimization of a few steps, must find "
        "it. Whiskers: one standard error over data alone; how much seeds differ is in the table of all held-out data."
    )
    return Figure("gaps", "The inference gap, taken apart", caption, path)


def _intro(results: list[dict[str, Any]], settings: FamiliesSettings) -> list[str]:
    first = results[0]
    return [
        f"One model ({first['model']}, prior {first['prior']}, likelihood {first['likelihood']}) on {first['data']}, "
        f"trained for {first['train/steps']:,} steps with each of {len(settings.guides)} families of q(z|x); seeds "
        f"{', '.join(map(str, settings.seeds))}.",
        f"The data: {first['data_description']}",
    ]


def _reading(settings: FamiliesSettings) -> list[str]:
    return [
        f"Measured on {settings.data} held-out data. For each, the variational parameters that its encoder gave are "
        f"improved by {settings.steps} gradient steps of its own; log p(x) is importance-sampled from the result with "
        f"{settings.particles:,} draws. Both searches fall short on average, so the gaps are if anything larger. Each "
        "family's model is trained with it: a poor family also bends the model towards posteriors that it can fit.",
        "What is searched for each datum is all that the encoder writes. What a flow has for all data alike (the nets "
        "of realnvp, iaf and spline) it keeps, so that its best member is the best start and context of the flow as "
        "trained. Standard errors of the gaps are over data, of means over seeds; those of the table of all held-out "
        "data are over seeds.",
    ]
