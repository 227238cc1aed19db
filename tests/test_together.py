"""Runs of a grid that train together, from the command line: each ends as if it had been alone."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from inference.config import ConfigError
from inference.console import Console, Quiet
from inference.grid import expand, run_grid
from inference.groups import in_groups
from inference.signals import Interrupted
from inference.together import train_together
from inference.vectorized import VectorizedSVI
from run import main

TINY = [
    *("trainer.steps=30", "trainer.log_every=7", "trainer.validations=3", "evaluation.data=20", "evaluation.draws=2"),
    *("encoder.hidden=[5]", "decoder.hidden=[5]", "model.latent_dim=2", "evaluation.surgery_data=50"),
    "evaluation.particles=20",
]
GRID = ["objective=beta", "objective.beta=0.5,2", "trainer.learning_rate=1e-3,1e-2", "seed=0,3"]


uncompiled = partial(VectorizedSVI, inductor=False)


def end_of(folder: Path) -> dict[str, Any]:
    """What a run ends with, but for its times."""
    index = json.loads((folder / "checkpoint" / "checkpoint.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "tensors-" not in p.name),
        "config": (folder / "config.yaml").read_text().replace(str(folder), ""),
        "rows": [{k: v for k, v in row.items() if k != "seconds"} for row in rows],
        "summary": {k: v for k, v in summary.items() if "second" not in k},
        "tensors": safetensors.torch.load((folder / "checkpoint" / index["tensors"]).read_bytes()),
        "batches": index["state"]["batches"],
    }


def assert_same_end(folder: Path, other: Path) -> None:
    ours, theirs = end_of(folder), end_of(other)
    for what in ("files", "config", "batches"):
        assert ours[what] == theirs[what]
    torch.testing.assert_close(ours["tensors"], theirs["tensors"], rtol=1e-7, atol=1e-9)
    for own, alone in zip([*ours["rows"], ours["summary"]], [*theirs["rows"], theirs["summary"]], strict=True):
        assert own.keys() == alone.keys()
        for name in own:
            expected = pytest.approx(alone[name], rel=1e-6) if isinstance(alone[name], float | list) else alone[name]
            assert own[name] == expected, name


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.set_default_dtype(torch.float64)
    together, alone = tmp_path_factory.mktemp("together"), tmp_path_factory.mktemp("alone")
    for folder, how in ((together, "yes"), (alone, "no")):
        assert main(["train", "-m", *GRID, *TINY, "grid.jobs=1", f"grid.together={how}", f"run.dir={folder}"]) == 0
    return together, alone


def test_each_run_of_a_grid_ends_as_if_alone(grids):
    together, alone = grids
    names = [point.name for point in expand([*GRID, *TINY])]
    assert len(names) == 8
    for name in names:
        assert_same_end(together / name, alone / name)
    ends = [end_of(together / name)["summary"]["test/elbo"] for name in names]
    assert len({round(end, 3) for end in ends}) == 8  # eight runs, not one
    tables = [json.loads((folder / "table.json").read_text()) for folder in grids]
    for ours, theirs in zip(*tables, strict=True):
        timeless = [key for key in theirs if "second" not in key]
        assert [ours[k] for k in timeless] == [
            pytest.approx(theirs[k], rel=1e-6) if isinstance(theirs[k], float) else theirs[k] for k in timeless
        ]


def test_stopped_runs_go_on_together_to_the_same_end(grids, tmp_path, monkeypatch):
    """A signal in the middle: every run writes its checkpoint, and the same command goes on."""
    monkeypatch.setattr("inference.together.VectorizedSVI", uncompiled)
    points = expand([*GRID, *TINY])[:2]
    runs = [(point.arguments, tmp_path / point.name) for point in points]
    stopped = _stop_at(13, runs)
    assert [json.loads((f / "checkpoint" / "checkpoint.json").read_text())["state"]["step"] for _, f in runs] == [
        13,
        13,
    ]
    assert "SIGTERM" in str(stopped)
    results = train_together(runs)
    assert all("error" not in result for result in results)
    for point in points:
        assert_same_end(tmp_path / point.name, grids[1] / point.name)
    assert train_together(runs) == results  # nothing is left to do


def _stop_at(step: int, runs: list[tuple[Any, Path]]) -> Interrupted:
    import os
    import signal

    from inference.trainer import Trainer

    original = Trainer._log

    def log(self: Trainer) -> None:
        original(self)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_log", log)
        with pytest.raises(Interrupted) as stopped:
            train_together(runs)
    return stopped.value


def test_one_bad_run_does_not_cost_the_others_theirs(tmp_path, monkeypatch):
    monkeypatch.setattr("inference.together.VectorizedSVI", uncompiled)
    points = expand([*TINY, "optimizer=sgd", "trainer.learning_rate=1e-5,1e308"])
    _, (good, bad) = run_grid(points, tmp_path, Quiet(), jobs=1, together="yes")
    assert "error" not in good
    assert "not finite" in bad["error"]


def test_which_runs_train_together():
    def groups(*arguments: str, jobs: int = 1, together: str = "yes") -> list[list[int]]:
        return in_groups([point.arguments for point in expand(arguments)], jobs, together)

    assert groups("seed=0,1,2,3", jobs=2) == [[0, 1], [2, 3]]
    assert groups("guide=diagonal,full", "seed=0,1") == [[0, 1], [2, 3]]
    assert groups("guide=diagonal,full", "seed=0,1", together="no") == [[0], [1], [2], [3]]
    assert groups("seed=0,1", "trainer.steps=100", together="auto") == [[0], [1]]
    assert groups("seed=0,1", "trainer.steps=20000", together="auto") == [[0, 1]]
    assert groups("seed=0,1", "trainer.steps=20000", "trainer.engine=compiled", together="auto") == [[0], [1]]
    assert groups("seed=0,1", "trainer.epochs=1000", together="auto") == [[0], [1]]
    with pytest.raises(ConfigError, match="no two runs"):
        groups("guide=diagonal,full")
    # no process of four is left without work; who insists gets pairs
    two, pairs = ["guide=diagonal,full", "seed=0,1,2,3,4,5"], [[0, 1], [2, 3]]
    assert groups(*two, jobs=4) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert groups("seed=0,1,2,3", jobs=4) == pairs
    assert groups("seed=0,1,2,3", "trainer.steps=20000", jobs=4, together="auto") == [[0], [1], [2], [3]]


def test_on_a_gpu_all_that_are_alike_train_together(monkeypatch):
    """Processes would share it, and each of their small steps would leave most of it idle."""
    monkeypatch.setattr("inference.assemble.find_device", lambda name: torch.device("cuda", 0))
    runs = [point.arguments for point in expand(["device=cuda", "guide=diagonal,full", "seed=range(0,32)"])]
    assert in_groups(runs, 16, "auto") == [[*range(32)], [*range(32, 64)]]


def test_the_grid_says_so(grids, tmp_path, capsys):
    folder = grids[0]
    run_grid(expand([*GRID, *TINY]), folder, Console(), jobs=1, together="yes")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "together" in line]
    assert line.startswith("together  8 runs that differ in values alone share compiled steps")
    assert main(["-m", *GRID, *TINY, "grid.together=maybe", f"run.dir={tmp_path / 'grid'}"]) == 2
    assert "grid.together=maybe is not one of auto, yes, no" in capsys.readouterr().err
