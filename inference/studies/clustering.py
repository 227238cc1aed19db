"""Study: clustering. Do the components of a mixture prior find the classes, and how much is the seed's doing?"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.assemble import Setup
from inference.canvas import (
    BLUE,
    INK,
    MUTED,
    PALE_BLUE,
    RUST,
    WIDTH,
    axis_labels,
    colour,
    ground_is_low,
    mosaic,
    panel,
    print_images,
    save,
    sheet,
)
from inference.clustering import Labels, clustering_accuracy, clusters_of, mutual_information_score
from inference.config import ConfigError
from inference.console import Console
from inference.em import EMSettings, fit
from inference.evaluate import evaluating, held_out
from inference.experiment import open_run
from inference.figures import Figure
from inference.grid import Point, run_grid
from inference.pretraining import draw_codes, fit_mixture
from inference.study import Section, write_study
from inference.table import Table
from models.kmeans import KMeans

Record = dict[str, Any]
WORDS = {  # of the models with clusters: what they are trained with after, or without, the pretraining
    "gmm_vae": "prior=mixture objective=elbo",
    "vade": "prior=mixture objective=vade",
    "gmm_vae_amortized": "model=gmm_vae guide=clustering guide.assignment=amortized objective=trace_enum",
    "gmm_vae_scratch": "prior=mixture objective=elbo",
}
TITLES = {
    "kmeans": "K-means on pixels",
    "vae_kmeans": "VAE, then K-means",
    "vae_gmm": "VAE, then GMM by EM",
    "gmm_vae": "GMM-VAE, p(c|z)",
    "vade": "VaDE",
    "gmm_vae_amortized": "GMM-VAE, q(c|x) by a net",
    "gmm_vae_scratch": "GMM-VAE without pretraining",
}
BUDGET = {
    "trainer.steps": "2000",
    "trainer.learning_rate": "0.002",
    "trainer.schedule": "cosine",
    "trainer.validations": "5",
    "model.latent_dim": "10",
    "evaluation.particles": "50",
    "evaluation.draws": "2",
    "evaluation.data": "1000",
}


@dataclass
class ClusteringSettings:
    """What is compared.

    Args:
        methods: words of this study.
        seeds: of the runs of each.
        clusters: how many.
        data: training data that K-means and the mixtures on codes are fitted to, at most.
        restarts: of K-means and of EM, the best of which counts.
        jobs: runs at a time; 0 for one per CPU core.
    """

    methods: list[str] = field(default_factory=lambda: [m for m in TITLES if m != "gmm_vae_amortized"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    clusters: int = 10
    data: int = 10_000
    restarts: int = 5
    jobs: int = 0


def clustering(
    arguments: list[str], settings: ClusteringSettings, folder: Path, console: Console, command: str
) -> Path:
    """K-means, VAE + K-means, mixture-prior VAEs and VaDE: accuracy of their clusters, mean and spread over seeds."""
    _check(settings)
    runs = folder / "runs"
    pretrained = _trained(_points("pretraining", "", arguments, settings), runs, settings, console, folder)
    found = {}
    for method in [name for name in settings.methods if name in WORDS]:
        points = _points(method, WORDS[method], arguments, settings, runs)
        found[method] = _trained(points, runs, settings, console, folder)
    records: list[Record] = []
    with console.stage("clusters") as progress:
        for done, (seed, name) in enumerate(pretrained.items(), start=1):
            setup = open_run(runs / name)
            records += _classical(setup, seed, settings)
            for method, names in found.items():
                records.append(_record(method, seed, *_of_model(open_run(runs / names[seed]))))
            progress(done, len(pretrained))
    records.sort(key=lambda record: (list(TITLES).index(record["method"]), record["seed"]))
    best = max((r for r in records if r["method"] in WORDS), key=lambda r: r["accuracy"], default=None)
    sections = [Section("Accuracy", READING, _shown(records), [_draw(records, folder)])]
    if best is not None:
        shown = open_run(runs / found[best["method"]][best["seed"]])
        sections.append(Section("What the clusters hold", (), figures=_draw_clusters(shown, best, folder)))
    return write_study(folder, "Clusters", _intro(setup, settings), sections, Table.from_records(records), command)


READING = [
    "Accuracy is the share of held-out data whose cluster stands for their class, under the best one-to-one match of "
    "clusters and classes; labels take no other part. NMI is their mutual information over the mean of their "
    "entropies. The mean over seeds comes with its spread (one standard deviation) and the extremes: results of a "
    "single seed say little here.",
]


def _check(settings: ClusteringSettings) -> None:
    if unknown := [method for method in settings.methods if method not in TITLES]:
        raise ConfigError(f"study.methods: {unknown[0]} is not known; accepted: {', '.join(TITLES)}")
    if not settings.methods or not settings.seeds:
        raise ConfigError("study.methods and study.seeds need at least one entry each")
    if settings.clusters < 2 or settings.restarts < 1 or settings.data < settings.clusters:
        raise ConfigError("study.clusters is at least 2, study.restarts 1, and study.data as many as clusters")


def _points(
    method: str, words: str, arguments: Sequence[str], settings: ClusteringSettings, start: Path | None = None
) -> list[Point]:
    """A run of each seed; with ``start``, from the pretrained run of that seed."""
    given = {argument.partition("=")[0] for argument in arguments}
    if "trainer.epochs" in given:
        given.add("trainer.steps")
    options = [*(f"{key}={value}" for key, value in BUDGET.items() if key not in given), *arguments, *words.split()]
    if words:
        options.append(f"{'model' if 'model=' in words else 'prior'}.components={settings.clusters}")
    points = []
    for seed in settings.seeds:
        labels = {"method": method, "seed": str(seed)}
        own = [f"seed={seed}"]
        if start is not None and not method.endswith("scratch"):
            own.append(f"run.start='{start / _name('pretraining', seed)}'")
        points.append(Point(labels, (*options, *own)))
    return points


def _name(method: str, seed: int) -> str:
    return Point({"method": method, "seed": str(seed)}, ()).name


def _trained(
    points: list[Point], runs: Path, settings: ClusteringSettings, console: Console, folder: Path
) -> dict[int, str]:
    """Folder names by seed of trained runs."""
    _, results = run_grid(points, runs, console, settings.jobs, run_dir=folder)
    if failed := [result for result in results if result.get("error")]:
        raise ConfigError(f"{failed[0]['run']} failed: {failed[0]['error']}")
    return {int(point.labels["seed"]): point.name for point in points}


def _labelled(setup: Setup) -> tuple[Tensor, Labels]:
    x, index = held_out(setup.source("test"), 0, seed=0)
    if "test" not in setup.dataset.labels:
        raise ConfigError(
            f"data={setup.dataset.name}, binarization {setup.dataset.binarization}, has no labels to hold clusters "
            "against; accepted: data=digits, or mnist with data.binarization=dynamic"
        )
    return x, setup.dataset.labels["test"][index].numpy()


def _classical(setup: Setup, seed: int, settings: ClusteringSettings) -> list[Record]:
    """What needs no mixture in the model: K-means on the data, K-means and a mixture on a VAE's codes."""
    x, labels = _labelled(setup)
    train, _ = held_out(setup.source("train"), settings.data, seed=seed)
    records = []
    with evaluating(setup.model, setup.guide, seed=seed):
        codes, new = draw_codes(setup.guide, train, means=True), draw_codes(setup.guide, x, means=True)
        if "kmeans" in settings.methods:
            records.append(_record("kmeans", seed, labels, _nearest(train.flatten(1), x.flatten(1), seed, settings)))
        if "vae_kmeans" in settings.methods:
            records.append(_record("vae_kmeans", seed, labels, _nearest(codes, new, seed, settings)))
        if "vae_gmm" in settings.methods:
            mixture = fit_mixture(codes, settings.clusters, settings.restarts, seed)
            records.append(_record("vae_gmm", seed, labels, mixture.log_joint(new).argmax(1).cpu().numpy()))
    return records


