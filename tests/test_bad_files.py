"""Data files that cannot be are refused in one line that names them and what would be accepted."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.commands import SMALL, Say, changed

REAL = np.arange(160, dtype=np.float32).reshape(40, 4) % 7
GREY = (np.arange(40 * 36, dtype=np.int64) % 251).astype(np.uint8).reshape(40, 1, 6, 6)
ARRAYS = {  # arrays of a .npz file, the likelihood, and what the message has to name
    "grey pixels": ({"x": GREY}, "bernoulli", "grey pixels; likelihood=logistic"),
    "bits": ({"x": GREY % 2}, "gaussian", "bits; likelihood=bernoulli"),
    "real numbers": ({"x": REAL}, "categorical", "real; likelihood=learned_gaussian"),
    "no likelihood": ({"x": REAL}, "", "likelihood"),
    "not a number": ({"x": np.where(REAL == 3, np.nan, REAL)}, "gaussian", "not finite"),
    "infinite": ({"x": np.where(REAL == 3, np.inf, REAL)}, "gaussian", "not finite"),
    "beyond single precision": ({"x": 1e200 * REAL.astype(np.float64)}, "gaussian", "beyond 1e+15; standardize"),
    "int64": ({"x": REAL.astype(np.int64)}, "gaussian", "int64; uint8"),
    "complex": ({"x": REAL + 1j}, "gaussian", "complex"),
    "words": ({"x": np.array(["a", "b"])}, "gaussian", "accepted"),
    "objects": ({"x": np.array([None, 1], dtype=object)}, "gaussian", "without pickles"),
    "no rows": ({"x": REAL[:0]}, "gaussian", "(0, 4); accepted"),
    "one number": ({"x": np.float32(3)}, "gaussian", "single number; accepted"),
    "one axis": ({"x": REAL[:, 0]}, "gaussian", "(40,); accepted"),
    "five axes": ({"x": REAL.reshape(10, 2, 2, 2, 2)}, "gaussian", "(10, 2, 2, 2, 2); accepted"),
    "too few rows": ({"x": REAL[:2]}, "gaussian", "2 rows; data.valid_fraction"),
    "another name": ({"y": REAL}, "gaussian", "arrays y; accepted"),
    "a split missing": ({"train": REAL, "valid": REAL}, "gaussian", "train, valid; accepted"),
    "splits of other widths": ({"train": REAL, "valid": REAL[:, :2], "test": REAL}, "gaussian", "differ"),
    "labels of another length": ({"x": REAL, "labels": np.arange(3)}, "gaussian", "labels; 40 integers"),
    "channels last": ({"x": GREY.transpose(0, 2, 3, 1)}, "logistic", "transpose(0, 3, 1, 2)"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_bad_arrays(case: str, say: Say, tmp_path: Path) -> None:
    arrays, likelihood, words = ARRAYS[case]
    np.savez(tmp_path / "data.npz", **arrays)
    stated = [f"likelihood={likelihood}"] if likelihood else []
    line = say("train", *SMALL, f"data={tmp_path / 'data.npz'}", *stated, f"run.dir={tmp_path / 'run'}")
    for word in words.split("; "):
        assert word in line
    assert not (tmp_path / "run").exists()


OWN = {  # models with a likelihood of their own: words, rows of a file, and what the message has to name
    "data=iris model=tabular": (None, "real; zeros and ones; model=gmm"),
    "data=digits model=kmeans": (None, "bits; choose data.binarization=none"),
    "data=digits model=gmm model.covariance=spherical": (None, "bits; choose data.binarization=none"),
    "data=digits model=ppca": (None, "bits; choose data.binarization=none"),
    "data=digits data.binarization=none model=tabular": (None, "grey; data.binarization=dynamic; model=latent_class"),
    "model=gmm model.covariance=spherical": (GREY % 2, "bits; choose model=tabular or model=latent_class"),
    "model=tabular": (REAL % 2, "zeros and ones; as floats, save them as uint8"),
    "model=latent_class": (REAL % 2, "whole numbers; as floats, save them as uint8"),
    "model=hmm model.emission=categorical model.symbols=2": (REAL % 2, "whole numbers; save them as uint8"),
}


@pytest.mark.parametrize("words", OWN)
def test_no_likelihood_is_advised_to_a_model_that_has_its_own(words: str, say: Say, tmp_path: Path) -> None:
    rows, says = OWN[words]
    if rows is not None:
        np.savez(tmp_path / "data.npz", x=rows)
        words += f" data={tmp_path / 'data.npz'}"
    line = say("train", *words.split(" "), "inference=em", f"run.dir={tmp_path / 'run'}")
    assert "likelihood=" not in line
    for word in says.split("; "):
        assert word in line
    assert not (tmp_path / "run").exists()


def _archive(path: Path) -> bytes:
    np.savez_compressed(path, x=REAL)
    return path.read_bytes()


def _array(path: Path) -> bytes:
    np.save(path, REAL)
    return path.read_bytes()


FILES: dict[str, Callable[[Path], bytes | None]] = {
    "missing.npz": lambda path: None,
    "empty.npz": lambda path: b"",
    "empty.npy": lambda path: b"",
    "truncated.npz": lambda path: _archive(path)[:-40],
    "truncated.npy": lambda path: _array(path)[:-40],
    "header.npy": lambda path: _array(path)[:20],
    "altered.npz": lambda path: changed(_archive(path)),
    "picture.npz": lambda path: b"\x89PNG\r\n\x1a\n" + bytes(100),
    "picture.npy": lambda path: b"\x89PNG\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_files(name: str, say: Say, tmp_path: Path) -> None:
    path = tmp_path / name
    content = FILES[name](path)
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)
    line = say("train", f"data={path}", "likelihood=gaussian", f"run.dir={tmp_path / 'run'}")
    assert str(path) in line
    assert "ccepted" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["a_folder.npz", "table.csv"])
def test_a_folder_or_another_format(name: str, say: Say, tmp_path: Path) -> None:
    (tmp_path / "a_folder.npz").mkdir()
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    assert name in say("train", "data=file", f"data.path={tmp_path / name}", "likelihood=gaussian")


@pytest.mark.parametrize(
    "options", ["data.levels=10", "data.levels=1", "data.valid_fraction=nan", "data.test_fraction=1"]
)
def test_options_that_do_not_fit_the_file(options: str, say: Say, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=GREY)
    line = say("train", f"data={tmp_path / 'data.npz'}", "likelihood=logistic", options)
    assert str(tmp_path) in line or options.partition("=")[0] in line or "data=file" in line
