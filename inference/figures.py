"""Every picture of a run, drawn from arrays alone, so that the same arrays always give the same pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inference import canvas, data_figures, latent_figures, text_figures
from inference.data_figures import Picture
from inference.prior_figures import Density, code_usage, is_binary, prior_density
from inference.text import written


@dataclass(frozen=True)
class Gallery:
    """What the pictures are drawn from: floating-point arrays, held-out data unless said otherwise.

    Args:
        shape: of one datum, ``(C, H, W)`` for an image or ``(D,)`` for a row of a table.
        value_range: lowest and highest value of a pixel; ignored for tables.
        originals: data, ``(n, *shape)``.
        reconstructions: mean of p(x|z) for z ~ q(z|x), ``(n, *shape)``.
        samples: mean of p(x|z) for z ~ p(z), ``(m, *shape)``; for tables draws of x.
        latent_means: mean of q(z|x), ``(N, D)``, or ``None`` where there is no such thing.
        latent_draws: one z ~ q(z|x) for each datum, ``(N, D)``: the aggregated posterior.
        prior_draws: z ~ p(z), ``(M, D)``.
        labels: of the N data, ``(N,)``, or ``None``.
        kl_per_dimension: mean over the data, ``(D,)`` nats, or ``None`` where the KL does not split.
        components: of a mixture, the mean of p(x|z) for every state ``(K, *shape)``, and their shares ``(K,)``, or
            ``None``.
        manifold: mean of p(x|z) for z on :func:`inference.data_figures.latent_grid`, ``(g, g, *shape)``, or ``None``.
        latent_states: number of values of each latent whose draws are one-hot vectors laid side by side; 1 for others.
        prior_density: of a latent in the plane, over a window that holds the draws, or ``None``.
        drawn: whether images are draws of p(x|z), for want of a mean.
        vocabulary: what each token of a line is written as; empty for other data. Of lines, reconstructions are the
            likeliest tokens, one after the other.
        between: the same for codes between those of pairs of lines, ``(pairs, steps, T)``, or ``None``.
    """

    shape: tuple[int, ...]
    value_range: tuple[float, float]
    originals: np.ndarray
    reconstructions: np.ndarray
    samples: np.ndarray
    latent_means: np.ndarray | None
    latent_draws: np.ndarray
    prior_draws: np.ndarray
    labels: np.ndarray | None
    kl_per_dimension: np.ndarray | None
    manifold: np.ndarray | None
    latent_states: int = 1
    prior_density: Density | None = None
    drawn: bool = False
    vocabulary: tuple[str, ...] = ()
    between: np.ndarray | None = None
    components: tuple[np.ndarray, np.ndarray] | None = None

    def __post_init__(self) -> None:
        if len(self.shape) not in (1, 3):
            raise ValueError(f"a datum is an image (C, H, W) or a table row (D,), not of shape {tuple(self.shape)}")
        for name in ("originals", "reconstructions", "samples"):
            if tuple(getattr(self, name).shape[1:]) != tuple(self.shape) or not len(getattr(self, name)):
                raise ValueError(
                    f"{name} must be (n, {', '.join(map(str, self.shape))}) with n at least 1, "
                    f"not {getattr(self, name).shape}"
                )


@dataclass(frozen=True)
class Figure:
    """A picture on disk.

    Args:
        name: the file's stem, e.g. ``reconstructions``.
        title: a heading of a few words.
        caption: how to read the picture, one to three sentences of plain text.
        path: the PNG.
    """

    name: str
    title: str
    caption: str
    path: Path


def draw(
    gallery: Gallery, metrics: Sequence[dict[str, Any]], folder: Path, active_threshold: float | None = None
) -> list[Figure]:
    """Draw every picture that applies into ``folder/NAME.png``, in the order in which a reader wants them.

    Args:
        gallery: the arrays.
        metrics: rows of ``metrics.jsonl``: ``step`` and any of ``train/bound``, ``valid/elbo``,
            ``valid/reconstruction``, ``valid/kl``.
        folder: where the files go; made if missing.
        active_threshold: variance of a posterior mean over the data above which its dimension counts as active; the
            picture of the KL marks active dimensions only if it is given.
    """
    figures = []
    for name, picture in _pictures(gallery, metrics, active_threshold):
        path = Path(folder) / f"{name}.png"
        canvas.save(picture.sheet, path)
        figures.append(Figure(name, picture.title, picture.caption, path))
    return figures


def _pictures(
    gallery: Gallery, metrics: Sequence[dict[str, Any]], threshold: float | None
) -> Iterator[tuple[str, Picture]]:
    curves = data_figures.training_curves(metrics)
    if curves is not None:
        yield "training_curves", curves
    if gallery.vocabulary:
        yield from _lines(gallery)
    else:
        yield from _images(gallery) if len(gallery.shape) == 3 else _table(gallery)
    if gallery.latent_means is not None and gallery.latent_means.shape[1] >= 2:
        yield "latent_scatter", latent_figures.latent_scatter(gallery.latent_means, gallery.labels)
    if gallery.prior_density is not None:
        yield "prior_density", prior_density(gallery.prior_density, gallery.prior_draws, gallery.latent_draws)
    kl = gallery.kl_per_dimension
    matching = kl if kl is not None and len(kl) == gallery.latent_draws.shape[1] else None
    if is_binary(gallery.latent_draws, gallery.prior_draws):
        usage = code_usage(gallery.latent_draws, gallery.prior_draws, gallery.latent_states)
        yield "aggregated_posterior", usage
    else:
        yield (
            "aggregated_posterior",
            latent_figures.aggregated_posterior(gallery.latent_draws, gallery.prior_draws, matching),
        )
    if kl is not None:
        active = None
        if threshold is not None and gallery.latent_means is not None and gallery.latent_means.shape[1] == len(kl):
            active = gallery.latent_means.var(axis=0) > threshold
        yield "kl_per_dimension", latent_figures.kl_bars(kl, active, threshold)


def _lines(gallery: Gallery) -> Iterator[tuple[str, Picture]]:
    def text(rows: np.ndarray) -> list[str]:
        return [written(row, gallery.vocabulary) for row in rows]

    yield "reconstructions", text_figures.line_reconstructions(text(gallery.originals), text(gallery.reconstructions))
    yield "samples", text_figures.line_samples(text(gallery.samples))
    if gallery.between is not None:
        yield "interpolations", text_figures.line_interpolations([text(rows) for rows in gallery.between])


def _images(gallery: Gallery) -> Iterator[tuple[str, Picture]]:
    look = gallery.value_range, canvas.ground_is_low(gallery.originals, gallery.value_range)
    yield (
        "reconstructions",
        data_figures.image_reconstructions(gallery.originals, gallery.reconstructions, *look, drawn=gallery.drawn),
    )
    yield "samples", data_figures.image_samples(gallery.samples, *look, drawn=gallery.drawn)
    if gallery.components is not None:
        yield "components", data_figures.image_components(*gallery.components, *look)
    if gallery.manifold is not None:
        yield "manifold", data_figures.image_manifold(gallery.manifold, *look, drawn=gallery.drawn)


def _table(gallery: Gallery) -> Iterator[tuple[str, Picture]]:
    yield "reconstructions", data_figures.table_reconstructions(gallery.originals, gallery.reconstructions)
    yield "samples", data_figures.table_samples(gallery.originals, gallery.samples)
    if gallery.manifold is not None and gallery.shape == (2,):
        yield "manifold", data_figures.table_manifold(gallery.manifold, gallery.originals)