def _nearest(train: Tensor, x: Tensor, seed: int, settings: ClusteringSettings) -> Labels:
    words = KMeans(train.shape[1:], settings.clusters).to(train)
    fit(words, train, EMSettings(restarts=settings.restarts, seed=seed))
    return words.encode(x).cpu().numpy()


def _of_model(setup: Setup) -> tuple[Labels, Labels]:
    x, labels = _labelled(setup)
    with evaluating(setup.model, setup.guide, seed=0):
        return labels, clusters_of(setup.model, setup.guide, x)


def _record(method: str, seed: int, labels: Labels, clusters: Labels) -> Record:
    return {
        "method": method,
        "seed": seed,
        "accuracy": clustering_accuracy(labels, clusters),
        "nmi": mutual_information_score(labels, clusters),
        "clusters_used": len(np.unique(clusters)),
    }


def _intro(setup: Setup, settings: ClusteringSettings) -> list[str]:
    trainer = setup.config.section("trainer")
    length = f"{trainer.steps:,} steps" if trainer.steps else f"{trainer.epochs} epochs"
    return [
        f"{settings.clusters} clusters in {setup.dataset.name}; seeds {', '.join(map(str, settings.seeds))}. "
        f"A VAE is trained for {length}; the models with a mixture for a prior start from it, their mixture from EM on "
        f"its codes, and train for as long again.",
        f"The data: {setup.dataset.description}",
    ]


