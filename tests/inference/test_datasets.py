"""The data sets by name, against the published counts, means and hashes."""

import gzip
import hashlib
import shutil
import struct

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_iris

from inference import datasets
from inference.data import SPLITS, DataError, Source
from inference.datasets import LOADERS
from inference.files import read_bit_text, read_idx, read_npz, unpack_bits

NEEDS_FILES = ("mnist", "omniglot", "caltech", "frey", "cifar10", "faithful")
SIZES = {
    "digits": (1297, 200, 300),
    "mnist": (50000, 10000, 10000),
    "omniglot": (23000, 1345, 8115),
    "caltech": (4100, 2264, 2307),
    "frey": (1565, 200, 200),
    "cifar10": (4068, 1017, 1017),
    "faithful": (200, 36, 36),
    "iris": (100, 25, 25),
}


@pytest.mark.parametrize("name", SIZES)
def test_every_report_can_state_the_splits(name, data_root):
    data = LOADERS[name](root=str(data_root))
    assert tuple(len(data.splits[split]) for split in SPLITS) == SIZES[name]
    assert all(f"{size:,}" in data.description for size in SIZES[name])
    assert ("binariz" in data.description) == (data.kind == "grey")
    assert data.name == name
    assert all(rows.dtype == (torch.float64 if data.kind == "real" else torch.uint8) for rows in data.splits.values())
    assert all(len(data.labels[split]) == len(data.splits[split]) for split in data.labels)


@pytest.mark.parametrize("name", NEEDS_FILES)
def test_a_missing_file_says_what_to_get_and_where_to_put_it(name, tmp_path):
    with pytest.raises(DataError) as refusal:
        LOADERS[name](root=str(tmp_path))
    words = ("is missing", str(tmp_path), "data.root", "LOWERBOUND_DATA")
    assert all(word in str(refusal.value) for word in words)
    assert any(word in str(refusal.value) for word in ("Download ", "data.download=true", "R's faithful"))


def test_the_root_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWERBOUND_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="elsewhere"):
        datasets.frey()


@pytest.mark.parametrize("loader", [datasets.digits, datasets.mnist])
def test_an_unknown_binarization_is_refused(loader, data_root):
    with pytest.raises(DataError, match="accepted: dynamic, static, none"):
        loader(root=str(data_root), binarization="threshold")


def row_set(rows):
    return {row.tobytes() for row in rows.numpy()}


def test_digits_are_those_of_scikit_learn_each_in_one_split():
    data, bunch = datasets.digits(binarization="none"), load_digits()
    rows = torch.cat([data.splits[split] for split in SPLITS]).numpy().reshape(1797, 64)
    labels = torch.cat([data.labels[split] for split in SPLITS]).numpy()
    found = sorted(zip(rows.tolist(), labels.tolist(), strict=True))
    assert found == sorted(zip(bunch.data.astype(int).tolist(), bunch.target.tolist(), strict=True))
    assert (data.levels, data.default_likelihood, data.shape) == (17, "categorical", (1, 8, 8))
    assert datasets.digits().default_likelihood == "bernoulli"


def test_digits_split_stays_the_same():
    """The fixed shuffle is part of every published number, so a change of it has to be seen."""
    assert datasets.digits().labels["test"][:10].tolist() == [8, 8, 2, 2, 2, 9, 8, 8, 3, 6]


def test_mnist_is_what_torchvision_reads_and_the_root_stays_untouched(data_root, tmp_path):
    from torchvision.datasets import MNIST

    before = sorted(path.name for path in (data_root / "MNIST").rglob("*"))
    data = datasets.mnist(root=str(data_root), binarization="none")
    assert sorted(path.name for path in (data_root / "MNIST").rglob("*")) == before
    shutil.copytree(data_root / "MNIST", tmp_path / "MNIST", copy_function=shutil.copyfile)
    (tmp_path / "MNIST" / "raw").chmod(0o755)
    train, test = (MNIST(str(tmp_path), train=train, download=True) for train in (True, False))  # decompresses
    assert torch.equal(data.splits["train"][:, 0], train.data[:50000])
    assert torch.equal(data.splits["valid"][:, 0], train.data[50000:])
    assert torch.equal(data.splits["test"][:, 0], test.data)
    assert torch.equal(data.labels["valid"], train.targets[50000:])
    assert torch.equal(data.labels["test"], test.targets)
    assert abs(train.data.double().mean() / 255 - 0.1307) < 5e-5
    for path in (tmp_path / "MNIST" / "raw").glob("*.gz"):
        path.unlink()
    assert torch.equal(datasets.mnist(root=str(tmp_path)).splits["test"], data.splits["test"])


