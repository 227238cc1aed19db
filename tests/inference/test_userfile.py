"""Anybody's file: what is accepted, and one message for everything else."""

import numpy as np
import pytest
import torch

from inference.data import SPLITS, Batches, DataError, Source
from inference.datasets import file

RANDOM = np.random.default_rng(0)
GREYS = RANDOM.integers(0, 256, (50, 6, 5), dtype=np.uint8)
REALS = RANDOM.normal(size=(50, 3))


def saved(folder, **arrays):
    np.savez(folder / "x.npz", **arrays)
    return str(folder / "x.npz")


def test_one_array_is_split_in_file_order(tmp_path):
    path = saved(tmp_path, x=REALS, labels=np.arange(50))
    data = file(path=path, likelihood="learned_gaussian", valid_fraction=0.2)
    assert [len(data.splits[split]) for split in SPLITS] == [35, 10, 5]
    assert np.array_equal(torch.cat([data.splits[split] for split in SPLITS]).numpy(), REALS)
    assert data.labels["test"].tolist() == [45, 46, 47, 48, 49]
    assert (data.kind, data.shape, data.default_likelihood) == ("real", (3,), "learned_gaussian")
    assert "35 training, 10 validation and 5 test" in data.description


def test_three_arrays_are_the_splits(tmp_path):
    path = saved(tmp_path, train=GREYS, valid=GREYS[:4], test=GREYS[4:9], test_labels=np.arange(5), other=np.ones(2))
    data = file(path=path, likelihood="logistic")
    assert (data.kind, data.shape, data.levels) == ("grey", (1, 6, 5), 256)
    assert np.array_equal(data.splits["test"][:, 0].numpy(), GREYS[4:9])
    assert list(data.labels) == ["test"]


@pytest.mark.parametrize(
    ("rows", "options", "kind", "representation"),
    [
        (GREYS, {"likelihood": "bernoulli", "binarization": "dynamic"}, "grey", "binary"),
        (GREYS, {"likelihood": "bernoulli", "binarization": "static"}, "binary", "binary"),
        (GREYS % 4, {"likelihood": "categorical", "levels": 4}, "grey", "levels"),
        (GREYS, {"likelihood": "learned_gaussian"}, "grey", "real"),
        (GREYS % 2, {"likelihood": "bernoulli"}, "binary", "binary"),
        (GREYS > 99, {"likelihood": "bernoulli"}, "binary", "binary"),
        (REALS.astype(np.float16), {"likelihood": "my.package.StudentT"}, "real", "real"),
        (RANDOM.random((50, 3, 4, 4)), {"likelihood": "fixed_gaussian"}, "real", "real"),
    ],
)
@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_files_become_observations(tmp_path, suffix, rows, options, kind, representation):
    path = saved(tmp_path, x=rows)
    if suffix == "npy":
        path = str(tmp_path / "x.npy")
        np.save(path, rows)
    data = file(path=path, **options)
    x = next(iter(Batches(Source(data, "train", representation, workers=0), 8)))
    assert data.kind == kind
    assert x.shape == (8, *data.shape)
    assert x.dtype == torch.float64
    assert data.default_likelihood == options["likelihood"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", SPLITS)
def test_npy_rows_stay_in_the_file_and_stream(tmp_path, split, workers):
    path = tmp_path / "x.npy"
    np.save(path, GREYS)
    data = file(path=str(path), likelihood="categorical")
    assert isinstance(data.splits[split], np.memmap)
    streamed, resident = (
        Batches(Source(data, split, "levels", resident=resident, workers=workers), 3, seed=1)
        for resident in ("no", "yes")
    )
    assert torch.equal(torch.cat(list(streamed)), torch.cat(list(resident)))
    expected = dict(zip(SPLITS, (GREYS[:40], GREYS[40:45], GREYS[45:]), strict=True))[split]
    assert np.array_equal(Source(data, split, "levels", resident="no").fixed()[:, 0].numpy(), expected)


def test_fortran_order_and_relative_paths(tmp_path):
    np.save(tmp_path / "x.npy", np.asfortranarray(REALS))
    data = file(path="x.npy", likelihood="learned_gaussian", root=str(tmp_path))
    assert np.array_equal(data.splits["train"].numpy(), REALS[:40])


def not_a_number(rows):
    rows = rows.copy()
    rows[7, 1] = np.nan
    return rows


@pytest.mark.parametrize(
    ("arrays", "options", "words"),
    [
        ({"y": REALS}, {}, "has the arrays y; accepted"),
        ({"train": REALS, "test": REALS}, {}, "has the arrays train, test; accepted"),
        ({"x": REALS, "train": REALS, "valid": REALS, "test": REALS}, {}, "accepted"),
        ({}, {}, "has the arrays none; accepted"),
        ({"x": REALS.astype(complex)}, {}, "complex128"),
        ({"x": REALS.astype(np.int64)}, {}, "int64"),
        ({"x": np.array(["a", "b"])}, {}, "accepted"),
        ({"x": np.array([object()])}, {}, "without pickles"),
        ({"x": np.zeros((0, 3))}, {}, "accepted"),
        ({"x": np.array(1.0)}, {}, "single number"),
        ({"x": np.zeros(9)}, {}, "accepted: a .npz"),
        ({"x": np.zeros((9, 8, 8, 3))}, {}, "transpose"),
        ({"x": np.zeros((2, 4))}, {}, "leave a split empty"),
        ({"x": not_a_number(REALS)}, {}, "not finite"),
        ({"x": REALS, "labels": np.zeros(3, dtype=int)}, {}, "50 integers"),
        ({"train": REALS, "valid": REALS, "test": GREYS}, {}, "differ"),
        ({"x": GREYS}, {"likelihood": "bernoulli"}, "not normalized"),
        ({"x": GREYS % 2}, {}, "no upper bound"),
        ({"x": GREYS}, {"levels": 17, "likelihood": "categorical"}, "values up to 255"),
        ({"x": REALS}, {"likelihood": "logistic"}, "numbers are real"),
        ({"x": REALS}, {"binarization": "dynamic"}, "real numbers are not binarized"),
        ({"x": REALS}, {"binarization": "sometimes"}, "accepted: dynamic, static, none"),
        ({"x": REALS}, {"likelihood": ""}, "likelihood=NAME"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, arrays, options, words):
    path = saved(tmp_path, **arrays)
    with pytest.raises(DataError, match=words):
        file(**{"path": path, "likelihood": "learned_gaussian", **options})


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.png"])
@pytest.mark.parametrize("content", [b"", b"hello, I am no array", None])
def test_broken_missing_and_foreign_files_are_refused(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"[Aa]ccepted"):
        file(path=str(path), likelihood="learned_gaussian")


@pytest.mark.parametrize("name", ["x.npz", "x.npy"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, name, keep):
    path = tmp_path / name
    np.savez_compressed(path, x=REALS) if name == "x.npz" else np.save(path, REALS)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(DataError, match="accepted"):
        file(path=str(path), likelihood="learned_gaussian")


def test_damaged_bytes_inside_an_archive_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=REALS)
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(DataError, match="accepted"):
        file(path=str(path), likelihood="learned_gaussian")
