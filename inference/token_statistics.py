"""What tokens know of each other, and what pictures made of them are good for."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.nets import MLP

GROUPS = 20  # of images, for the jackknife


class Information(NamedTuple):
    """Mutual information of neighbouring tokens, in nats, with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def adjacent_information(tokens: Tensor, codes: int, generator: torch.Generator | None = None) -> Information:
    """Mutual information of a token and its right-hand neighbour, averaged over places, in ``(N, H, W)``.

    Within each place, so that a difference between places does not count as one between neighbours. From relative
    frequencies, less what they give for neighbours out of different images, which are independent: both err upwards in
    small numbers, the second no less than the first, so that the difference errs low and an interval above zero is one.
    The interval is from a jackknife over groups of images.

    Args:
        tokens: ``(N, H, W)`` with W at least 2, or H at least 2, where the neighbour below is taken.
        codes: K.
        generator: of the shuffling.
    """
    if tokens.shape[2] < 2:
        tokens = tokens.transpose(1, 2)
    if tokens.shape[2] < 2 or len(tokens) < 2 * GROUPS:
        raise ValueError(f"neighbours need a grid of two places, and {2 * GROUPS} images, got {tuple(tokens.shape)}")
    left, right = tokens[:, :, :-1].flatten(1), tokens[:, :, 1:].flatten(1)  # (N, P) each
    strange = right[torch.randperm(len(tokens), generator=generator).to(tokens.device)]
    order = torch.randperm(len(tokens), generator=generator).to(tokens.device)
    keep = [torch.cat([*order.chunk(GROUPS)[:g], *order.chunk(GROUPS)[g + 1 :]]) for g in range(GROUPS)]
    value = _excess(left, right, strange, codes)
    parts = torch.tensor([_excess(left[rows], right[rows], strange[rows], codes) for rows in keep])
    error = math.sqrt((GROUPS - 1) / GROUPS * float((parts - parts.mean()).square().sum()))
    return Information(value, value - 1.96 * error, value + 1.96 * error)


def _excess(left: Tensor, right: Tensor, strange: Tensor, codes: int) -> float:
    return _information(left, right, codes) - _information(left, strange, codes)


def _information(left: Tensor, right: Tensor, codes: int) -> float:
    """I of the two columns' relative frequencies, nats, averaged over the P places of ``(N, P)``."""
    pairs = left * codes + right
    joint, first, second = (_entropies(values) for values in (pairs, left, right))
    return float((first + second - joint).mean())


def _entropies(values: Tensor) -> Tensor:
    """Of the relative frequencies in each column of ``(N, P)``: ``(P,)`` nats."""
    found = []
    for column in values.unbind(1):
        p = column.unique(return_counts=True)[1].double() / len(column)
        found.append(-(p * p.log()).sum())
    return torch.stack(found)


def classification_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int = 0, steps: int = 1000, width: int = 256
) -> float:
    """Accuracy on ``test`` of a classifier trained on ``train``: images ``(N, *shape)`` in [0, 1] and labels ``(N,)``.

    The classification accuracy score of generated data (Ravuri and Vinyals 2019) is this with generated images to train
    and real ones to test. One hidden layer, Adam, a learning rate that falls to zero, weight decay; the same for all.
    """
    images, labels = train
    classes = int(torch.cat([labels, test[1]]).max()) + 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = MLP(images.shape[1:], (classes,), hidden=(width,), activation="relu").to(images.device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(images), (128,), device=images.device)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        hits = [(net(x).argmax(-1) == y) for x, y in zip(test[0].split(1000), test[1].split(1000), strict=True)]
    return float(torch.cat(hits).double().mean())


def mean_squared_error(images: Sequence[Tensor], others: Sequence[Tensor], top: float) -> float:
    """Per number, of images whose numbers lie between 0 and ``top``, as a fraction of its square."""
    squares = [((a - b) / top).square().flatten(1).mean(1) for a, b in zip(images, others, strict=True)]
    return float(torch.cat(squares).double().mean())