def test_mnist_dynamic_draws_have_the_grey_values_as_their_mean(data_root):
    data = datasets.mnist(root=str(data_root))
    source = Source(data, "test", "binary", dtype=torch.float32)
    probability = data.splits["test"].double() / 255
    error = 5 * (probability * (1 - probability)).sum().sqrt() / probability.numel()
    mean = source.batch(torch.arange(10000)).double().mean()
    assert abs(mean - (probability > 0.5).double().mean()) > error  # a threshold would be seen
    assert abs(mean - probability.mean()) < error


def test_static_mnist_is_the_published_file(data_root):
    data = datasets.mnist(root=str(data_root), binarization="static")
    hashes = {
        "train": "7b7e6498eb04624248c425ea616a7e9a4a940056",
        "valid": "714907b623bbc03ca36c092009cb1b0e27f21459",
        "test": "bc52a26d6293157c0b07b26db250c23fe23d37ef",
    }
    for split, rows in data.splits.items():
        text = np.full((len(rows), 2 * 784), ord(" "), dtype=np.uint8)
        text[:, ::2] = rows.numpy().reshape(-1, 784) + ord("0")
        text[:, -1] = ord("\n")
        blob = hashlib.sha1(f"blob {text.size}\0".encode())
        blob.update(text.data)
        assert blob.hexdigest() == hashes[split]
    assert (data.kind, data.levels, data.default_likelihood) == ("binary", 2, "bernoulli")
    means = [data.splits[split].double().mean().item() for split in SPLITS]
    assert np.allclose(means, [0.13056, 0.13113, 0.13251], atol=5e-6)


def test_omniglot_test_rows_are_other_drawers_and_each_row_is_in_one_split(data_root):
    data = datasets.omniglot(root=str(data_root), binarization="none")
    with np.load(data_root / "omniglot_28x28.npz") as arrays:
        images, drawer, character = arrays["images"], arrays["drawer"], arrays["character"]
    assert np.array_equal(data.splits["test"][:, 0].numpy(), images[drawer >= 15])
    assert np.array_equal(data.labels["test"].numpy(), character[drawer >= 15])
    both = torch.cat([data.splits["train"], data.splits["valid"]])
    assert sorted(row.tobytes() for row in both.numpy()) == sorted(row.tobytes() for row in images[drawer < 15])
    # A few drawings are equal; but for those the splits have no row in common.
    assert len(row_set(data.splits["train"]) & row_set(data.splits["valid"])) < 5


def test_caltech_is_inverted_unless_asked_otherwise(data_root):
    inverted, published = (datasets.caltech(root=str(data_root), invert=invert) for invert in (True, False))
    with np.load(data_root / "caltech101_silhouettes_28.npz") as arrays:
        expected = np.unpackbits(arrays["valid"], axis=1)[:, :784].reshape(-1, 1, 28, 28)
        labels = arrays["valid_labels"]
    assert np.array_equal(published.splits["valid"].numpy(), expected)
    assert np.array_equal(inverted.splits["valid"].numpy(), 1 - expected)
    assert np.array_equal(inverted.labels["valid"].numpy(), labels)
    corners = inverted.splits["train"][:, 0, [0, 0, -1, -1], [0, -1, 0, -1]].double()
    assert corners.mean() < 0.1  # background is 0
    assert "inverted" in inverted.description
    assert "as published" in published.description


def test_frey_frames_are_each_in_one_split(data_root):
    data = datasets.frey(root=str(data_root))
    with np.load(data_root / "frey_faces.npz") as arrays:
        images = arrays["images"]
    rows = torch.cat([data.splits[split] for split in SPLITS])[:, 0].numpy()
    assert sorted(row.tobytes() for row in rows) == sorted(row.tobytes() for row in images)
    assert (data.default_likelihood, data.binarization) == ("learned_gaussian", "none")


def test_cifar10_subset_validates_on_the_fifth_batch(data_root):
    data = datasets.cifar10(root=str(data_root))
    with np.load(data_root / "cifar10_subset.npz") as arrays:
        images, batch, test = arrays["train_images"], arrays["train_batch"], arrays["test_images"]
    assert np.array_equal(data.splits["valid"].permute(0, 2, 3, 1).numpy(), images[batch == 5])
    assert np.array_equal(data.splits["train"].permute(0, 2, 3, 1).numpy(), images[batch < 5])
    assert np.array_equal(data.splits["test"][7, 2].numpy(), test[7, :, :, 2])
    assert "do not compare" in data.description


