"""Runs killed at random moments, by every signal, and resumed: they end, to the bit, as if nobody had disturbed them.

The processes are real, so are the signals. A run is killed again and again, also while it resumes, evaluates or draws,
until it has got to its end.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.forked import ROOT, Child, WarmParent

STEPS = 240
SMALL = (
    f"trainer.steps={STEPS} trainer.checkpoint_seconds=0.01 trainer.log_every=7 encoder.hidden=[8] decoder.hidden=[8] "
    "model.latent_dim=2 evaluation.particles=20 evaluation.elbo_samples=2 evaluation.data=30 evaluation.draws=2"
).split()
RECIPES = {
    "adam, cosine, dynamic bits": "trainer.schedule=cosine trainer.gradient_clip=1",
    "momentum, burda, iwae": "optimizer=sgd optimizer.momentum=0.9 trainer.schedule=burda objective=iwae "
    "objective.particles=2 trainer.checkpoint_seconds=0",
    "adagrad, rows read ahead by a worker": "optimizer=adagrad data.resident=no data.batch_size=31",
    "adamax, buffers, dequantization": "optimizer=adamax data.binarization=none likelihood=optimal_gaussian "
    "trainer.schedule=linear",
    "compiled steps, several per call, annealed": "trainer.engine=compiled trainer.steps_per_call=3 objective=annealed "
    "data.batch_size=50 trainer.schedule=cosine",
}
MOMENTS = ["start", "training", "training", "resuming", "training", "training", "resuming", "after"]
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmParent]:
    with WarmParent() as parent:
        yield parent


def step_of(folder: Path) -> int:
    """The step of the checkpoint, -1 before the first."""
    try:
        return json.loads((folder / "checkpoint" / "checkpoint.json").read_text())["state"]["step"]
    except FileNotFoundError:
        return -1


def wait_for(child: Child, reached: object, *, seconds: float = 120.0) -> None:
    """Until ``reached()``, or the child ends."""
    deadline = time.monotonic() + seconds
    while not reached() and child.poll() is None:  # type: ignore[operator]
        assert time.monotonic() < deadline, child.log.read_text()
        time.sleep(0.0005)


class Chain:
    """One run, killed as it goes."""

    def __init__(self, warm: WarmParent, folder: Path, options: list[str], seed: int) -> None:
        self.warm, self.folder, self.options = warm, folder, options
        self.random = random.Random(seed)
        self.signals = self.random.sample(list(STATUS) * 3, k=len(MOMENTS))
        self.log = folder.with_suffix(".log")
        self.deaths: list[tuple[signal.Signals, int]] = []

    def start(self) -> Child:
        self.log.unlink(missing_ok=True)
        if (self.folder / "config.yaml").exists():
            return self.warm.start("resume", self.folder, log=self.log)
        return self.warm.start("train", *self.options, f"run.dir={self.folder}", log=self.log)

    def kill_at_a_random_moment(self) -> None:
        place, draw = len(self.deaths), self.random
        child, moment = self.start(), MOMENTS[place]
        if moment == "start":  # about the time of the configuration and the first checkpoint
            wait_for(child, (self.folder / "config.yaml").exists)
            time.sleep(draw.uniform(0, 0.02))
        elif moment == "training":
            target = draw.uniform(0.7, 1.1) * STEPS * place / len(MOMENTS)
            wait_for(child, lambda: step_of(self.folder) >= target)
            time.sleep(draw.uniform(0, 0.03))
        elif moment == "resuming":
            time.sleep(draw.uniform(0, 0.15))
        else:  # scoring, drawing, reporting
            wait_for(child, lambda: step_of(self.folder) >= STEPS)
            # A signal that can be caught is put off while files are drawn, and then has nothing left to stop.
            time.sleep(draw.uniform(0, 0.8 if self.signals[place] == signal.SIGKILL else 0.05))
        self.kill(child, self.signals[place])

    def kill(self, child: Child, signum: signal.Signals) -> None:
        begun = (self.folder / "config.yaml").exists()
        child.kill(signum, group=signum == signal.SIGINT)
        status = child.wait()
        if status == 0:  # it was faster
            return
        words = self.log.read_text() if self.log.exists() else ""  # killed before it could say anything
        assert "Traceback" not in words, words
        self.deaths.append((signum, step_of(self.folder)))
        if status == -signum:  # at once, as it must be by SIGKILL, and is by all before run.py is there to catch them
            assert signum == signal.SIGKILL or not words
            return
        assert status == STATUS[signum], words
        last = words.splitlines()[-1]
        assert last.startswith(f"lowerbound: stopped by {signum.name}"), words
        assert last.endswith(f"python run.py resume {self.folder}") or not begun, words


def end_of(folder: Path) -> dict[str, object]:
    """Everything that a run ends with, apart from times."""
    index = json.loads((folder / "checkpoint" / "checkpoint.json").read_text())
    state = {**index["state"], "seconds": None}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return {
        "tensors": (folder / "checkpoint" / index["tensors"]).read_bytes(),
        "state": state,
        "rows": [{**row, "seconds": None} for row in rows],
        "summary": {key: value for key, value in summary.items() if "seconds" not in key and "per_second" not in key},
        "config": {**config, "run": None},
        "pictures": {path.name: path.read_bytes() for path in sorted((folder / "figures").iterdir())},
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "tensors-" not in path.name),
    }


def assert_same_end(folder: Path, undisturbed: Path) -> None:
    ours, theirs = end_of(folder), end_of(undisturbed)
    for what in theirs:
        assert ours[what] == theirs[what], f"{what} of {folder} and {undisturbed} differ"


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.slow if "compiled" in name else ()) for name in RECIPES]
)
def test_killed_runs_end_as_if_nothing_had_happened(recipe: str, warm: WarmParent, tmp_path: Path) -> None:
    options = [*SMALL, *RECIPES[recipe].split()]
    undisturbed = tmp_path / "undisturbed"
    assert warm.start("train", *options, f"run.dir={undisturbed}", log=tmp_path / "undisturbed.log").wait(300) == 0
    chain = Chain(warm, tmp_path / "killed", options, seed=sorted(RECIPES).index(recipe))
    for _ in range(3 * len(MOMENTS)):
        before = len(chain.deaths)
        chain.kill_at_a_random_moment()
        if len(chain.deaths) == len(MOMENTS):
            break
        if len(chain.deaths) == before:  # it was done before the signal came: take its page away and kill again
            (chain.folder / "report.html").unlink(missing_ok=True)
    assert [signum for signum, _ in chain.deaths] == chain.signals
    assert len({step for _, step in chain.deaths}) >= 4, f"not at random moments: {chain.deaths}"
    child = chain.start()
    assert child.wait() == 0, chain.log.read_text()
    assert_same_end(chain.folder, undisturbed)


def test_the_comparison_sees_another_seed(warm: WarmParent, tmp_path: Path) -> None:
    for seed in (0, 1):
        log = tmp_path / f"{seed}.log"
        options = [*SMALL, "trainer.steps=8", f"seed={seed}"]
        assert warm.start("train", *options, f"run.dir={tmp_path / str(seed)}", log=log).wait() == 0
    ours, theirs = end_of(tmp_path / "0"), end_of(tmp_path / "1")
    assert {what for what in ours if ours[what] != theirs[what]} >= {"tensors", "rows", "summary", "pictures"}


def test_a_run_killed_between_its_configuration_and_its_first_checkpoint(warm: WarmParent, tmp_path: Path) -> None:
    options = [*SMALL, "trainer.steps=30"]
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    assert warm.start("train", *options, f"run.dir={whole}", log=tmp_path / "whole.log").wait() == 0
    bare.mkdir()
    shutil.copy(whole / "config.yaml", bare / "config.yaml")
    assert warm.start("resume", bare, log=tmp_path / "bare.log").wait() == 0
    assert_same_end(bare, whole)


def test_a_second_process_is_kept_out_until_the_first_is_gone(warm: WarmParent, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "second.log"
    options = [*SMALL, "data.resident=no", "trainer.steps=100000"]
    first = warm.start("train", *options, f"run.dir={folder}", log=tmp_path / "first.log")
    wait_for(first, lambda: step_of(folder) > 0)
    assert warm.start("resume", folder, log=log).wait() == 2
    assert warm.start("train", *options, f"run.dir={folder}", log=log).wait() == 2
    assert log.read_text().splitlines() == [
        f"lowerbound: {folder} is in use by another process",
        f"lowerbound: run.dir={folder} holds a run already: there is a config.yaml; continue it with resume, or choose "
        "another directory",
    ]
    first.kill(signal.SIGKILL)  # its worker, which reads ahead, outlives it for a while
    first.wait()
    second = warm.start("resume", folder, log=tmp_path / "third.log")
    before = step_of(folder)
    wait_for(second, lambda: step_of(folder) > before)
    second.kill(signal.SIGTERM)
    assert second.wait() == 143


def test_a_grid_stops_with_all_its_processes(warm: WarmParent, tmp_path: Path) -> None:
    folder, log = tmp_path / "grid", tmp_path / "grid.log"
    options = [*SMALL, "trainer.steps=1000000", "seed=0,1,2", "grid.jobs=2", "grid.together=no", f"run.dir={folder}"]
    grid = warm.start("train", "-m", *options, log=log)
    wait_for(grid, lambda: min(step_of(folder / f"seed={seed}") for seed in (0, 1)) > 0, seconds=120)
    grid.kill(signal.SIGTERM)
    assert grid.wait() == 143
    assert (
        log.read_text() == f"lowerbound: stopped by SIGTERM. To go on, give the same command, with run.dir={folder}\n"
    )
    assert not (folder / "seed=2").exists()
    deadline = time.monotonic() + 10  # for the tracker that multiprocessing starts, which follows by itself
    while _lives(grid.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_study_stopped_between_its_parts_leaves_no_page_and_goes_on(warm: WarmParent, tmp_path: Path) -> None:
    folder, log = tmp_path / "study", tmp_path / "study.log"
    tiny = [*SMALL, "trainer.steps=3", "study.guides=[diagonal]", "study.seeds=[0]", "study.jobs=1"]
    command = ["study", "families", *tiny, "study.data=2", "study.particles=9", f"run.dir={folder}"]
    study = warm.start(*command, "study.steps=1000000", log=log)
    wait_for(study, (folder / "runs" / "table.json").exists)  # its run is done, and the search for gaps has no end
    study.kill(signal.SIGTERM)
    assert study.wait() == 143, log.read_text()
    assert log.read_text().startswith("lowerbound: stopped by SIGTERM. ")
    assert log.read_text().endswith(f"give the same command, with run.dir={folder}\n")
    assert [path.name for path in folder.iterdir()] == ["runs"]
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/summary.json")}
    assert len(finished) == 1
    assert warm.start(*command, "study.steps=1", log=log).wait() == 0, log.read_text()
    assert {path.name for path in folder.iterdir()} == {"runs", "report.html", "table.csv", "table.json", "figures"}
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/summary.json")} == finished


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_command_itself_stops_with_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    command = [sys.executable, "run.py", "train", *SMALL, "trainer.steps=1000000", f"run.dir={folder}"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while step_of(folder) < 1:
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = words.splitlines()
    assert line.startswith("lowerbound: stopped by SIGINT after step ")
    assert line.endswith(f"; the checkpoint is written. Continue with: python run.py resume '{folder}'")


def test_a_signal_during_the_imports_leaves_no_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "run.py", "train", f"run.dir={tmp_path / 'run'}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 143
    assert words == "lowerbound: stopped by SIGTERM\n"
    assert not (tmp_path / "run").exists()
