"""The training loop: resumed in mid-epoch, stopped by signals and NaN; checkpoints crashed at every file operation."""

import math
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from inference import checkpoint
from inference.log import read_rows
from inference.particles import StructureError
from inference.schedules import SCHEDULES
from inference.signals import Interrupted
from inference.trainer import Diverged, TrainerSettings
from tests.small_trainers import PER_EPOCH, Model, make


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
