"""What cannot be is refused in one line that names the key and what would be accepted, before anything is written."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import run
from tests.forked import ROOT

SMALL = [
    *("trainer.steps=4", "encoder.hidden=[4]", "decoder.hidden=[4]", "model.latent_dim=2"),
    *("evaluation.particles=2", "evaluation.elbo_samples=1", "evaluation.data=5", "evaluation.draws=1"),
]
Say = Callable[..., str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs a command that fails, and returns the one line that it says."""

    def command(*arguments: object, status: int = 2) -> str:
        capsys.readouterr()
        assert run.main([str(argument) for argument in arguments]) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("lowerbound: ")
        return line

    return command


OPTIONS = {  # bad arguments, and what the message has to name
    "nosuch=1": "nosuch; accepted: data, model, ; trainer, ",
    "trainer.epoch=3": "trainer.epoch; did you mean epochs?; accepted: trainer.epochs",
    "trainr.epochs=3": "trainr.epochs; did you mean trainer.epochs?",
    "guide.foo=1": "guide.foo; no options",
    "encoder.widths=[3]": "encoder.widths; accepted: encoder.hidden",
    "seed.x=3": "seed.x; did you mean seed?; accepted: data",
    "trainer=5": "trainer is a group; accepted: trainer.epochs",
    "trainer={epochs:3}": "trainer is a group; accepted: trainer.epochs",
    "batching.batch_size=3": "batching.batch_size; did you mean data.batch_size?",
    "guide._target_=os.system": "guide._target_; accepted",
    "guide=diagnal": "guide=diagnal; did you mean diagonal?; accepted; diagonal",
    "objective=iwea": "objective=iwea; did you mean iwae?; accepted; elbo, ",
    "data=mnst": "data=mnst; did you mean mnist?; accepted; digits",
    "model=ppac": "model=ppac; did you mean ppca?; accepted; composed",
    "prior=5": "prior=5; accepted; standard",
    "optimizer=null": "optimizer=None; accepted; adam",
    "encoder=[a]": "encoder=['a']; accepted; mlp",
    "experiment=nosuch": "experiment=nosuch; accepted; aevb; .yaml",
    "experiment=/nowhere/x.yaml": "experiment=/nowhere/x.yaml; no such recipe",
    "seed=abc": "seed=abc; Integer",
    "seed=1.5": "seed=1.5; Integer",
    "seed=true": "seed=True; Integer",
    "seed=null": "seed=None; not Optional",
    "seed=-1": "seed: -1; between 0 and 2^63",
    "seed=99999999999999999999": "seed: 99999999999999999999; between 0 and 2^63",
    "seed=": "seed=VALUE",
    "seed=???": "seed=???; write the value itself",
    "seed=${oc.env:HOME}": "seed=${oc.env:HOME}; write the value itself",
    "run.dir=": "run.dir=VALUE",
    "threads=-3": "threads: -3; between 0",
    "threads=100000": "threads: 100000; 1024",
    "trainer.epochs=-1": "trainer.epochs: -1; 0 or above",
    "trainer.steps=-1": "trainer.steps: -1; 0 or above",
    "trainer.epochs=1.5": "trainer.epochs=1.5; Integer",
    "trainer.learning_rate=nan": "trainer.learning_rate: nan; above 0",
    "trainer.learning_rate=inf": "trainer.learning_rate: inf; finite",
    "trainer.learning_rate=0": "trainer.learning_rate: 0.0; above 0",
    "trainer.learning_rate=fast": "trainer.learning_rate=fast; Float",
    "trainer.schedule=cosin": "trainer.schedule: 'cosin'; constant, linear, cosine, burda",
    "trainer.log_every=0": "trainer.log_every: 0; above 0",
    "trainer.validations=-1": "trainer.validations: -1; 0 or above",
    "trainer.checkpoint_seconds=nan": "trainer.checkpoint_seconds: nan; 0 or above",
    "trainer.gradient_clip=-1": "trainer.gradient_clip: -1; 0 or above",
    "data.batch_size=0": "data.batch_size: 0; below 1",
    "data.resident=maybe": "data.resident: 'maybe'; auto, yes, no",
    "data.workers=-1": "data.workers: -1; below 0",
    "data.binarization=dynamc": "data.binarization='dynamc'; accepted: dynamic, static, none",
    "model.latent_dim=0": "model.latent_dim: 0; below 1",
    "model.latent_dim=-2": "model.latent_dim: -2; below 1",
    "model=two_layer guide=bottom_up model.top_dim=0": "model.top_dim: 0; below 1",
    "encoder.hidden=5": "encoder.hidden=5; encoder.hidden=[5]",
    "encoder.hidden=[0]": "encoder=mlp; hidden must be positive",
    "decoder.hidden=[a]": "decoder.hidden=['a']; Integer",
    "encoder.hidden=[[1]]": "encoder.hidden=[[1]]; list of plain values",
    "encoder.hidden=[null]": "encoder.hidden=[None]; int",
    "encoder.activation=rleu": "encoder=mlp; 'rleu'; accepted: elu",
    "objective.particles=0": "objective.particles: 0; below 1",
    "objective.particles=many": "objective.particles=many; Integer",
    "objective=elbo objective.kl=typo": "objective=elbo; kl; 'analytic'; 'monte_carlo'",
    "objective=iwae objective.particles=2 objective.max_plate_nesting=0": "max_plate_nesting; at least 1",
    "optimizer.beta1=2": "optimizer=adam; beta",
    "optimizer.lr=3": "optimizer.lr; accepted: optimizer.beta1",
    "optimizer=sgd optimizer.momentum=-1": "optimizer=sgd; momentum",
    "evaluation.particles=0": "evaluation.particles: 0; below 1",
    "evaluation.data=-1": "evaluation.data: -1; 0 takes all",
    "evaluation.draws=no": "evaluation.draws=no; Integer",
    "+x=1": "+x=1; key=value",
    "++seed=2": "++seed=2; key=value",
    "~seed": "~seed; key=value",
    "seed=1,2": "seed=1,2; several values; -m",
    "guide=diagonal,exact": "guide=diagonal,exact; several values",
    "seed=range(1,3)": "seed=range(1,3); several values",
    "foo": "foo; key=value",
    "=3": "''; accepted",
    "seed=[1": "seed=[1; key=value",
    "seed==3": "seed==3; key=value",
    "device=cuda:99": "device=cuda:99; accepted: auto, cpu",
    "device=meta": "device=meta; accepted: auto, cpu",
    "device=tpu": "device=tpu; accepted: auto, cpu",
    "run.dir=/dev/null/x": "run.dir=/dev/null/x; Not a directory",
    "run.dir=/proc/nope": "run.dir=/proc/nope; accepted: a new directory",
    f"run.dir={'x' * 300}": "run.dir=x; File name too long",
    "data=mnist data.root=/nowhere": "data=mnist; /nowhere/MNIST; is missing; data.root; LOWERBOUND_DATA",
    "data=omniglot data.root=/nowhere": "data=omniglot; /nowhere/omniglot_28x28.npz; is missing",
    "data=file": "data; likelihood=bernoulli; gaussian",
    "data=file likelihood=gaussian": "data=file; data.path=FILE",
    "data.binarization=none likelihood=bernoulli": "data=digits; grey pixels; Bernoulli; likelihood=logistic",
    "likelihood=gaussian": "data=digits; bits; likelihood=bernoulli",
    "data=iris likelihood=logistic": "data=iris; real; likelihood=learned_gaussian",
    "data=iris likelihood=gaussian likelihood.scale=0": "likelihood=gaussian; scale; positive",
    "guide=exact": "guide=exact; closed-form posterior; model=ppca",
    "model=ppca data=iris prior=normal": "model=ppca; leave out prior",
    "model=ppca data=iris decoder=mlp prior=vamp": "model=ppca; leave out prior=... and decoder=...",
    "model=two_layer": "guide=diagonal, the default; accepted: guide=bottom_up or top_down or ladder",
    "model=vq_levels": "guide=diagonal, the default; accepted: guide=quantized_levels",
    "model=gmm_vae guide=bits": "guide=bits; accepted: guide=clustering",
    "likelihood=lstm": "likelihood=lstm; data=shakespeare",
    "guide=unconditional encoder=mlp": "guide=unconditional; leave out encoder",
    **{
        f"data={data} model={model} inference=variational_em": "guide=diagonal, the default; "
        "accepted: guide=enumerated objective=trace_enum"
        for model, data in {"gmm": "iris", "kmeans": "iris", "tabular": "digits", "latent_class": "digits"}.items()
    },
    "data=iris model=hmm inference=variational_em": "the default; accepted: inference=em without a guide; no guide by",
    "data=iris model=hmm": "the default; accepted: guide=summed_out objective=trace_enum, or inference=em",
    "guide=no.such.Thing": "guide=no.such.Thing; No module named 'no'; accepted; diagonal",
    "guide=os.nothing": "guide=os.nothing; no attribute; accepted; diagonal",
    "guide=.foo": "guide=.foo; cannot be imported; accepted; diagonal",
    "guide=math.pi": "guide=math.pi; cannot be called; accepted; diagonal",
    "guide=builtins.int": "guide=builtins.int; signature",
    "guide=builtins.print": "guide=builtins.print; NoneType; Module",
    "objective=builtins.dict": "objective=builtins.dict; signature",
    "objective=collections.Counter": "objective=collections.Counter; Counter; ELBO",
}


