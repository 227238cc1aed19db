"""A finished run is not touched by what cannot be, and a damaged one is not continued."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import run
from tests.commands import SMALL, Say, changed


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
    "a bit changed": (lambda f: _edit_tensors(f, changed), 1, ".safetensors is damaged"),
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
    "config gone": (lambda f: (f / "config.yaml").unlink(), 2, "is not a run"),
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
