"""Study: posterior collapse. When does a decoder stop listening to its latents, and what makes it listen again?"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from inference.checkpoint import write_atomically
from inference.config import ConfigError
from inference.console import Console
from inference.experiment import open_run
from inference.grid import Point, run_grid
from inference.log import read_rows
from inference.pictures import gallery
from inference.studies.collapse_figures import (
    draw_curves,
    draw_phases,
    draw_remedies,
    draw_side_by_side,
    draw_transition,
)
from inference.studies.linear import check_linear, flat_training_data, named, staircase, transition
from inference.studies.remedies import DECODERS, REMEDIES, combined, words_of
from inference.study import Section, words_with_error, write_study
from inference.table import Table, over_seeds

Linear = tuple[list[dict[str, Any]], list[tuple[float, int]]]
BUDGET = {
    "trainer.steps": "700",
    "trainer.learning_rate": "0.003",
    "trainer.schedule": "cosine",
    "trainer.validations": "12",
    "trainer.surgery_data": "200",
    "trainer.gap_particles": "10",
    "evaluation.particles": "100",
    "evaluation.draws": "10",
    "objective": "elbo",
}
MEASURED = (
    "test/kl",
    "test/mutual_information",
    "test/marginal_kl",
    "test/active_units",
    "test/kl_to_posterior",
    "test/elbo",
    "test/nll",
)
TRACKED = ("kl", "mutual_information", "marginal_kl", "active_units", "kl_to_posterior", "elbo", "nll")


@dataclass
class CollapseSettings:
    """What is varied.

    Args:
        betas: weights of the KL, each with every decoder.
        decoders: their capacities, weakest first: words of this study (mlp, wide, pixelcnn_near, pixelcnn) or any
            run.py words, such as 'decoder=gated decoder.hidden=[50]'.
        remedies: each with the last decoder, at weight 1: words of this study (none, beta_half, annealing, cyclical,
            free_bits, committed, mmd, aggressive, semi_amortized, skip, vq), several of them at once, such as
            annealing+free_bits+skip, or any run.py words, such as 'objective=free_bits objective.nats=0.2'. The default
            leaves out semi_amortized, which scores each datum with twice as many latents as it has dimensions in each
            step.
        seeds: of the runs of each.
        collapsed_below: nats of mutual information below which a posterior is called collapsed.
        linear_betas: weights of the KL at which a linear VAE is trained; [] for none.
        linear_dim: its number of latents.
        linear_scale: standard deviation of its noise, in the units of the data.
        linear_steps: of its training, at most.
        jobs: runs at a time; 0 for one per CPU core.
    """

    betas: list[float] = field(default_factory=lambda: [0.1, 0.3, 1.0, 3.0, 10.0])
    decoders: list[str] = field(default_factory=lambda: list(DECODERS))
    remedies: list[str] = field(default_factory=lambda: [word for word in REMEDIES if word != "semi_amortized"])
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    collapsed_below: float = 0.5
    linear_betas: list[float] = field(default_factory=lambda: [0.5, 1.0, 1.9, 4.7, 8.0, 12.0])
    linear_dim: int = 20
    linear_scale: float = 0.2
    linear_steps: int = 1500
    jobs: int = 0


def collapse(arguments: list[str], settings: CollapseSettings, folder: Path, console: Console, command: str) -> Path:
    """KL, information, active units and fit over weights of the KL, capacities of the decoder, and remedies."""
    _check(settings)
    points = _points(arguments, settings)
    x = flat_training_data(points[0].arguments) if settings.linear_betas else None  # says now whether there are any
    runs = folder / "runs"
    _, results = run_grid(points, runs, console, settings.jobs, run_dir=folder)
    if failed := [result for result in results if result.get("error")]:
        raise ConfigError(f"{failed[0]['run']} failed: {failed[0]['error']}")
    for point, result in zip(points, results, strict=True):
        result.update(point.labels)  # a run's summary has words of its own under some of these names
        known = result["test/nll_particles"] > 1 and result["test/nll"] is not None
        result["test/kl_to_posterior"] = -result["test/nll"] - result["test/elbo"] if known else None
    curves = {result["run"]: _tracked(read_rows(runs / result["run"] / "metrics.jsonl")) for result in results}
    write_atomically(folder / "curves.csv", _curves_csv(results, curves))
    table = over_seeds(results, ["beta", "decoder", "remedy", "seed"], MEASURED)
    linear, stairs = _linear(x, settings, console)
    sections = _sections(table, results, curves, (linear, stairs), settings, folder)
    return write_study(folder, "Posterior collapse", _intro(results, settings), sections, table, command)


def _check(settings: CollapseSettings) -> None:
    for name in ("betas", "decoders", "remedies", "seeds"):
        if not getattr(settings, name):
            raise ConfigError(f"study.{name} needs at least one entry")
    if not all(0 <= beta < math.inf for beta in settings.betas):
        raise ConfigError(f"study.betas: {settings.betas} are weights of the KL: accepted: 0 or above, and finite")
    if settings.linear_betas:
        check_linear("study.linear_betas", settings.linear_betas, settings.linear_dim, settings.linear_scale)


# --- the runs ----------------------------------------------------------------------------------------------------


def _points(arguments: Sequence[str], settings: CollapseSettings) -> list[Point]:
    """The phase picture's runs, every weight with every decoder, and the remedies' with the last decoder."""
    strongest = settings.decoders[-1]
    cells = [(beta, decoder, "none") for decoder in settings.decoders for beta in settings.betas]
    cells += [(1.0, strongest, remedy) for remedy in settings.remedies]
    return [
        _point(arguments, beta, decoder, remedy, seed) for beta, decoder, remedy in dict.fromkeys(cells)
        for seed in settings.seeds
    ]  # fmt: skip


def _point(arguments: Sequence[str], beta: float, decoder: str, remedy: str, seed: int) -> Point:
    words = dict(BUDGET)
    if any(argument.startswith("trainer.epochs=") for argument in arguments):
        del words["trainer.steps"]
    words |= {} if beta == 1 else {"objective": "beta", "objective.beta": named(beta)}
    words = _weighed(_given(words, [*arguments, *words_of(decoder, DECODERS, "decoders")]), beta)
    words = _given(words, combined(remedy)) | {"seed": str(seed)}
    labels = {"beta": named(beta), "decoder": decoder, "remedy": remedy, "seed": str(seed)}
    return Point(labels, tuple(f"{key}={value}" for key, value in words.items()))


def _given(words: Mapping[str, str], more: Sequence[str]) -> dict[str, str]:
    """The words with others in their place; another objective has options of its own."""
    given = dict(argument.split("=", 1) for argument in more)
    kept = {k: v for k, v in words.items() if "objective" not in given or not k.startswith("objective.")}
    return kept | given


def _weighed(words: dict[str, str], beta: float) -> dict[str, str]:
    """The words, if their objective gives the KL the weight ``beta``, as an objective of the user's own need not."""
    objective = words["objective"]
    if objective in ("beta", "combined"):
        words = {"objective.beta": named(beta)} | words
    if words.get("objective.beta", "1") != named(beta):
        raise ConfigError(
            f"objective={objective} does not have the weight {beta:g} of study.betas; accepted: objective=combined "
            "without objective.beta, which takes it from there, or study.betas=[1]"
        )
    return words


