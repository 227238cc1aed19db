"""Anybody's data: a ``.npz`` or ``.npy`` file by path."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from inference.data import SPLITS, DataError, Dataset, check_choice, representation_for
from inference.files import READ_ERRORS, find_root, missing, read_npz
from inference.rows import BINARIZATIONS, binary, grey, real

ACCEPTED = (
    "a .npz file with the arrays train, valid and test or with one array x, or a .npy file with one array; "
    "rows (N, D), (N, H, W) or (N, C, H, W); uint8 or bool for bits and grey levels, float16, float32 or float64 for "
    "real numbers, all finite"
)
LARGEST = 1e15  # in single precision a square ends at 3e38
SUPPORTS = {"bernoulli": "binary", "categorical": "levels", "logistic": "levels", "pixelcnn": "levels"}
OWN = "own"  # stated for a model that has a likelihood of its own, which is checked once the model is there
CHUNK = 1 << 22  # values looked at together when a file larger than memory is checked


def file(
    path: str = "",
    likelihood: str = "",
    binarization: str = "none",
    levels: int = 256,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    root: str | None = None,
) -> Dataset:
    """Your own .npz or .npy file, with the likelihood that you state.

    One array is split in the order of the file: training rows first, validation next, test rows last, so shuffle it
    before if its order means something. The rows of a ``.npy`` file stay in the file until they are needed.

    Args:
        path: of the file; a relative one is looked for in the working directory, then in ``root``.
        likelihood: name of the likelihood; ``bernoulli`` needs bits or binarization, ``logistic`` and ``categorical``
            grey levels, a Gaussian one real numbers or greys, which it sees dequantized.
        binarization: of grey levels: ``dynamic``, ``static`` or ``none``.
        levels: number of grey levels.
        valid_fraction: of the rows, for validation, where the file has one array.
        test_fraction: of the rows, for the test, where the file has one array.
        root: folder with the data files.

    Raises:
        DataError: for a missing or broken file, or rows that do not fit the likelihood.
    """
    if not path or not likelihood:
        raise DataError("data=file needs data.path=FILE and likelihood=NAME, stated because a file does not tell it")
    check_choice("data.binarization", binarization, BINARIZATIONS)
    place = _find(path, root)
    arrays = _read(place)
    if "x" in arrays:
        whole = _images(arrays["x"], f"{place}: x")
        sizes = _sizes(len(whole), valid_fraction, test_fraction)
        rows = _cut(whole, sizes)
        labels = _cut(_labels(arrays["labels"], arrays["x"], place), sizes) if "labels" in arrays else {}
    else:
        rows = {split: _images(arrays[split], f"{place}: {split}") for split in SPLITS}
        labelled = [split for split in SPLITS if f"{split}_labels" in arrays]
        labels = {split: _labels(arrays[f"{split}_labels"], arrays[split], place) for split in labelled}
    data = _dataset(place, rows, labels, levels, binarization, "learned_gaussian" if likelihood == OWN else likelihood)
    supports = SUPPORTS.get(likelihood, "real" if likelihood.endswith("gaussian") else None)
    if supports is not None:  # a likelihood of somebody else's is checked when it is built
        representation_for(data, supports)
    return data


def _find(path: str, root: str | None) -> Path:
    place = Path(path)
    if not place.is_absolute() and not place.exists() and (find_root(root) / place).exists():
        place = find_root(root) / place
    if place.suffix not in (".npz", ".npy"):
        raise DataError(f"{place} is neither .npz nor .npy; accepted: {ACCEPTED}")
    if not place.is_file():
        raise missing("file", place, f"Accepted: {ACCEPTED}.")
    return place


def _read(place: Path) -> dict[str, np.ndarray]:
    if place.suffix == ".npz":
        arrays = read_npz(place)
    else:
        try:
            arrays = {"x": np.load(place, mmap_mode="r", allow_pickle=False)}
        except READ_ERRORS as error:
            raise DataError(f"{place} cannot be read ({error}); accepted: {ACCEPTED}") from error
    if not ("x" in arrays) ^ ({*SPLITS} <= set(arrays)):
        raise DataError(f"{place} has the arrays {', '.join(arrays) or 'none'}; accepted: {ACCEPTED}")
    if any(values.ndim == 0 for key, values in arrays.items() if key in ("x", *SPLITS)):
        raise DataError(f"{place} holds a single number; accepted: {ACCEPTED}")
    return arrays


def _labels(labels: np.ndarray, rows: np.ndarray, place: Path) -> np.ndarray:
    if labels.shape != rows.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{place}: labels are {labels.dtype} {labels.shape}; accepted: {len(rows)} integers, one a row")
    return labels


def _images(rows: np.ndarray, what: str) -> np.ndarray:
    """Rows with the axes (N, D) or (N, C, H, W), checked; a memory map stays one."""
    good = rows.dtype in (np.bool_, np.uint8, np.float16, np.float32, np.float64)
    if not good or rows.ndim not in (2, 3, 4) or rows.size == 0:
        raise DataError(f"{what} is {rows.dtype} {rows.shape}; accepted: {ACCEPTED}")
    if rows.ndim == 4 and rows.shape[3] in (1, 3, 4) and rows.shape[1] not in (1, 3, 4):
        raise DataError(f"{what} has shape {rows.shape}; accepted: (N, C, H, W), as x.transpose(0, 3, 1, 2) gives it")
    if rows.dtype.kind == "f" and not all(np.isfinite(part).all() for part in _chunks(rows)):
        raise DataError(f"{what} has values that are not finite; accepted: {ACCEPTED}")
    if rows.dtype in ("f4", "f8") and any((np.abs(part) > LARGEST).any() for part in _chunks(rows)):
        raise DataError(f"{what} has values beyond {LARGEST:g}, too large for a density; standardize them")
    if rows.dtype == np.bool_:
        rows = rows.view(np.uint8)
    return rows[:, None] if rows.ndim == 3 else rows  # (N, H, W) -> (N, 1, H, W)


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    step = max(1, CHUNK * len(rows) // rows.size)
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _sizes(count: int, valid_fraction: float, test_fraction: float) -> tuple[int, int]:
    valid, test = int(count * valid_fraction), int(count * test_fraction)
    if min(valid, test, count - valid - test) < 1:
        raise DataError(
            f"{count} rows with data.valid_fraction={valid_fraction} and data.test_fraction={test_fraction} leave a "
            "split empty; accepted: fractions that give each of the three splits a row"
        )
    return valid, test


def _cut(rows: np.ndarray, sizes: tuple[int, int]) -> dict[str, np.ndarray]:
    """The three splits in file order, the last two of the given sizes."""
    ends = [0, len(rows) - sum(sizes), len(rows) - sizes[1], len(rows)]
    return {split: _part(rows, *bounds) for split, bounds in zip(SPLITS, pairwise(ends), strict=True)}


def _part(rows: np.ndarray, start: int, end: int) -> np.ndarray:
    if not isinstance(rows, np.memmap) or not rows.flags.c_contiguous:
        return np.asarray(rows[start:end])
    # A slice of a memory map forgets where in the file it begins; a map of its own can be opened again elsewhere.
    offset = rows.offset + start * rows.strides[0]
    return np.memmap(str(rows.filename), rows.dtype, "r", offset, (end - start, *rows.shape[1:]))


def _dataset(
    place: Path,
    rows: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    levels: int,
    binarization: str,
    likelihood: str,
) -> Dataset:
    if len({(values.dtype.kind, values.shape[1:]) for values in rows.values()}) > 1:
        raise DataError(f"{place}: the splits differ in shape or type; accepted: {ACCEPTED}")
    if rows["train"].dtype.kind == "f":
        if binarization != "none":
            raise DataError(
                f"{place}: real numbers are not binarized; accepted: data.binarization=none, or uint8 greys"
            )
        return real("file", rows, str(place), labels, likelihood)
    top = max(int(part.max()) for values in rows.values() for part in _chunks(values))
    if top >= levels or not 2 <= levels <= 256:
        raise DataError(f"{place}: values up to {top} with data.levels={levels}; accepted: 2 to 256, all values below")
    if top <= 1:
        return binary("file", rows, str(place), labels, how="bits as stored", likelihood=likelihood)
    return grey("file", rows, levels, binarization, str(place), labels, likelihood)
