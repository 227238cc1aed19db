"""Data sets of fewer numbers: projections on principal components."""

import torch
from torch import Tensor

from inference.data import Dataset
from inference.streaming import gather


def principal(dataset: Dataset, dimensions: int) -> Dataset:
    """The first principal components of each datum, on one scale, so that their variances add up to their number.

    Components and scale are those of the training rows; grey levels are taken as fractions of the highest.

    Args:
        dataset: images or tables.
        dimensions: how many components; no more than a datum has numbers.

    Raises:
        ValueError: more than that.
    """
    rows = {split: _flat(dataset, split) for split in dataset.splits}
    size = rows["train"].shape[1]
    if not 1 <= dimensions <= size:
        raise ValueError(f"accepted: 1 to {size} principal components of data={dataset.name}, got {dimensions}")
    mean = rows["train"].mean(0)
    centred = rows["train"] - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    axes, variances = axes.flip(1)[:, :dimensions], variances.flip(0)[:dimensions]
    scale = variances.mean().sqrt()
    splits = {split: ((x - mean) @ axes / scale).float() for split, x in rows.items()}
    return Dataset(
        name=dataset.name,
        kind="real",
        shape=(dimensions,),
        levels=None,
        binarization="none",
        splits=splits,
        labels=dataset.labels,
        description=f"{dataset.description} Reduced to its first {dimensions} principal components, on one scale.",
        default_likelihood="learned_gaussian",
    )


def _flat(dataset: Dataset, split: str) -> Tensor:
    rows = gather(dataset.splits[split], slice(None)).double().flatten(1)
    return rows / ((dataset.levels or 2) - 1) if dataset.kind == "grey" else rows
