"""What survives a crash at any moment: checkpoints and rows of the log."""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from inference import checkpoint
from inference.log import drop_rows_after, read_rows
from tests.small_trainers import BATCH, make


def test_a_checkpoint_is_safetensors_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a pickle")

    for module, name in [(pickle, "dump"), (pickle, "dumps"), (pickle, "load"), (pickle, "loads")]:
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    trainer = make(tmp_path / "run", steps=9)
    trainer.fit()
    folder = tmp_path / "run" / "checkpoint"
    index = json.loads((folder / "checkpoint.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.json", index["tensors"]]
    with safetensors.safe_open(folder / index["tensors"], "pt") as file:
        names = set(file.keys())
    assert {"model.w", "guide.net.weight", "optimizer.0.exp_avg", "optimizer.0.step", "window"} <= names
    assert {"rng.cpu", "batches.permutation", "batches.generator"} <= names
    assert index["state"]["step"] == 9
    assert index["state"]["batches"] == {"epoch": 1, "position": 2, "batch_size": BATCH}
    make(tmp_path / "run", steps=9).restore()


class Crash(BaseException):
    """The machine is gone."""


class Machine:
    """Lets so many file operations happen, and none after them: what was not done when it crashed is never done."""

    OPERATIONS = ((os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "mkdir"))

    def __init__(self, lives: int) -> None:
        self.lives = lives

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        for owner, name in self.OPERATIONS:
            self.patch.setattr(owner, name, self._mortal(getattr(owner, name)))

    def __exit__(self, *exception: object) -> None:
        self.patch.undo()

    def _mortal(self, operation: Callable) -> Callable:
        def attempt(*arguments: object, **options: object) -> object:
            self.lives -= 1
            if self.lives < 0:
                raise Crash
            return operation(*arguments, **options)

        return attempt


def crashes(save: Callable[[Path, int], None], folder: Path) -> Iterator[int]:
    """The steps read back after saving step 1 and crashing in the save of step 2, each time a file operation later."""
    for lives in range(100):
        place = folder / str(lives)
        save(place, 1)
        try:
            with Machine(lives):
                save(place, 2)
        except Crash:
            yield checkpoint.load(place)[1]["step"]
        else:
            return


def _save(folder: Path, step: int) -> None:
    checkpoint.save(folder, {"w": torch.full((3,), float(step))}, {"step": step})


def _save_carelessly(folder: Path, step: int) -> None:
    """The index first: for a while it names tensors that are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    data, state = safetensors.torch.save({"w": torch.full((3,), float(step))}), {"step": step}
    index = {"tensors": f"{step}.safetensors", "sha256": checkpoint._digest(data, state), "state": state}
    checkpoint.write_atomically(folder / "checkpoint.json", json.dumps(index))
    checkpoint.write_atomically(folder / index["tensors"], data)


def test_a_crash_at_any_file_operation_leaves_one_of_the_two_checkpoints(tmp_path: Path) -> None:
    steps = list(crashes(_save, tmp_path))
    assert set(steps) == {1, 2}
    assert steps == sorted(steps)
    assert len(steps) >= 8
    with pytest.raises(checkpoint.CheckpointError):
        list(crashes(_save_carelessly, tmp_path / "careless"))


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "numbers.json"
    checkpoint.write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*numbers\.json"):
        checkpoint.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("tail", ["", "{", '{"step": 3, "seco', "null\n", '{"stop": 3}\n', "\x00\x00"])
def test_a_log_that_was_cut_short_keeps_its_whole_rows(tail: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/bound": -3.5}\n{"step": 2, "train/bound": -3.25}\n' + tail)
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    drop_rows_after(path, 1)
    assert path.read_text() == '{"step": 1, "train/bound": -3.5}\n'