@pytest.mark.parametrize("name", ["faithful", "iris"])
def test_tables_are_standardized_with_the_training_rows(name, data_root):
    data = LOADERS[name](root=str(data_root))
    raw = load_iris().data if name == "iris" else np.genfromtxt(data_root / "old_faithful.csv", delimiter=",")[1:]
    train = data.splits["train"].numpy()
    assert np.abs(train.mean(0)).max() < 1e-12
    assert np.abs(train.std(0, ddof=1) - 1).max() < 1e-12
    assert abs(np.concatenate([data.splits[split].numpy() for split in SPLITS]).mean(0)).max() > 1e-3
    # One affine map takes the raw rows to all splits: sorted columns are perfectly correlated.
    rows = np.concatenate([data.splits[split].numpy() for split in SPLITS])
    for column in range(rows.shape[1]):
        correlation = np.corrcoef(np.sort(rows[:, column]), np.sort(raw[:, column]))[0, 1]
        assert abs(correlation - 1) < 1e-12
    if name == "faithful":
        assert np.allclose(raw.mean(0), [3.48778, 70.89706], atol=5e-6)


# Downloads and broken files


def test_mnist_is_downloaded_only_when_asked_and_missing(data_root, tmp_path, monkeypatch):
    calls = []

    def fetch(root, download):
        calls.append((root, download))
        shutil.copytree(data_root / "MNIST", tmp_path / "MNIST", copy_function=shutil.copyfile)

    monkeypatch.setattr("torchvision.datasets.MNIST", fetch)
    datasets.mnist(root=str(data_root), download=True)
    assert calls == []
    assert len(datasets.mnist(root=str(tmp_path), download=True).splits["train"]) == 50000
    assert calls == [(str(tmp_path), True)]


def test_a_failed_download_is_one_message(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.MNIST", fail)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", fail)
    for loader in (datasets.mnist, datasets.cifar10):
        with pytest.raises(DataError, match="no network"):
            loader(root=str(tmp_path), download=True)


def test_full_cifar10_comes_from_torchvision(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            assert download
            count = 5003 if train else 2
            self.data = np.arange(count * 12, dtype=np.uint8).reshape(count, 2, 2, 3)
            self.targets = list(range(count))

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    data = datasets.cifar10(root=str(tmp_path), version="full", download=True)
    assert [len(data.splits[split]) for split in SPLITS] == [3, 5000, 2]
    assert data.splits["test"][0].tolist() == [[[0, 3], [6, 9]], [[1, 4], [7, 10]], [[2, 5], [8, 11]]]
    assert data.labels["valid"][0] == 3
    with pytest.raises(DataError, match=r"data\.download=true"):
        datasets.cifar10(root=str(tmp_path), version="full")


def idx_bytes(values):
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def test_idx_files_are_read_plain_and_compressed_and_broken_ones_refused(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    plain, packed = tmp_path / "x", tmp_path / "x.gz"
    plain.write_bytes(idx_bytes(values))
    packed.write_bytes(gzip.compress(idx_bytes(values)))
    assert np.array_equal(read_idx(plain, 3), values)
    assert np.array_equal(read_idx(packed, 3), values)
    broken = {
        "short.gz": packed.read_bytes()[:-12],
        "html.gz": b"<html>not found</html>",
        "short": idx_bytes(values)[:-1],
        "axes": idx_bytes(values[0]),
        "empty": b"",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="download it again"):
            read_idx(tmp_path / name, 3)


def test_mnist_refuses_files_of_another_size(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.zeros((5, 28, 28), dtype=np.uint8))))
    with pytest.raises(DataError, match=r"accepted: \(60000, 28, 28\)"):
        datasets.mnist(root=str(tmp_path))


def test_bits_are_read_packed_unpacked_and_as_text(tmp_path):
    bits = (np.arange(3 * 35) % 3 == 0).astype(np.uint8).reshape(3, 35)
    images = bits.reshape(3, 1, 5, 7)
    assert np.array_equal(unpack_bits(np.packbits(bits, axis=1), (5, 7), "x"), images)
    assert np.array_equal(unpack_bits(bits, (5, 7), "x"), images)
    path = tmp_path / "x.amat"
    np.savetxt(path, bits, fmt="%d")
    assert np.array_equal(read_bit_text(path, (5, 7)), images)
    path.write_text(path.read_text()[:-10])
    with pytest.raises(DataError, match="35 digits"):
        read_bit_text(path, (5, 7))
    for wrong in (bits * 2, bits[:, :34], bits.astype(float)):
        with pytest.raises(DataError, match="accepted"):
            unpack_bits(wrong, (5, 7), "x")


def test_a_broken_archive_is_one_message(tmp_path):
    path = tmp_path / "frey_faces.npz"
    np.savez(path, images=np.zeros((2, 28, 20), dtype=np.uint8))
    with pytest.raises(DataError, match=r"accepted: uint8 \(1965, 28, 20\)"):
        datasets.frey(root=str(tmp_path))
    with pytest.raises(DataError, match="has no array faces; it has images"):
        read_npz(path, "faces")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="complete NumPy"):
        datasets.frey(root=str(tmp_path))
    (tmp_path / "old_faithful.csv").write_text("eruptions,waiting\n3.6,seven\n")
    with pytest.raises(DataError, match="272 rows"):
        datasets.faithful(root=str(tmp_path))
