"""From raw arrays to a data set: fixed shuffles, fixed bits, and the sentences that reports print."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from inference.data import SPLITS, DataError, Dataset, check_choice
from inference.streaming import Rows, gather

BINARIZATIONS = ("dynamic", "static", "none")
SHUFFLE_SEED = 0  # of every split that is shuffled
SHUFFLED = f"shuffled once (seed {SHUFFLE_SEED})"
STATIC_SEED = 0  # of every static binarization that nobody published


def fixed_random(seed: int) -> np.random.RandomState:
    """A stream of numbers that is the same in every version of NumPy; its newer generators do not promise that."""
    return np.random.RandomState(seed)


def shuffled(count: int) -> np.ndarray:
    """Places of ``count`` rows in one fixed random order."""
    return fixed_random(SHUFFLE_SEED).permutation(count)


def shuffled_splits(count: int, sizes: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Places of train, validation and test rows: the first, next and last ``sizes`` of one fixed permutation."""
    return dict(zip(SPLITS, np.split(shuffled(count), [sizes[0], sizes[0] + sizes[1]]), strict=True))


def label_tensors(labels: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Labels (N,) of each split as int64."""
    return {split: torch.from_numpy(np.asarray(values, dtype=np.int64)) for split, values in labels.items()}


def draw_bits(rows: np.ndarray, levels: int, random: np.random.RandomState) -> np.ndarray:
    """One bit for each grey value v, 1 with probability v/(levels - 1)."""
    return (random.randint(levels - 1, size=rows.shape, dtype=np.uint8) < rows).astype(np.uint8)


def size_words(splits: Mapping[str, Rows | np.ndarray]) -> str:
    """Split sizes in words."""
    train, valid, test = (f"{len(splits[split]):,}" for split in SPLITS)
    return f"{train} training, {valid} validation and {test} test rows"


def in_memory(splits: Mapping[str, np.ndarray | np.memmap]) -> dict[str, Rows]:
    """Arrays as tensors; memory maps as they are."""
    return {
        split: rows if isinstance(rows, np.memmap) else torch.from_numpy(np.require(rows, requirements=["C", "W"]))
        for split, rows in splits.items()
    }


def grey(
    name: str,
    splits: Mapping[str, np.ndarray | np.memmap],
    levels: int,
    binarization: str,
    source: str,
    labels: Mapping[str, np.ndarray] | None = None,
    likelihood: str = "",
) -> Dataset:
    """Grey levels (N, *shape) uint8, binarized as asked.

    Dynamic binarization (Salakhutdinov and Murray 2008) leaves the greys as probabilities. Static binarization is one
    draw for all splits from a stated seed.
    """
    check_choice("data.binarization", binarization, BINARIZATIONS)
    if binarization == "static":
        random = fixed_random(STATIC_SEED)
        bits = {split: draw_bits(splits[split], levels, random) for split in SPLITS}
        how = f"binarized statically (each pixel 1 with probability grey/{levels - 1}, drawn once, seed {STATIC_SEED})"
        return binary(name, bits, source, labels, "static", how, likelihood or "bernoulli")
    if binarization == "dynamic":
        how = (
            f"binarized dynamically (each pixel 1 with probability grey/{levels - 1}, drawn afresh for training and "
            "once for evaluation)"
        )
    else:
        how = f"{levels} grey levels, not binarized"
    return Dataset(
        name=name,
        kind="grey",
        shape=tuple(splits["train"].shape[1:]),
        levels=levels,
        binarization=binarization,
        splits=in_memory(splits),
        labels=label_tensors(labels or {}),
        description=f"{source}; {size_words(splits)}; {how}.",
        default_likelihood=likelihood or ("bernoulli" if binarization == "dynamic" else _grey_likelihood(levels)),
    )


def _grey_likelihood(levels: int) -> str:
    # A free mass for each of few levels; many levels need one whose neighbours share mass.
    return "categorical" if levels < 32 else "logistic"


def binary(
    name: str,
    splits: Mapping[str, np.ndarray | np.memmap],
    source: str,
    labels: Mapping[str, np.ndarray] | None = None,
    binarization: str = "none",
    how: str = "binary as published",
    likelihood: str = "bernoulli",
) -> Dataset:
    """Bits (N, *shape) uint8."""
    return Dataset(
        name=name,
        kind="binary",
        shape=tuple(splits["train"].shape[1:]),
        levels=2,
        binarization=binarization,
        splits=in_memory(splits),
        labels=label_tensors(labels or {}),
        description=f"{source}; {size_words(splits)}; {how}.",
        default_likelihood=likelihood,
    )


def real(
    name: str,
    splits: Mapping[str, np.ndarray | np.memmap],
    source: str,
    labels: Mapping[str, np.ndarray] | None = None,
    likelihood: str = "learned_gaussian",
) -> Dataset:
    """Real numbers (N, *shape), any float type."""
    return Dataset(
        name=name,
        kind="real",
        shape=tuple(splits["train"].shape[1:]),
        levels=None,
        binarization="none",
        splits=in_memory(splits),
        labels=label_tensors(labels or {}),
        description=f"{source}; {size_words(splits)}; real numbers.",
        default_likelihood=likelihood,
    )


def with_label_rows(
    splits: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], top: int
) -> tuple[dict[str, np.ndarray], str]:
    """Images (N, C, H, W) with their labels below them, and words for that.

    A label is one-hot in the pixels below, counted row by row, at the highest grey level, which every binarization
    leaves as it is.
    """
    classes = 1 + max(int(values.max()) for values in labels.values())
    _, channels, _, width = splits["train"].shape
    height = -(-classes // width)
    below = np.zeros((classes, height * width), dtype=np.uint8)
    below[np.arange(classes), np.arange(classes)] = top
    strips = below.reshape(classes, 1, height, width).repeat(channels, axis=1)  # (classes, C, rows, W)
    rows = {split: np.concatenate([images, strips[labels[split]]], axis=2) for split, images in splits.items()}
    return rows, f" with the label below, one-hot, in {height} rows of pixels"


def standardized(splits: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
    """Columns (N, D) with mean 0 and standard deviation 1 in the training rows, and the numbers that were used.

    The training rows' mean and standard deviation (divisor n - 1) are used for all splits.
    """
    mean, scale = splits["train"].mean(0), splits["train"].std(0, ddof=1)
    if not (scale > 0).all():
        raise DataError("a column of the training rows is constant and cannot be standardized")
    numbers = f"means {_numbers(mean)}, standard deviations {_numbers(scale)}"
    return {split: (rows - mean) / scale for split, rows in splits.items()}, numbers


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def limited(dataset: Dataset, count: int) -> Dataset:
    """The same with ``count`` training rows, chosen at random, always the same ones; with all of them for 0.

    Raises:
        DataError: there are not so many.
    """
    have = len(dataset.splits["train"])
    if count > have:
        raise DataError(
            f"data.limit={count}: {dataset.name} has {have:,} training rows; accepted: up to that, 0 for all"
        )
    if not count:
        return dataset
    index = torch.randperm(have, generator=torch.Generator().manual_seed(0))[:count].sort().values
    splits = {**dataset.splits, "train": gather(dataset.splits["train"], index)}
    labels = {split: some[index] if split == "train" else some for split, some in dataset.labels.items()}
    description = f"{dataset.description} Of the training rows {count:,} were used, chosen at random."
    return replace(dataset, splits=splits, labels=labels, description=description)