@pytest.mark.parametrize("arguments", OPTIONS)
def test_a_bad_option_is_named_with_what_is_accepted(arguments: str, say: Say, tmp_path: Path) -> None:
    asked = arguments.split(" ")
    keys = {argument.partition("=")[0] for argument in asked}
    other = "model" in keys and "composed" not in arguments  # a model of another kind than what SMALL is for
    nets = [a for a in SMALL if a.partition("=")[0] not in keys and not ("latent" in a and other)]
    given = [a for a in nets if "epochs" not in arguments or "steps" not in a]
    latent = ["model.latent_dim=2"] if "ppca" in arguments and "data" in keys else []
    folder = [] if "run.dir" in keys else [f"run.dir={tmp_path / 'run'}"]
    line = say("train", *given, *latent, *folder, *asked)
    for words in OPTIONS[arguments].split("; "):
        assert words in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("net", ["encoder", "decoder"])
def test_convolutions_need_images(net: str, say: Say, tmp_path: Path) -> None:
    line = say("train", "data=iris", f"{net}=conv", f"run.dir={tmp_path / 'run'}")
    assert f"{net}=conv" in line
    assert "image" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    {
        "trian": "did you mean train?; resume",
        "resum runs/a": "did you mean resume?",
        "--verbose": "neither a verb",
        "resume": "python run.py resume RUN",
        "report a=b": "python run.py report RUN",
        "resume nowhere": "nowhere is not a run; config.yaml",
        "resume . x=1": "'x=1'",
        "evaluate nowhere": "nowhere is not a run",
        "sample nowhere": "nowhere is not a run",
        "sample . 0": "at least 1",
        "sample . few": "'few'",
        "sample . 3 model.latent_dim=3": "model.latent_dim=3; seed",
        "evaluate . trainer.epochs=3": "trainer.epochs=3; evaluation.*",
        "list x": "'x'",
        "train -m": "-m; seed=0,1,2",
        "-m seed=0": "-m; seed=0,1,2",
        "-m +seed=0,1": "+seed=0,1; key=value,value",
        "-m seed=range(3,1)": "seed=range(3,1); no value",
        "-m guide=diagnal,exact": "guide=diagnal; did you mean diagonal?",
        "-m seed=0,a": "seed=a; Integer",
        "-m seed=0,1 grid.jobs=x": "grid.jobs=x; 0 takes one per core",
        "-m seed=0,1 run.dir=/dev/null/x": "run.dir=/dev/null/x; Not a directory",
        "study nosuch": "nosuch; families",
    }.items(),
)
def test_a_bad_verb_or_argument_of_a_verb(arguments: str, words: str, say: Say) -> None:
    line = say(*arguments.split(" "), status=1 if "nowhere" in arguments else 2)
    for word in words.split("; "):
        assert word in line


