"""Lines of text as data: one line is one observation, a row of tokens."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from inference import bpe
from inference.data import SPLITS, DataError, Dataset, check_choice
from inference.files import READ_ERRORS, find_root, missing
from inference.rows import SHUFFLED, in_memory, shuffled, size_words

TOKENS = ("characters", "bpe")
ORDERS = ("file", "shuffled")
END_OF_LINE = "\n"  # token 0


def shakespeare(
    root: str | None = None,
    tokens: str = "characters",
    length: int = 48,
    vocabulary: int = 512,
    order: str = "file",
) -> Dataset:
    """Lines of Shakespeare's plays, as characters or byte pairs (Karpathy's Tiny Shakespeare).

    Karpathy 2015, 40,000 lines. No official split: the first 90 % of the lines that are not empty train, the next 5 %
    validate, the last 5 % test.

    Args:
        root: folder with the data files.
        tokens: ``characters``, or ``bpe`` for byte pairs learnt from the training lines.
        length: tokens of a line; longer ones are cut there.
        vocabulary: number of tokens for ``bpe``, the characters among them.
        order: in which the lines are split: ``file``, so that the test is on other plays, or ``shuffled`` once, so that
            training and test lines are draws of one distribution.
    """
    name = "tinyshakespeare.txt.gz"
    path = find_root(root) / name
    if not path.is_file() and not path.with_suffix("").is_file():
        remedy = (
            "Download https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt and "
            f"save it as {name.removesuffix('.gz')}, or compressed under this name."
        )
        raise missing("shakespeare", path, remedy)
    found = path if path.is_file() else path.with_suffix("")
    return _dataset("shakespeare", _read(found), (0.05, 0.05), tokens, length, vocabulary, order, "Tiny Shakespeare")


def lines(
    path: str = "",
    tokens: str = "characters",
    length: int = 48,
    vocabulary: int = 512,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    order: str = "file",
    root: str | None = None,
) -> Dataset:
    """Your own text file, one line an observation.

    Training lines come first, validation next, test last.

    Args:
        path: of the file, compressed if its name ends in ``.gz``; a relative one is looked for in the working
            directory, then in ``root``.
        tokens: ``characters``, or ``bpe`` for byte pairs learnt from the training lines.
        length: tokens of a line; longer ones are cut there.
        vocabulary: number of tokens for ``bpe``, the characters among them.
        valid_fraction: of the lines, for validation.
        test_fraction: of the lines, for the test.
        order: in which the lines are split: that of the ``file``, or ``shuffled`` once.
        root: folder with the data files.
    """
    if not path:
        raise DataError("data=lines needs data.path=FILE, a text file")
    found = next((place for place in (Path(path), find_root(root) / path) if place.is_file()), None)
    if found is None:
        raise DataError(f"data.path={path}: there is no such file; accepted: a text file in UTF-8")
    fractions = valid_fraction, test_fraction
    if not (min(fractions) > 0 and sum(fractions) < 1):
        raise DataError(f"data.valid_fraction and data.test_fraction must be above 0 and below 1 in sum: {fractions}")
    return _dataset("lines", _read(found), fractions, tokens, length, vocabulary, order, found.name)


def written(row: np.ndarray, vocabulary: Sequence[str]) -> str:
    """A row of tokens as text, up to its end."""
    text = ""
    for token in row.astype(int):
        if token == 0:
            break
        text += vocabulary[token]
    return text


def _read(path: Path) -> list[str]:
    """The lines that are not empty."""
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except READ_ERRORS as error:
        raise DataError(f"{path} cannot be read ({error}); accepted: text in UTF-8, plain or as .gz") from error
    return [line for line in text.splitlines() if line]


def _dataset(
    name: str,
    found: list[str],
    fractions: tuple[float, float],
    tokens: str,
    length: int,
    size: int,
    order: str,
    source: str,
) -> Dataset:
    check_choice("data.tokens", tokens, TOKENS)
    check_choice("data.order", order, ORDERS)
    if length < 1:
        raise DataError(f"data.length={length} leaves nothing of a line; accepted: 1 or more")
    parts = _split(found if order == "file" else [found[place] for place in shuffled(len(found))], fractions)
    alphabet = sorted({character for line in found for character in line})
    if tokens == "bpe" and size <= len(alphabet):
        raise DataError(f"data.vocabulary={size} is no more than the {len(alphabet)} characters and the end of a line")
    merges = bpe.learn(parts["train"], size - 1) if tokens == "bpe" else []
    vocabulary = (END_OF_LINE, *bpe.vocabulary(alphabet, merges))
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    known: dict[str, list[str]] = {}
    places = {token: place for place, token in enumerate(vocabulary)}
    rows, cut = {}, 0
    for split, some in parts.items():
        encoded = [[places[token] for token in bpe.encode(line, ranks, known)] for line in some]
        cut += sum(len(line) > length for line in encoded)
        rows[split] = _padded(encoded, length)
    kind = "characters" if tokens == "characters" else "byte pairs learnt from the training lines"
    how = (
        f"{len(vocabulary)} tokens, the end of a line and {kind}; lines of more than {length} tokens are cut there "
        f"({cut:,} of {len(found):,})"
    )
    how_split = "split in order" if order == "file" else f"lines {SHUFFLED} and split"
    return Dataset(
        name=name,
        kind="tokens",
        shape=(length,),
        levels=len(vocabulary),
        binarization="none",
        splits=in_memory(rows),
        labels={},
        description=f"{source}, {how_split}; {size_words(rows)}; {how}.",
        default_likelihood="lstm",
        vocabulary=vocabulary,
    )


def _split(found: list[str], fractions: tuple[float, float]) -> dict[str, list[str]]:
    valid, test = (round(len(found) * fraction) for fraction in fractions)
    train = len(found) - valid - test
    if min(train, valid, test) < 1:
        raise DataError(f"{len(found)} lines that are not empty do not make three splits; accepted: more of them")
    ends = train, train + valid
    return dict(zip(SPLITS, (found[: ends[0]], found[ends[0] : ends[1]], found[ends[1] :]), strict=True))


def _padded(encoded: list[list[int]], length: int) -> np.ndarray:
    """Rows ``(N, length)``, ended and filled by zeros."""
    rows = np.zeros((len(encoded), length), dtype=np.int16)
    for row, line in zip(rows, encoded, strict=True):
        row[: len(line)] = line[:length]
    return rows
