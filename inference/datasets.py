"""The data sets by name, with the splits and binarizations that the literature states."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits, load_iris

from inference.data import SPLITS, DataError, Dataset, check_choice
from inference.files import find_root, missing, read_bit_text, read_idx, read_npz, unpack_bits
from inference.rows import (
    BINARIZATIONS,
    SHUFFLED,
    binary,
    grey,
    real,
    shuffled_splits,
    standardized,
    with_label_rows,
)
from inference.text import lines, shakespeare
from inference.userfile import file

AMAT_URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
MNIST_SHAPES: dict[str, tuple[int, ...]] = {
    "train-images-idx3-ubyte": (60000, 28, 28),
    "train-labels-idx1-ubyte": (60000,),
    "t10k-images-idx3-ubyte": (10000, 28, 28),
    "t10k-labels-idx1-ubyte": (10000,),
}


def digits(root: str | None = None, binarization: str = "dynamic", label_rows: bool = False) -> Dataset:
    """Handwritten digits inside scikit-learn: 1,797 images of 8x8 pixels, 17 grey levels.

    Alpaydin and Kaynak 1998; split 1,297 / 200 / 300 after a fixed shuffle. Needs no file, so ``root`` is not read.

    Args:
        root: not read.
        binarization: ``dynamic``, ``static`` or ``none``.
        label_rows: put each image's label below it, one-hot, as 2 rows of pixels: for models of images given labels.
    """
    bunch = load_digits()
    places = shuffled_splits(1797, (1297, 200, 300))
    images = bunch.images.astype(np.uint8)[:, None]  # (N, 8, 8) -> (N, 1, 8, 8)
    rows = {split: images[place] for split, place in places.items()}
    labels = {split: bunch.target[place] for split, place in places.items()}
    rows, words = with_label_rows(rows, labels, 16) if label_rows else (rows, "")
    return grey("digits", rows, 17, binarization, f"digits of scikit-learn, 8x8{words}, {SHUFFLED}", labels)


def mnist(
    root: str | None = None, binarization: str = "dynamic", download: bool = False, label_rows: bool = False
) -> Dataset:
    """MNIST digits, 28x28: dynamically or statically binarized, or grey.

    LeCun, Bottou, Bengio and Haffner 1998. The first 50,000 training images to train, the last 10,000 to validate, and
    the 10,000 test images. Static binarization is the published draw of Larochelle and Murray 2011, whose rows have no
    labels and another order.

    Args:
        root: folder with the data files.
        binarization: ``dynamic``, ``static`` or ``none``.
        download: fetch the images through torchvision if they are missing.
        label_rows: put each image's label below it, one-hot, as a row of pixels: for models of images given labels.
    """
    check_choice("data.binarization", binarization, BINARIZATIONS)
    folder = find_root(root)
    if binarization == "static" and label_rows:
        raise DataError("static MNIST has no labels; accepted: data.binarization=dynamic or none with data.label_rows")
    if binarization == "static":
        return _static_mnist(folder)
    if download and not all(_mnist_file(folder, stem) for stem in MNIST_SHAPES):
        _download_mnist(folder)
    train, labels, test, test_labels = (_idx(folder, stem) for stem in MNIST_SHAPES)
    rows = {"train": train[:50000, None], "valid": train[50000:, None], "test": test[:, None]}  # (N, 1, 28, 28)
    by_split = {"train": labels[:50000], "valid": labels[50000:], "test": test_labels}
    rows, words = with_label_rows(rows, by_split, 255) if label_rows else (rows, "")
    source = f"MNIST, 28x28{words}, the last 10,000 training images to validate"
    return grey("mnist", rows, 256, binarization, source, by_split)


def omniglot(root: str | None = None, binarization: str = "dynamic") -> Dataset:
    """OMNIGLOT characters, 28x28: dynamically or statically binarized, or grey.

    Lake, Salakhutdinov and Tenenbaum 2015. Drawers 15 to 19 to test (8,115); of the 24,345 drawings of the others 1,345
    to validate after a fixed shuffle, sizes as in Tomczak and Welling 2018. The rendering is not the ``chardata.mat``
    of Burda, Grosse and Salakhutdinov 2016, so numbers do not compare with theirs. Labels are the 1,623 characters.
    """
    path = find_root(root) / "omniglot_28x28.npz"
    if not path.is_file():
        remedy = (
            "Download images_background.zip and images_evaluation.zip from https://github.com/brendenlake/omniglot, "
            "average the 105x105 drawings to 28x28 and save the arrays images (32460, 28, 28) uint8 with ink = 255, "
            "character (0 to 1622) and drawer (0 to 19)."
        )
        raise missing("omniglot", path, remedy)
    arrays = read_npz(path, "images", "character", "drawer")
    _expect(path, arrays["images"], (32460, 28, 28))
    others = np.flatnonzero(arrays["drawer"] < 15)
    places = {split: others[place] for split, place in shuffled_splits(24345, (23000, 1345, 0)).items()}
    places["test"] = np.flatnonzero(arrays["drawer"] >= 15)
    rows = {split: arrays["images"][place][:, None] for split, place in places.items()}  # (N, 1, 28, 28)
    labels = {split: arrays["character"][place] for split, place in places.items()}
    source = (
        "OMNIGLOT, 28x28 by area averaging (not the chardata.mat of the IWAE paper: numbers do not compare), "
        f"drawers 15-19 to test, the others {SHUFFLED}"
    )
    return grey("omniglot", rows, 256, binarization, source, labels)


def caltech(root: str | None = None, invert: bool = True) -> Dataset:
    """Caltech 101 Silhouettes, 28x28, binary as published.

    Marlin, Swersky, Chen and de Freitas 2010, split 1: 4,100 / 2,264 / 2,307. Labels are 1 to 101.

    Args:
        root: folder with the data files.
        invert: use 1 - x, silhouette 1 on background 0, as VAE papers do (Tomczak and Welling 2018); as published,
            the silhouette is 0.
    """
    path = find_root(root) / "caltech101_silhouettes_28.npz"
    if not path.is_file():
        remedy = (
            "Download https://people.cs.umass.edu/~marlin/data/caltech101_silhouettes_28_split1.mat and save its "
            "train, val and test data as the arrays train, valid and test, uint8 (N, 784) of 0 and 1, row by row (the "
            "original is column by column), with train_labels, valid_labels and test_labels."
        )
        raise missing("caltech", path, remedy)
    arrays = read_npz(path, *SPLITS, *(f"{split}_labels" for split in SPLITS))
    rows = {split: unpack_bits(arrays[split], (28, 28), f"{path}: {split}") ^ np.uint8(invert) for split in SPLITS}
    labels = {split: arrays[f"{split}_labels"] for split in SPLITS}
    polarity = "inverted (1 - x: silhouette 1)" if invert else "polarity as published (silhouette 0)"
    return binary("caltech", rows, "Caltech 101 Silhouettes, 28x28, split 1", labels, how=f"binary, {polarity}")


def frey(root: str | None = None) -> Dataset:
    """Frey faces: 1,965 video frames, 28x20, 256 grey levels.

    Roweis, Saul and Hinton 2002; Kingma and Welling 2014. No official split: 1,565 / 200 / 200 after a fixed shuffle.
    """
    path = find_root(root) / "frey_faces.npz"
    if not path.is_file():
        remedy = (
            "Download https://cs.nyu.edu/~roweis/data/frey_rawface.mat and save "
            "scipy.io.loadmat(...)['ff'].T.reshape(-1, 28, 20) as the array images."
        )
        raise missing("frey", path, remedy)
    images = read_npz(path, "images")["images"]
    _expect(path, images, (1965, 28, 20))
    rows = {split: images[place][:, None] for split, place in shuffled_splits(1965, (1565, 200, 200)).items()}
    source = f"Frey faces, 28x20, {SHUFFLED} (neighbouring frames fall into different splits)"
    return grey("frey", rows, 256, "none", source, likelihood="learned_gaussian")


def cifar10(root: str | None = None, version: str = "auto", download: bool = False) -> Dataset:
    """CIFAR-10, 32x32 in colour, 256 levels: the full set or a lossless subset.

    Krizhevsky 2009. Full: the last 5,000 training images to validate, 45,000 / 5,000 / 10,000. Subset: of the first
    1,017 images of each file, training batches 1-4 / training batch 5 / test batch, 4,068 / 1,017 / 1,017; numbers on
    it do not compare with those on the full set.

    Args:
        root: folder with the data files.
        version: ``full``, ``subset``, or ``auto``: full if it is there or downloaded, else the subset.
        download: fetch the full set through torchvision if it is missing.
    """
    check_choice("data.version", version, ("auto", "full", "subset"))
    folder = find_root(root)
    has_full = (folder / "cifar-10-batches-py").is_dir()
    subset = folder / "cifar10_subset.npz"
    if version == "full" or (version == "auto" and (has_full or download)):
        return _full_cifar10(folder, has_full, download)
    if not subset.is_file():
        remedy = f"It is a subset; the full set comes with data.download=true, or as {folder / 'cifar-10-batches-py'}."
        raise missing("cifar10", subset, remedy)
    arrays = read_npz(subset, "train_images", "test_images", "train_labels", "test_labels", "train_batch")
    valid = arrays["train_batch"] == 5
    images, labels = arrays["train_images"], arrays["train_labels"]
    rows = {"train": images[~valid], "valid": images[valid], "test": arrays["test_images"]}
    by_split = {"train": labels[~valid], "valid": labels[valid], "test": arrays["test_labels"]}
    return _colour(rows, by_split, "CIFAR-10, 32x32, a lossless subset (numbers do not compare with the full set)")


def faithful(root: str | None = None) -> Dataset:
    """Old Faithful geyser: 272 eruption lengths and waiting times.

    Azzalini and Bowman 1990; split 200 / 36 / 36 after a fixed shuffle, standardized with the training statistics.
    """
    path = find_root(root) / "old_faithful.csv"
    if not path.is_file():
        remedy = "It is R's faithful, 272 rows: write.csv(faithful, 'old_faithful.csv', row.names=FALSE)."
        raise missing("faithful", path, remedy)
    try:
        table = np.loadtxt(path, delimiter=",", skiprows=1)
    except ValueError as error:
        raise DataError(f"{path} cannot be read ({error}); accepted: a header and 272 rows of two numbers") from error
    _expect(path, table, (272, 2))
    return _table("faithful", "Old Faithful, eruption and waiting time in minutes", table, (200, 36, 36))


def iris(root: str | None = None) -> Dataset:
    """Fisher's irises inside scikit-learn: 150 flowers, 4 lengths, 3 species.

    Fisher 1936; split 100 / 25 / 25 after a fixed shuffle, standardized with the training statistics. Needs no file, so
    ``root`` is not read.
    """
    bunch = load_iris()
    return _table("iris", "irises of scikit-learn, four lengths in cm", bunch.data, (100, 25, 25), bunch.target)


LOADERS: dict[str, Callable[..., Dataset]] = {
    loader.__name__: loader
    for loader in (digits, mnist, omniglot, caltech, frey, cifar10, faithful, iris, file, shakespeare, lines)
}


def _table(
    name: str, source: str, table: np.ndarray, sizes: tuple[int, int, int], target: np.ndarray | None = None
) -> Dataset:
    places = shuffled_splits(len(table), sizes)
    rows, numbers = standardized({split: table[place] for split, place in places.items()})
    labels = None if target is None else {split: target[place] for split, place in places.items()}
    return real(name, rows, f"{source}, {SHUFFLED}, standardized with the training rows' {numbers}", labels)


def _expect(path: Path, values: np.ndarray, shape: tuple[int, ...]) -> None:
    kind = "u" if len(shape) > 2 else "f"
    if values.shape != shape or values.dtype.kind != kind or not np.isfinite(values).all():
        wanted = "uint8" if kind == "u" else "finite numbers"
        raise DataError(f"{path} holds {values.dtype} {values.shape}; accepted: {wanted} {shape}")


def _mnist_file(folder: Path, stem: str) -> Path | None:
    names = (folder / "MNIST" / "raw" / f"{stem}{suffix}" for suffix in (".gz", ""))
    return next((path for path in names if path.is_file()), None)


def _idx(folder: Path, stem: str) -> np.ndarray:
    path = _mnist_file(folder, stem)
    if path is None:
        names = ", ".join(f"{name}.gz" for name in MNIST_SHAPES)
        remedy = f"Set data.download=true to fetch MNIST through torchvision, or download {names} yourself."
        raise missing("mnist", folder / "MNIST" / "raw" / f"{stem}.gz", remedy)
    shape = MNIST_SHAPES[stem]
    values = read_idx(path, len(shape))
    if values.shape != shape:
        raise DataError(f"{path} has shape {values.shape}; accepted: {shape}; delete it and download it again")
    return values


def _static_mnist(folder: Path) -> Dataset:
    path = folder / "binarized_mnist.npz"
    texts = {split: folder / f"binarized_mnist_{split}.amat" for split in SPLITS}
    if path.is_file():
        arrays = read_npz(path, *SPLITS)
        rows = {split: unpack_bits(arrays[split], (28, 28), f"{path}: {split}") for split in SPLITS}
    elif all(text.is_file() for text in texts.values()):
        rows = {split: read_bit_text(text, (28, 28)) for split, text in texts.items()}
    else:
        names = ", ".join(text.name for text in texts.values())
        raise missing("mnist", path, f"Download {names} from {AMAT_URL}; either that file or these three are read.")
    if [len(rows[split]) for split in SPLITS] != [50000, 10000, 10000]:
        raise DataError(f"{folder}: binarized_mnist is not complete; accepted: 50,000, 10,000 and 10,000 images")
    how = "binarized statically, the draw that Larochelle and Murray (2011) published"
    return binary("mnist", rows, "MNIST, 28x28", binarization="static", how=how)


def _download_mnist(folder: Path) -> None:
    import torchvision.datasets

    try:
        torchvision.datasets.MNIST(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"torchvision could not download MNIST to {folder}: {error}") from error


def _full_cifar10(folder: Path, present: bool, download: bool) -> Dataset:
    import torchvision.datasets

    if not present and not download:
        remedy = "Set data.download=true to fetch it through torchvision."
        raise missing("cifar10", folder / "cifar-10-batches-py", remedy)
    try:
        train, test = (torchvision.datasets.CIFAR10(str(folder), part, download=not present) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise DataError(f"torchvision could not read CIFAR-10 in {folder}: {error}") from error
    images, labels = train.data, np.asarray(train.targets)
    rows = {"train": images[:-5000], "valid": images[-5000:], "test": test.data}
    by_split = {"train": labels[:-5000], "valid": labels[-5000:], "test": np.asarray(test.targets)}
    return _colour(rows, by_split, "CIFAR-10, 32x32, the last 5,000 training images to validate")


def _colour(rows: dict[str, np.ndarray], labels: dict[str, np.ndarray], source: str) -> Dataset:
    channels_first = {split: images.transpose(0, 3, 1, 2) for split, images in rows.items()}  # -> (N, 3, 32, 32)
    return grey("cifar10", channels_first, 256, "none", source, labels)