REAL = np.arange(160, dtype=np.float32).reshape(40, 4) % 7
GREY = (np.arange(40 * 36, dtype=np.int64) % 251).astype(np.uint8).reshape(40, 1, 6, 6)
ARRAYS = {  # arrays of a .npz file, the likelihood, and what the message has to name
    "grey pixels": ({"x": GREY}, "bernoulli", "grey pixels; likelihood=logistic"),
    "bits": ({"x": GREY % 2}, "gaussian", "bits; likelihood=bernoulli"),
    "real numbers": ({"x": REAL}, "categorical", "real; likelihood=learned_gaussian"),
    "no likelihood": ({"x": REAL}, "", "likelihood"),
    "not a number": ({"x": np.where(REAL == 3, np.nan, REAL)}, "gaussian", "not finite"),
    "infinite": ({"x": np.where(REAL == 3, np.inf, REAL)}, "gaussian", "not finite"),
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


def _changed(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


FILES: dict[str, Callable[[Path], bytes | None]] = {
    "missing.npz": lambda path: None,
    "empty.npz": lambda path: b"",
    "empty.npy": lambda path: b"",
    "truncated.npz": lambda path: _archive(path)[:-40],
    "truncated.npy": lambda path: _array(path)[:-40],
    "header.npy": lambda path: _array(path)[:20],
    "altered.npz": lambda path: _changed(_archive(path)),
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    torch.set_default_dtype(torch.float64)  # made before any test's own settings, and compared with runs under them
    assert run.main(["train", *SMALL, f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_finished_run_stays_as_it_is(finished: Path, say: Say, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(finished)
    assert run.main(["resume", str(finished)]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    line = say("train", *SMALL, f"run.dir={finished}")
    assert f"run.dir={finished} holds a run already" in line
    assert snapshot(finished) == before


def _edit_index(folder: Path, **changes: object) -> None:
    path = folder / "checkpoint" / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_tensors(folder: Path, change: Callable[[bytes], bytes]) -> None:
    (path,) = (folder / "checkpoint").glob("*.safetensors")
    path.write_bytes(change(path.read_bytes()))


def _edit_state(folder: Path, **changes: object) -> None:
    state = json.loads((folder / "checkpoint" / "checkpoint.json").read_text())["state"]
    _edit_index(folder, state={**state, **changes})


def _edit_config(folder: Path, section: str, **changes: object) -> None:
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config[section].update(changes)
    path.write_text(yaml.safe_dump(config))


DAMAGES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "tensors cut": (lambda f: _edit_tensors(f, lambda b: b[: len(b) // 2]), 1, ".safetensors is damaged"),
    "tensors emptied": (lambda f: _edit_tensors(f, lambda b: b""), 1, ".safetensors is damaged"),
    "a bit changed": (lambda f: _edit_tensors(f, _changed), 1, ".safetensors is damaged"),
    "tensors gone": (lambda f: [p.unlink() for p in f.glob("checkpoint/*.safetensors")], 1, "does not exist"),
    "index gone": (lambda f: (f / "checkpoint/checkpoint.json").unlink(), 1, "checkpoint is gone; train again"),
    "index cut": (lambda f: (f / "checkpoint/checkpoint.json").write_text("{"), 1, "checkpoint.json is damaged"),
    "index a list": (lambda f: (f / "checkpoint/checkpoint.json").write_text("[]"), 1, "checkpoint.json is damaged"),
    "step altered": (lambda f: _edit_state(f, step=2), 1, "the state in checkpoint.json"),
    "another tensor file": (lambda f: _edit_index(f, tensors="x"), 1, "does not exist"),
    "another width": (lambda f: _edit_config(f, "encoder", hidden=[5]), 1, "not of this guide"),
    "another latent": (lambda f: _edit_config(f, "model", latent_dim=3), 1, "not of this model"),
    "another batch size": (lambda f: _edit_config(f, "data", batch_size=7), 1, "batches of 7; config.yaml"),
    "another row length": (lambda f: _edit_config(f, "trainer", log_every=7), 1, "log_every; 7"),
    "another optimizer's options": (lambda f: _edit_config(f, "optimizer", name="sgd"), 2, "optimizer.beta1"),
    "fewer steps": (lambda f: _edit_config(f, "trainer", steps=2), 1, "step 4; 2"),
    "an unknown key": (lambda f: _edit_config(f, "trainer", step=2), 2, "trainer.step; did you mean steps?"),
    "config emptied": (lambda f: (f / "config.yaml").write_text(""), 2, "config.yaml; mapping"),
    "config no YAML": (lambda f: (f / "config.yaml").write_text("a: ["), 2, "config.yaml is not YAML"),
    "config binary": (lambda f: (f / "config.yaml").write_bytes(b"\xff\x00"), 2, "config.yaml is not YAML"),
    "config gone": (lambda f: (f / "config.yaml").unlink(), 1, "is not a run"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_not_continued(damage: str, copy: Path, say: Say) -> None:
    harm, status, words = DAMAGES[damage]
    harm(copy)
    before = snapshot(copy)
    line = say("resume", copy, status=status)
    for word in words.split("; "):
        assert word in line
    assert snapshot(copy) == before


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_summary_is_not_reported_but_can_be_had_again(content: str, copy: Path, say: Say) -> None:
    (copy / "summary.json").write_text(content)
    assert "summary.json is damaged. Try: python run.py evaluate" in say("report", copy, status=1)
    assert run.main(["evaluate", str(copy)]) == 0
    assert json.loads((copy / "summary.json").read_text())["train/steps"] == 4


class FullDisk:
    """A disk on which nothing more can be kept from the ``room``-th file on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room, self.fsync = room, os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor: int) -> None:
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.fsync(descriptor)


@pytest.mark.parametrize("room", [2, 3, 6, 11, 16, 23])
def test_a_full_disk_keeps_what_there_was(room: int, finished: Path, say: Say, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(patch, room)
        line = say("train", *SMALL, "trainer.checkpoint_seconds=0", f"run.dir={folder}", status=1)
    assert str(folder) in line
    assert "No space left on device" in line
    assert not list(folder.rglob("*.partial"))
    assert run.main(["resume", str(folder)]) == 0
    ours, theirs = (next(f.glob("checkpoint/*.safetensors")).read_bytes() for f in (folder, finished))
    assert ours == theirs


def test_the_command_prints_one_line_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "run.py", "guide=diagnal", f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("lowerbound: guide=diagnal is not known; did you mean diagonal?; accepted: ")
    assert not (tmp_path / "run").exists()
