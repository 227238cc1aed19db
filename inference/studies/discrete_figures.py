"""Tables and pictures of the study of discrete latents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator, NullFormatter

from inference.canvas import BLUE, INK, RUST, WIDTH, axis_labels, heading, panel, save, sheet
from inference.figures import Figure
from inference.study import Section
from inference.table import Table, over_seeds

COLUMNS = ("test/elbo", "test/nll", "perplexity", "active_codes", "variance", "milliseconds", "squared_bias")
ROW = 50  # pixels


def sections_of(records: list[dict[str, Any]], titles: Mapping[str, str], folder: Path) -> list[Section]:
    """A section for each model: best log p(x) first, in a table and a picture."""
    sections = []
    for latents in dict.fromkeys(record["latents"] for record in records):
        here = [record for record in records if record["latents"] == latents]
        rows = over_seeds(here, ["estimator", "seed"], COLUMNS).records()
        rows.sort(key=lambda row: row["test/nll"])
        errors = {r["estimator"]: (r["squared_bias_stderr"], r["test/nll_stderr"]) for r in here}
        for row in rows:
            row["bias_error"], row["data_error"] = errors[row["estimator"]]
            row["title"] = titles[row["estimator"]]
        shown = Table.from_records([_words(row) for row in rows])
        origin = next((record["reference"] for record in here if record["reference"]), "")
        alone = len({record["seed"] for record in here}) == 1
        over = (
            "Of one seed; the error of log p(x) is over data."
            if alone
            else "Errors of bound and log p(x) are over seeds."
        )
        words = [
            f"Best log p(x) first. {over} Perplexity is of each latent's classes "
            "over held-out data, averaged; a latent is in use where it tells 0.01 nats. The squared bias is a fraction "
            f"of the squared length of the ELBO's gradient ({origin}), and estimated without bias."
        ]
        path = folder / "figures" / f"{latents.replace(' ', '_')}.png"
        sections.append(Section(latents, words, shown, [_draw(latents, rows, path)]))
    return sections


def _words(row: Mapping[str, Any]) -> dict[str, Any]:
    def of(key: str, digits: int, sign: int = 1, error: float | None = None) -> str:
        over_seeds = row.get(f"{key}_stderr")
        error = error if over_seeds is None else over_seeds
        shown = f"{sign * row[key]:.{digits}f}" + (f"\u202f±\u202f{error:.{digits}f}" if error is not None else "")
        return shown.replace("-", "−")

    bias = row["squared_bias"]
    return {
        "estimator": row["title"],
        "log p(x)": of("test/nll", 2, -1, row["data_error"]),
        "bound": of("test/elbo", 2),
        "perplexity": f"{row['perplexity']:.2f}",
        "in use": f"{row['active_codes']:.0f}",
        "variance": f"{row['variance']:.3g}" if _varies(row) else "0",
        "squared bias": "" if bias is None else f"{bias:+.2f}\u202f±\u202f{row['bias_error']:.2f}".replace("-", "−"),
        "ms per gradient": f"{row['milliseconds']:.1f}",
    }


def _varies(row: Mapping[str, Any]) -> bool:
    """Whether there is more than rounding in the variance."""
    return bool(row["variance"] > 1e-12)


def _draw(latents: str, rows: list[dict[str, Any]], path: Path) -> Figure:
    """Bound and log p(x) at the left; variance, bias and time of the gradient beside them."""
    height = ROW * len(rows)
    figure = sheet(WIDTH, height + 220)
    places = range(len(rows))
    log_p, bound = [-row["test/nll"] for row in rows], [row["test/elbo"] for row in rows]
    variance = [row["variance"] if _varies(row) else float("nan") for row in rows]
    values = [
        ("nats per held-out datum", 330, 560, [(RUST, log_p), (BLUE, bound)]),
        (
            "variance of the gradient",
            960,
            270,
            [(INK, variance)],
        ),
        ("ms per gradient", 1290, 270, [(INK, [row["milliseconds"] for row in rows])]),
    ]
    for number, (title, left, width, series) in enumerate(values):
        axes = panel(figure, left, 110, width, height, spines="bottom")
        for tint, across in series:
            axes.plot(across, places, "o", color=tint, markersize=5)
        if number:
            finite = [value for value in series[0][1] if value == value]
            if max(finite) > 20 * min(finite):
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter(NullFormatter())
            else:
                axes.set_xlim(0, 1.08 * max(finite))
            axes.set_yticks([])
        else:
            axes.hlines(places, bound, log_p, BLUE, lw=0.8, zorder=0)
            axes.set_yticks(places, [row["title"] for row in rows])
        if axes.get_xscale() == "linear":
            axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axis_labels(axes, title)
    heading(figure.axes[0], latents)
    save(figure, path)
    caption = (
        "Red: log p(x) by importance sampling; blue: the bound, under hard codes; further right is better. Variance "
        "and time of one gradient: further left is better, at the same parameters for all; no dot where there is no "
        "variance."
    )
    return Figure(path.stem, latents, caption, path)