def _shown(records: list[Record]) -> Table:
    rows = []
    for method in dict.fromkeys(record["method"] for record in records):
        accuracy = np.array([r["accuracy"] for r in records if r["method"] == method]) * 100
        nmi = np.array([r["nmi"] for r in records if r["method"] == method])
        rows.append(
            {
                "method": TITLES[method],
                "accuracy, %": _spread(accuracy, 1),
                "lowest": f"{accuracy.min():.1f}",
                "highest": f"{accuracy.max():.1f}",
                "NMI": _spread(nmi, 3),
            }
        )
    return Table.from_records(rows)


def _spread(values: np.ndarray, digits: int) -> str:
    spread = f"\u202f±\u202f{values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def _draw(records: list[Record], folder: Path) -> Figure:
    methods = list(dict.fromkeys(record["method"] for record in records))
    height = 62 * len(methods)
    figure = sheet(WIDTH, height + 150)
    axes = panel(figure, 480, 110, WIDTH - 540, height, spines="bottom")
    for place, method in enumerate(methods):
        accuracy = np.array([r["accuracy"] for r in records if r["method"] == method]) * 100
        tint = BLUE if method in WORDS else MUTED
        axes.plot([accuracy.min(), accuracy.max()], [place, place], color=PALE_BLUE, linewidth=5, zorder=0)
        axes.plot(accuracy, np.full(len(accuracy), place), "o", color=tint, markersize=5)
        axes.plot([accuracy.mean()] * 2, [place - 0.3, place + 0.3], color=RUST, linewidth=1.8)
    axes.set_yticks(range(len(methods)), [TITLES[method] for method in methods], color=INK, fontsize=11)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axis_labels(axes, "held-out data in the cluster of their class, %")
    path = folder / "figures" / "accuracy.png"
    save(figure, path)
    caption = "One dot for each seed, a red line at the mean, a pale bar from the lowest to the highest."
    return Figure("accuracy", "Accuracy over seeds", caption, path)


def _draw_clusters(setup: Setup, best: Record, folder: Path) -> list[Figure]:
    """One row for each component: its centre decoded, then held-out data in it; no picture for tables."""
    if len(setup.dataset.shape) != 3:
        return []
    x, labels = _labelled(setup)
    model: Any = setup.model
    top = (setup.dataset.observed_levels or 2) - 1.0 if setup.representation == "levels" else 1.0
    with evaluating(model, setup.guide, seed=0), torch.no_grad():
        clusters = clusters_of(model, setup.guide, x)
        centres = model.likelihood(model.prior.loc).mean.cpu().numpy()
    order = sorted(range(len(centres)), key=lambda c: (_commonest(labels[clusters == c]), c))
    rows = []
    for c in order:
        inside = x.cpu().numpy()[clusters == c][:13]
        blank = np.zeros((13 - len(inside), *setup.dataset.shape))
        rows.append(np.concatenate([centres[c : c + 1], inside, blank]))
    tiles = colour(np.stack(rows), (0.0, top), ground_is_low(x.cpu().numpy(), (0.0, top)))
    axes = print_images([mosaic(tiles)])[0]
    axes.axvline(axes.get_xlim()[1] / 14, color=RUST, linewidth=1.4)
    path = folder / "figures" / "clusters.png"
    save(axes.get_figure(root=True), path)  # type: ignore[arg-type]
    caption = (
        f"{TITLES[best['method']]}, seed {best['seed']}, the run with the highest accuracy "
        f"({100 * best['accuracy']:.1f} %). Left of the line: the centre of each component, decoded. Right of it: "
        "held-out data that the model puts "
        "there, as they come."
    )
    return [Figure("clusters", "Components and their data", caption, path)]


def _commonest(labels: Labels) -> int:
    return int(np.bincount(labels).argmax()) if len(labels) else 99
