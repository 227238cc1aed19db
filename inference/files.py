"""Reading data files: every way in which one can be missing or broken ends in one message."""

import gzip
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from inference.data import DataError

READ_ERRORS = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


def find_root(root: str | None) -> Path:
    """The folder with the data files: ``root``, else the environment's LOWERBOUND_DATA, else ``data``."""
    return Path(root or os.environ.get("LOWERBOUND_DATA") or "data")


def missing(name: str, path: Path, remedy: str) -> DataError:
    """The error for a file that is not there: what to download and where to put it."""
    return DataError(
        f"data={name}: {path} is missing. {remedy} Put it there, or name the folder that has it with data.root or the "
        "environment variable LOWERBOUND_DATA."
    )


def read_npz(path: Path, *keys: str) -> dict[str, np.ndarray]:
    """Arrays of an ``.npz`` file: those asked for, or all; never a pickle.

    Raises:
        DataError: if the file is broken, is no ``.npz`` file, or lacks a key.
    """
    try:
        with zipfile.ZipFile(path) as members:
            found = [name.removesuffix(".npy") for name in members.namelist()]
        absent = [key for key in keys if key not in found]
        if absent:
            raise DataError(f"{path} has no array {', '.join(absent)}; it has {', '.join(found) or 'none'}")
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in keys or found}
    except DataError:
        raise
    except READ_ERRORS as error:
        raise DataError(
            f"{path} cannot be read ({error}); accepted: a complete NumPy .npz file of plain arrays, without pickles"
        ) from error


def unpack_bits(packed: np.ndarray, shape: tuple[int, int], what: str) -> np.ndarray:
    """Images (N, 1, H, W) of 0 and 1 from rows of H*W values, or from such rows packed eight to a byte."""
    pixels = shape[0] * shape[1]
    octets = -(-pixels // 8)
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] not in (pixels, octets):
        accepted = f"uint8 (N, {pixels}) of 0 and 1, or packed (N, {octets})"
        raise DataError(f"{what} is {packed.dtype} {packed.shape}; accepted: {accepted}")
    bits = packed if packed.shape[1] == pixels else np.unpackbits(packed, axis=1)[:, :pixels]
    if bits.size and bits.max() > 1:
        raise DataError(f"{what} has values up to {bits.max()}; accepted: 0 and 1")
    return bits.reshape(-1, 1, *shape)  # (N, H*W) -> (N, 1, H, W)


def read_bit_text(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Images (N, 1, H, W) from text: the digits 0 and 1 separated by blanks, one image a line (``.amat``)."""
    digits = np.frombuffer(path.read_bytes().translate(None, b" \t\r\n"), dtype=np.uint8) - ord("0")
    pixels = shape[0] * shape[1]
    if digits.size == 0 or digits.size % pixels or digits.max() > 1:
        raise DataError(f"{path} is not complete; accepted: lines of {pixels} digits, each 0 or 1")
    return digits.reshape(-1, 1, *shape)  # (N*H*W,) -> (N, 1, H, W)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An array of uint8 with ``dimensions`` axes from an IDX file, gzip-compressed if its name ends in ``.gz``.

    The format is LeCun's: two zero bytes, the type (8 for uint8), the number of axes, their lengths as big-endian
    32-bit integers, and the values.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except READ_ERRORS as error:
        raise DataError(f"{path} cannot be read ({error}); delete it and download it again") from error
    head = 4 + 4 * dimensions
    lengths = np.frombuffer(content[4:head], dtype=">u4") if len(content) >= head else np.array([])
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) != head + lengths.prod(dtype=np.int64):
        raise DataError(
            f"{path} is no complete IDX file of uint8 with {dimensions} axes; delete it and download it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=head).reshape([int(length) for length in lengths])