def _tracked(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The validated rows of a run's log, the names without their prefix; with ``nll`` where the gap is known."""
    tracked = []
    for row in rows:
        if "valid/kl" not in row:
            continue
        entry = {"step": row["step"]} | {k.removeprefix("valid/"): v for k, v in row.items() if k.startswith("valid/")}
        if "kl_to_posterior" in entry:
            entry["nll"] = -entry["elbo"] - entry["kl_to_posterior"]
        tracked.append(entry)
    return tracked


def _curves_csv(results: Sequence[Mapping[str, Any]], curves: Mapping[str, list[dict[str, float]]]) -> str:
    labels = ("beta", "decoder", "remedy", "seed")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*labels, "step", *TRACKED])
    for result in results:
        for row in curves[result["run"]]:
            writer.writerow([*(result[k] for k in labels), row["step"], *(row.get(k, "") for k in TRACKED)])
    return buffer.getvalue()


def _linear(x: Tensor | None, settings: CollapseSettings, console: Console) -> Linear:
    """The linear VAE on flat data ``(N, D)``: trained ones, and where the best ones lose a unit."""
    if x is None:
        return [], []
    ends = min(settings.linear_betas), max(settings.linear_betas)
    stairs = staircase(x, *ends, settings.linear_scale, settings.linear_dim)
    with console.stage("linear VAEs") as progress:
        rows = transition(
            x, settings.linear_betas, settings.linear_scale, settings.linear_dim, settings.linear_steps,
            on_progress=progress,
        )  # fmt: skip
    return rows, stairs


# --- the page ----------------------------------------------------------------------------------------------------


