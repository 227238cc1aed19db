"""The training loop: resumed in mid-epoch, stopped by signals and NaN; checkpoints crashed at every file operation."""

import json
import math
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from inference import checkpoint
from inference.data import Batches, Source
from inference.engine import SVI, SharedOptimizer
from inference.log import drop_rows_after, read_rows
from inference.objectives import ELBO
from inference.particles import StructureError
from inference.rows import real
from inference.schedules import SCHEDULES
from inference.signals import Interrupted
from inference.trainer import Diverged, Trainer, TrainerSettings

ROWS, BATCH = 26, 4  # an epoch of seven batches, the last of two rows
PER_EPOCH = math.ceil(ROWS / BATCH)


class Model(PyroModule):
    """z ~ N(0, 1), x ~ N(z + w, 1); ``beyond`` says what becomes of the mean where w passes 0.35."""

    def __init__(self, beyond: Callable[[Tensor], Tensor] = torch.zeros_like) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.beyond = beyond

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.w + self.beyond(0.35 - self.w), 1.0).to_event(1), obs=x)


class Guide(PyroModule):
    """q(z|x) = N(a x + b, 1/2)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(self.net(x), 0.5).to_event(1))


def adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr)


def make(folder: Path, model: nn.Module | None = None, optimizer: Callable = adam, **settings: object) -> Trainer:
    """The same trainer for the same arguments, whatever was drawn before."""
    torch.manual_seed(3)
    folder.mkdir(exist_ok=True)
    x = 10 + torch.randn(ROWS, 1)
    data = real("toy", {split: x.numpy() for split in ("train", "valid", "test")}, "numbers")
    model, guide = model or Model(), Guide()
    options = TrainerSettings(**{"steps": 20, "learning_rate": 0.1, "log_every": 3, "validations": 0, **settings})
    parameters = nn.ModuleList([model, guide]).parameters() if isinstance(model, nn.Module) else guide.parameters()
    shared = SharedOptimizer(parameters, optimizer, options.learning_rate)
    return Trainer(SVI(model, guide, shared, ELBO()), Batches(Source(data, "train", "real"), BATCH), options, folder)


class Killer:
    """An observer who sends a signal to this very process after a step."""

    def __init__(self, step: int, signum: int) -> None:
        self.step, self.signum = step, signum

    def on_step(self, step: int, total: int) -> None:
        if step == self.step:
            os.kill(os.getpid(), self.signum)

    def on_row(self, row: dict) -> None:
        pass


def end_of(folder: Path) -> tuple[bytes, list[dict]]:
    (tensors,) = (folder / "checkpoint").glob("*.safetensors")
    return tensors.read_bytes(), [{**row, "seconds": None} for row in read_rows(folder / "metrics.jsonl")]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 2, 3, 4, PER_EPOCH, PER_EPOCH + 1, 19, 20])
def test_a_run_that_is_resumed_in_mid_epoch_ends_in_the_same_bits(step: int, signum: int, tmp_path: Path) -> None:
    settings = {"schedule": "cosine", "learning_rate": 0.01}
    make(tmp_path / "whole", **settings).fit()
    first = make(tmp_path / "parts", **settings)
    first.observers = (Killer(step, signum),)
    with pytest.raises(Interrupted, match=f"after step {step}; the checkpoint is written"):
        first.fit()
    torch.manual_seed(99)  # whatever the new process draws before
    second = make(tmp_path / "parts", **settings)
    torch.rand(5)
    second.restore()
    assert second.step == step
    second.fit()
    assert end_of(tmp_path / "parts") == end_of(tmp_path / "whole")
    assert [row["step"] for row in read_rows(tmp_path / "parts" / "metrics.jsonl")] == [3, 6, 9, 12, 15, 18, 20]


def test_forgetting_any_part_of_the_state_would_be_seen(tmp_path: Path) -> None:
    make(tmp_path / "whole").fit()
    for forgotten in ("optimizer", "rng", "batches", "window"):
        folder = tmp_path / forgotten
        first = make(folder)
        first.observers = (Killer(10, signal.SIGTERM),)
        with pytest.raises(Interrupted):
            first.fit()
        second = make(folder)
        fresh, batches, window = second.svi.optim.optimizer.state_dict(), second.batches.state_dict(), second.window
        second.restore()
        if forgotten == "optimizer":
            second.svi.optim.optimizer.load_state_dict(fresh)
        elif forgotten == "rng":
            torch.manual_seed(0)
        elif forgotten == "batches":
            second.batches.load_state_dict(batches)
        else:
            second.window = torch.zeros_like(window)
        second.fit()
        assert end_of(folder) != end_of(tmp_path / "whole"), forgotten


def test_a_longer_run_continues_a_finished_one(tmp_path: Path) -> None:
    make(tmp_path / "short", steps=2, log_every=5).fit()
    longer = make(tmp_path / "short", steps=12, log_every=5)
    longer.restore()
    longer.fit()
    make(tmp_path / "long", steps=12, log_every=5).fit()
    ours, theirs = end_of(tmp_path / "short"), end_of(tmp_path / "long")
    assert ours[0] == theirs[0]
    assert ours[1][1:] == theirs[1]  # but for the row at the end of the short one


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"log_every": 5}, "log_every 3, .* 5"),
        ({"steps": 4}, "step 5, past the 4"),
        ({"optimizer": torch.optim.SGD}, "optimizer Adam, .* SGD"),
        ({"model": nn.Linear(1, 1)}, "not of this model"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(settings: dict, words: str, tmp_path: Path) -> None:
    make(tmp_path / "run", steps=5).fit()
    with pytest.raises(checkpoint.CheckpointError, match=words):
        make(tmp_path / "run", **{"steps": 5, **settings}).restore()


# ---- numbers that are not finite ----


def nan_beyond(room: Tensor) -> Tensor:
    return 0 * room.log()  # not a number where w > 0.35


def nan_gradient_beyond(room: Tensor) -> Tensor:
    return 1e-3 * (room * (room > 0)).sqrt()  # zero there, and its derivative is infinity times 0


def singular_beyond(room: Tensor) -> Tensor:
    return 0 * torch.linalg.cholesky(room.reshape(1, 1)).reshape(())


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["saved at every step", "never saved"])
@pytest.mark.parametrize(
    ("beyond", "words"),
    [
        (nan_beyond, "not finite at step 5: .* of model site 'x'"),
        (nan_gradient_beyond, "not finite at step 5: gradient of model parameter 'w'"),
        (singular_beyond, "step 5 failed: linalg.cholesky"),
    ],
)
def test_nan_stops_the_run_and_is_found(beyond: Callable, words: str, seconds: float, tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", Model(beyond), checkpoint_seconds=seconds)  # w grows by 0.1 a step
    with pytest.raises(Diverged, match=words) as stopped:
        trainer.fit()
    assert str(tmp_path / "run" / "checkpoint") in str(stopped.value)
    tensors, state = checkpoint.load(tmp_path / "run" / "checkpoint")
    assert state["step"] == (4 if seconds == 0 else 0)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [3]
    make(tmp_path / "again", Model(beyond), steps=4).fit()  # up to there it was sound


def test_a_step_that_is_too_large_is_named(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"not finite at step 2: .*'; .*|not finite at step 2: .*trainer.learning_rate"):
        make(tmp_path / "run", learning_rate=1e200).fit()


def test_a_validation_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", validations=4)
    trainer.validate = lambda: {"valid/elbo": -1.0 if trainer.step < 10 else math.inf}
    with pytest.raises(Diverged, match="not finite at step 10: valid/elbo"):
        trainer.fit()
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 5, 6, 9]
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_data_that_cannot_be_scored_are_refused_before_anything_is_kept(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="not finite before the first step: log-density of model site 'x'"):
        make(tmp_path / "run", Model(lambda room: room * 1e300)).fit()
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_parameters_in_the_global_store_are_refused(tmp_path: Path) -> None:
    def model(x: Tensor) -> None:
        loose = pyro.param("loose", torch.zeros(()))
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + loose, 1.0).to_event(1), obs=x)

    with pytest.raises(StructureError, match=r"\['loose'\].*PyroParam"):
        make(tmp_path / "run", model).fit()


def test_data_outside_of_the_support_are_refused_in_one_line(tmp_path: Path) -> None:
    class Coin(Model):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", x.shape[0], dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=z).to_event(1), obs=x)

    with pytest.raises(StructureError, match="support") as refused:
        make(tmp_path / "run", Coin()).fit()
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "metrics.jsonl"]


# ---- schedules ----


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_depend_on_progress_alone(name: str) -> None:
    progress = [i / 50 for i in range(51)]
    once = [SCHEDULES[name](p) for p in progress]
    assert [SCHEDULES[name](p) for p in reversed(progress)] == once[::-1]
    assert once[0] == 1
    assert all(0 <= after <= before for before, after in pairwise(once))


def test_schedules_have_their_closed_forms() -> None:
    assert SCHEDULES["linear"](0.25) == 0.75
    assert SCHEDULES["cosine"](0.5) == pytest.approx(0.5)
    assert SCHEDULES["cosine"](1.0) == 0
    passes = [3**i for i in range(8)]  # Burda et al. 2016: 3^i passes at the rate 0.001 * 10^(-i/7)
    starts = [sum(passes[:i]) for i in range(8)]
    for i, start in enumerate(starts):
        middle = (start + passes[i] / 2) / sum(passes)
        assert SCHEDULES["burda"](middle) == pytest.approx(10 ** (-i / 7))


def test_each_step_uses_the_rate_of_its_moment(tmp_path: Path) -> None:
    rates = []
    trainer = make(tmp_path / "run", schedule="cosine", steps=10)
    step = trainer.svi.step
    trainer.svi.step = lambda x: (rates.append(trainer.svi.optim.optimizer.param_groups[0]["lr"]), step(x))[1]
    trainer.fit()
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * i / 10)) for i in range(10)])


# ---- checkpoints ----


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


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": math.nan}, "trainer.learning_rate"),
        ({"learning_rate": math.inf}, "finite"),
        ({"schedule": "cosin"}, "constant, linear, cosine, burda"),
        ({"log_every": 0}, "trainer.log_every"),
        ({"steps": -1}, "trainer.steps"),
        ({"checkpoint_seconds": -1.0}, "trainer.checkpoint_seconds"),
    ],
)
def test_bad_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainerSettings(**settings)
