"""Data sets on the device: what the rows are, what a likelihood may see of them, and batches of it."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.failures import why_not
from inference.streaming import RESIDENT_FRACTION, Rows, fits, gather, stream

SPLITS = ("train", "valid", "test")
REPRESENTATIONS = ("binary", "levels", "real", "tokens")
KINDS = ("binary", "grey", "real", "tokens")
NOISE_BLOCK = 1024  # rows that share one seed in Source.fixed


class DataError(ValueError):
    """Data that cannot be used as asked; the message says what would be accepted."""


def check_choice(option: str, value: str, accepted: tuple[str, ...]) -> None:
    """Refuse a ``value`` of ``option`` that is not among the accepted ones."""
    if value not in accepted:
        raise DataError(f"{option}={value!r} is not known; accepted: {', '.join(accepted)}")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Raw rows by split, and what has to be known to turn them into observations.

    Attributes:
        name: the word it is chosen by.
        kind: what a raw number is: ``"binary"`` (a bit), ``"grey"`` (a level), ``"real"`` or ``"tokens"`` (a name).
        shape: of one datum, ``(C, H, W)`` for images, ``(D,)`` for table rows, ``(T,)`` for lines of tokens.
        levels: number of values of a raw number: 2 for bits, 17, say, for greys, V for tokens, ``None`` for reals.
        binarization: ``"dynamic"``, ``"static"`` or ``"none"``.
        splits: ``"train"``, ``"valid"``, ``"test"`` to rows ``(N, *shape)``: uint8 for bits and greys, else floats.
        labels: split to int64 labels ``(N,)``; empty where there are none.
        description: source, split sizes and binarization in words, for reports.
        default_likelihood: name of the likelihood that fits the observations.
        vocabulary: what each token is written as; empty for other data. Token 0 ends a line.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    levels: int | None
    binarization: str
    splits: Mapping[str, Rows]
    labels: Mapping[str, Tensor]
    description: str
    default_likelihood: str
    vocabulary: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        if set(self.splits) != set(SPLITS):
            raise DataError(f"{self.name}: splits {sorted(self.splits)} given; accepted: exactly {', '.join(SPLITS)}")
        for split, rows in self.splits.items():
            if len(rows) == 0 or tuple(rows.shape[1:]) != self.shape:
                expected = f"(N, {', '.join(map(str, self.shape))}) with N > 0"
                raise DataError(f"{self.name}: split {split} has shape {tuple(rows.shape)}; accepted: {expected}")

    @property
    def bits(self) -> bool:
        """Whether an observation is made of zeros and ones."""
        return self.kind == "binary" or self.binarization != "none"

    @property
    def observed_levels(self) -> int | None:
        """Number of values an observed number can take: 2 after binarization, whatever the grey levels were."""
        return 2 if self.bits else self.levels


def representation_for(dataset: Dataset, supports: str, levels: int | None = None, own: bool = False) -> str:
    """The representation in which a likelihood may see the data.

    Args:
        dataset: the data.
        supports: what the likelihood scores: ``"binary"`` (a mass function on 0 and 1), ``"levels"`` (a mass function
            on 0, ..., levels - 1), ``"real"`` (a density) or ``"tokens"`` (a mass function on lines).
        levels: number of levels the likelihood was built for, where it has any; checked when given.
        own: whether it is the model's own, so that a refusal names no other likelihood.

    Returns:
        ``supports``. Bits are allowed under ``"levels"``, since a two-level categorical is the Bernoulli, but then the
        likelihood has to be built for :attr:`Dataset.observed_levels` = 2.

    Raises:
        DataError: when the likelihood's number would not be a log-likelihood of these data.
    """
    check_choice("supports", supports, REPRESENTATIONS)
    reason = why_not(dataset, supports, own)
    if reason is None and supports in ("levels", "tokens") and levels not in (None, dataset.observed_levels):
        reason = (
            f"its numbers take {dataset.observed_levels} values and the likelihood was built for {levels}; "
            f"build it with levels={dataset.observed_levels}"
        )
    if reason is not None:
        raise DataError(f"data={dataset.name}: {reason}")
    return supports


class Source:
    """One split as observations on a device.

    A resident split lies on the device as it is stored (uint8 for images); only the rows of a batch become floats. One
    that is not resident stays in host memory or in its file, and its rows are copied as they are asked for.

    Args:
        dataset: the data.
        split: ``"train"``, ``"valid"`` or ``"test"``.
        representation: ``"binary"`` (0. and 1.), ``"levels"`` or ``"tokens"`` (0., ..., levels - 1.) or ``"real"``:
            greys uniformly dequantized, (v + u)/levels in [0, 1) with u ~ U[0, 1), so that the expected log-density
            minus log levels per number is a lower bound of the log-likelihood of the levels (Theis, van den Oord and
            Bethge 2016, section 3.1); real numbers as they are.
        device: where batches are.
        dtype: of batches; the default dtype when ``None``.
        seed: of the noise in :meth:`fixed`.
        resident: ``"yes"``, ``"no"``, or ``"auto"``: yes if the raw rows take at most half of the device's free memory.
        workers: processes that read ahead when the split is streamed; 0 reads in this one.

    Raises:
        DataError: for a representation that the data do not have, or an unknown word.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        representation: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        resident: str = "auto",
        workers: int = 1,
    ) -> None:
        check_choice("split", split, SPLITS)
        check_choice("data.resident", resident, ("auto", "yes", "no"))
        self.dataset, self.split, self.seed, self.workers = dataset, split, seed, workers
        self.representation = representation_for(dataset, representation)
        self.device = torch.device(device)
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self.rows: Rows = dataset.splits[split]
        self.resident = resident == "yes" or (resident == "auto" and fits(self.rows, self.device, RESIDENT_FRACTION))
        if self.resident:
            self.rows = gather(self.rows, slice(None)).to(self.device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def noise(self) -> str | None:
        """What is random in an observation: ``"bits"``, ``"dequantization"`` or ``None``."""
        if self.dataset.kind != "grey":
            return None
        if self.dataset.bits:
            return "bits"
        return "dequantization" if self.representation == "real" else None

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Observations ``(B, *shape)`` of the rows ``index`` (B,) int64; fresh noise from a generator on the device."""
        return self.observe(self.take(index), generator)

    def observe(self, rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Observations ``(B, *shape)`` of raw rows ``(B, *shape)`` that are on the device already."""
        return self._observe(rows, self._draw(rows.shape, generator, self.device))

    def fixed(self, index: Tensor | None = None) -> Tensor:
        """Observations whose noise is drawn once: the same on every call and device, for evaluation.

        A row's noise depends on the seed, the names of data set and split, and the row's place alone. Reads indices on
        the host, so it is no part of a training step.

        Args:
            index: rows (B,) int64, none negative; all rows when ``None``.
        """
        places = torch.arange(len(self)) if index is None else index.cpu()
        if self.noise is None:
            return self._observe(self.take(places), None)
        blocks = places // NOISE_BLOCK
        parts = [(blocks == block, self._block_noise(block)) for block in blocks.unique().tolist()]
        noise = torch.empty((len(places), *self.dataset.shape), dtype=parts[0][1].dtype)
        for here, drawn in parts:
            noise[here] = drawn[places[here] % NOISE_BLOCK]
        return self._observe(self.take(places), noise.to(self.device))

    def take(self, index: Tensor) -> Tensor:
        """Raw rows ``(B, *shape)`` on the device, as they are stored."""
        if self.resident:
            assert isinstance(self.rows, Tensor)
            return self.rows.index_select(0, index.to(self.device))
        return gather(self.rows, index.cpu()).to(self.device)

    def _block_noise(self, block: int) -> Tensor:
        """Noise of NOISE_BLOCK rows, drawn on the host so that every device sees the same."""
        words = f"{self.seed}/{self.dataset.name}/{self.split}/{block}"
        digest = hashlib.sha256(words.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        drawn = self._draw(torch.Size((NOISE_BLOCK, *self.dataset.shape)), generator, torch.device("cpu"))
        assert drawn is not None
        return drawn

    def _draw(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor | None:
        if self.noise == "bits":
            # u on {0, ..., levels - 2} makes P(u < v) = v/(levels - 1) exactly, and is cheaper than a float uniform.
            top = (self.dataset.levels or 2) - 1
            return torch.randint(top, shape, generator=generator, device=device, dtype=torch.uint8)
        if self.noise == "dequantization":
            return torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
        return None

    def _observe(self, rows: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            return rows.to(self.dtype)
        if self.noise == "bits":
            return noise.lt(rows).to(self.dtype)
        # In float32, 255 + u can round up to 256: stay below 1, where a density on [0, 1) is defined.
        below_one = 1 - torch.finfo(self.dtype).eps / 2
        return noise.to(self.dtype).add_(rows).div_(self.dataset.levels or 1).clamp_(max=below_one)


class Batches:
    """Shuffled batches of a source, epoch after epoch, without a host sync.

    ``iter(batches)`` yields the rest of the current epoch, ``(B, *shape)`` each; the next ``iter`` yields the next
    epoch. Order and noise come from one generator on the device, so a restored state continues with the very same
    numbers, and a streamed source gives the same batches as a resident one.

    Args:
        source: where the observations come from.
        batch_size: rows in a batch; the last of an epoch may have fewer.
        seed: of order and noise.
        drop_last: leave out the last batch if it is smaller.

    Attributes:
        epoch: number of epochs handed out completely.
        position: number of batches handed out of the current one.
    """

    def __init__(self, source: Source, batch_size: int, seed: int = 0, drop_last: bool = False) -> None:
        if batch_size < 1 or (drop_last and batch_size > len(source)):
            raise DataError(f"data.batch_size={batch_size} gives no batch; accepted: 1 to {len(source)}")
        self.source, self.batch_size, self.drop_last = source, batch_size, drop_last
        self.generator = torch.Generator(source.device).manual_seed(seed)
        self.epoch = 0
        self.position = 0
        self.permutation = self._shuffle()

    def __len__(self) -> int:
        """Batches in an epoch."""
        count = len(self.source)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for rows in self._rows():
            x = self.source.observe(rows, self.generator)
            self._advance()  # before the yield: a state taken while a batch is used counts it as handed out
            yield x

    def state_dict(self) -> dict[str, Tensor | int]:
        """Everything that the coming batches depend on; tensors on the host."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "batch_size": self.batch_size,
            "permutation": self.permutation.cpu().clone(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken, in the middle of an epoch too.

        Raises:
            DataError: if the state belongs to another batch size, number of rows or kind of device.
        """
        permutation, position, size = state["permutation"], int(state["position"]), int(state["batch_size"])
        if size != self.batch_size or len(permutation) != len(self.source) or not 0 <= position < len(self):
            raise DataError(
                f"the saved state has batch {position} of {len(permutation)} rows in batches of {size}; "
                f"accepted: {len(self.source)} rows in batches of {self.batch_size}"
            )
        try:
            self.generator.set_state(state["generator"].cpu())
        except (RuntimeError, TypeError) as error:
            kind = self.source.device.type
            raise DataError(f"the saved state's generator is not one of a {kind} device: {error}") from error
        self.permutation = permutation.to(self.source.device)
        self.position, self.epoch = position, int(state["epoch"])

    def _shuffle(self) -> Tensor:
        return torch.randperm(len(self.source), generator=self.generator, device=self.source.device)

    def _advance(self) -> None:
        self.position += 1
        if self.position == len(self):
            self.position, self.epoch = 0, self.epoch + 1
            self.permutation = self._shuffle()

    def _rows(self) -> Iterator[Tensor]:
        parts = self.permutation.split(self.batch_size)[self.position : len(self)]
        if self.source.resident:
            return (self.source.take(part) for part in parts)
        order = [part.cpu() for part in parts]
        return stream(self.source.rows, order, self.source.device, self.source.workers)