def _sections(
    table: Table,
    results: list[dict[str, Any]],
    curves: Mapping[str, list[dict[str, float]]],
    linear: Linear,
    settings: CollapseSettings,
    folder: Path,
) -> list[Section]:
    figures, rows = folder / "figures", table.records()
    phases = [row for row in rows if row["remedy"] == "none" and row["beta"] in map(named, settings.betas)]
    remedies = [row for row in rows if float(row["beta"]) == 1 and row["decoder"] == settings.decoders[-1]]
    shown = [
        Section("The phase picture", _about_phases(), None, [draw_phases(phases, settings.decoders, figures)]),
    ]
    if linear[0]:
        shown.append(
            Section(
                "The linear VAE, exactly", _about_linear(settings), _linear_table(linear[0]),
                [draw_transition(*linear, phases, settings.decoders, figures)],
            )
        )  # fmt: skip
    shown.append(
        Section(
            f"Remedies, with the decoder {settings.decoders[-1]}", _about_remedies(settings),
            words_with_error(Table.from_records([_for_readers(row) for row in remedies]), MEASURED),
            [draw_remedies(remedies, figures)],
        )
    )  # fmt: skip
    strongest = [result for result in results if result["decoder"] == settings.decoders[-1]]
    shown.append(
        Section("Along the training", (), None, [draw_curves(_one_seed(strongest, settings), curves, figures)])
    )
    if (pair := _collapsed_and_cured(results, settings)) is not None:
        galleries = [gallery(open_run(folder / "runs" / result["run"])) for result in pair]
        if len(galleries[0].shape) == 3:
            picture = draw_side_by_side(galleries, pair, figures)
            shown.append(Section("A collapsed model and a cured one", (), None, [picture]))
    shown.append(
        Section("Every cell", (), words_with_error(Table.from_records([_for_readers(r) for r in rows]), MEASURED))
    )
    return shown


def _for_readers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("runs", "failed")}


def _one_seed(results: list[dict[str, Any]], settings: CollapseSettings) -> list[dict[str, Any]]:
    return [r for r in results if float(r["beta"]) == 1 and r["seed"] == str(settings.seeds[0])]


def _collapsed_and_cured(
    results: list[dict[str, Any]], settings: CollapseSettings
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """A run without remedy whose posterior collapsed, and the best of its decoder that did not.

    Preferred is the last decoder, which remedies are tried with, and a weight near 1.
    """
    first = [result for result in results if result["seed"] == str(settings.seeds[0])]
    collapsed = [r for r in first if r["remedy"] == "none" and r["test/mutual_information"] < settings.collapsed_below]
    if not collapsed:
        return None

    def preference(run: dict[str, Any]) -> tuple[bool, float]:
        return run["decoder"] != settings.decoders[-1], abs(math.log(max(float(run["beta"]), 1e-9)))

    worst = min(collapsed, key=preference)
    others = [
        r for r in first if r["decoder"] == worst["decoder"] and r["test/mutual_information"] > 1
        and r["test/nll_particles"] > 1
    ]  # fmt: skip
    return (worst, min(others, key=lambda r: r["test/nll"])) if others else None


def _intro(results: list[dict[str, Any]], settings: CollapseSettings) -> list[str]:
    first = results[0]
    return [
        f"A VAE with {first['prior']} prior and {first['guide']} guide on {first['data']}: {len(results)} runs of "
        f"{first['train/steps']:,} steps over the weight of the KL, the capacity of the decoder, remedies, and seeds "
        f"{', '.join(map(str, settings.seeds))}. All numbers are of held-out data, in nats per datum.",
        "A posterior has collapsed where q(z|x) is the prior whatever the datum: the KL and the mutual information of "
        "datum and code are zero, and no unit is active. KL(q ‖ posterior) is what the guide leaves: log p(x), "
        "importance-sampled and so low on average, less the ELBO.",
        f"The data: {first['data_description']}",
    ]


def _about_phases() -> list[str]:
    return [
        "Each cell is a VAE trained with β times the KL, mean over seeds. Towards larger β and stronger decoders a "
        "latent must earn more than it costs, and fewer do."
    ]


def _about_linear(settings: CollapseSettings) -> list[str]:
    return [
        f"With a linear decoder and Gaussian noise of standard deviation s = {settings.linear_scale:g}, collapse is a "
        "property of the optimum, not of the training: a direction of the data with variance λ is coded if and only "
        "if λ > β s² (Lucas et al. 2019). Below: linear VAEs trained by gradient on the same data as real numbers, "
        "beside the formula."
    ]


def _about_remedies(settings: CollapseSettings) -> list[str]:
    return [
        "The same model and budget with each remedy; none is the plain VAE. A remedy is worth something if information "
        "rises and log p(x) does not fall. For those that change the objective, the ELBO shown is still the plain one."
    ]


def _linear_table(linear: list[dict[str, Any]]) -> Table:
    return Table.from_records(
        [
            {
                "β": row["beta"],
                "active units": row["active"],
                "#{λ > β s²}": row["exact_active"],
                "KL": row["rate"],
                "½ Σ log(λ / β s²)": row["exact_rate"],
                "squared error": row["distortion"],
                "Σ min(λ, β s²)": row["exact_distortion"],
                "KL(q ‖ posterior)": row["kl_to_posterior"],
            }
            for row in linear
        ]
    )
