"""The benchmarks compare like with like, and refuse what is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import contenders, evidence, report, timing
from benchmarks.by_hand import MODELS
from benchmarks.contenders import COMPILED, STOCK
from benchmarks.parts import PARTS
from benchmarks.stock import PROGRAMS

ROOT = Path(__file__).resolve().parent.parent


def size(*programs):
    return sum(p.numel() for p in dict.fromkeys(q for program in programs for q in program.parameters()))


@pytest.mark.parametrize("case", MODELS)
def test_contenders_train_models_of_one_size(case):
    torch.set_default_dtype(torch.float32)
    ours, stock, by_hand = size(*PARTS[case]()[:2]), size(PROGRAMS[case]()), size(MODELS[case]())
    assert stock == by_hand
    assert ours == by_hand


def run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_case_that_does_not_exist():
    found = run("--case", "vae", "vaes")
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1] == "benchmarks: no case vaes; accepted: vae, iaf, iwae, vamp, gmm, vq"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    found = run("--device", "cuda")
    assert found.returncode == 2
    last = found.stderr.splitlines()[-1]
    assert last == "benchmarks: --device cuda needs an NVIDIA GPU that torch can use; accepted here: cpu"


@pytest.mark.parametrize("others", [["cpu_2_threads"], ["cpu_1_thread", "em_8_thread"], []])
def test_the_readme_shows_the_most_threads(others, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PICTURE", tmp_path / "speed.png")
    for other in others:
        (tmp_path / f"{other}.json").touch()
    times = {STOCK: [4.0, 4.4, 4.2], COMPILED: [2.0, 2.1, 2.2]}
    found = {"processor milliseconds": times, "milliseconds": times, "missing": {}}
    results = {"machine": "a", "threads": 2, "device": "cpu", "versions": "b", "cases": {"vae": {"20": found}}}
    name = "cpu_1_thread" if others == ["cpu_2_threads"] else "cpu_2_threads"
    table = report.write(results, tmp_path, name)
    assert "| Pyro SVI / ours, compiled | 2.00 [" in table
    assert json.loads((tmp_path / f"{name}.json").read_text())["cases"] == results["cases"]
    drawn = [path.name for path in tmp_path.glob("*.png")]
    assert drawn == (["cpu_1_thread.png"] if others == ["cpu_2_threads"] else ["speed.png"])


def test_nothing_to_draw():
    found = run("--draw", "--name", "cpu_0_threads")
    assert found.returncode == 2
    assert found.stderr.startswith("benchmarks: cpu_0_threads was not measured; accepted: --draw with --name cpu_1_")


def test_log_p_takes_every_image_once_and_few_of_them_several_times(monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(evidence, "SLICE", 2)
    x, words = evidence.images(21, "")
    found = evidence.evidence(x, words, 10)
    assert (found["images timed"], [len(times) for times in found["slices"].values()]) == (21, [11] * 4)
    few = evidence.evidence(x[:3], words, 10)
    assert (few["images timed"], [len(times) for times in few["slices"].values()]) == (15, [10] * 4)
    for name, seconds in found["seconds"].items():
        assert seconds == pytest.approx(sum(found["slices"][name]))
    ratio = found["ratios"]["compiled over products"]
    assert ratio["of totals"] == pytest.approx(found["seconds"]["compiled"] / found["seconds"]["products"])
    assert next(evidence.lines(found)).startswith("log p(x) of 21 images (random bits), 10 samples each")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--root", "/nowhere"], "data=mnist: /nowhere/MNIST/raw/train-images-idx3-ubyte.gz is missing."),
        (["--add", "--threads", "1", "--name", "cpu_2_threads"], "--add to "),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(arguments, message):
    found = run("--case", "--no-alone", "--no-growth", *arguments)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.splitlines()[-1].startswith(f"benchmarks: {message}")


def test_each_device_has_its_contenders():
    cpu, gpu = contenders.contenders_on("cpu"), contenders.contenders_on("cuda")
    assert {*cpu, *gpu} == {*contenders.ALL}
    assert {*cpu} - {*gpu} == {contenders.PYTHAE}
    assert {*gpu} - {*cpu} == {contenders.HAND_RECORDED, contenders.MANY_TOGETHER}


def test_a_contender_that_fails_does_not_cost_the_others_their_turns(monkeypatch):
    def fails(batches):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd so on.")

    def runs_eagerly(batches):
        raise contenders.Missing("runs eagerly: it waits")

    made = {COMPILED: fails, "other": runs_eagerly, STOCK: len}
    monkeypatch.setattr(contenders, "contender", lambda name, *rest: made[name])
    found = timing.interleaved("vae", made, 20, 5, 0.1, "cpu")
    assert list(found["milliseconds"]) == [STOCK]
    assert found["missing"] == {
        COMPILED: "CUDA out of memory. Tried to allocate 2 GiB.",
        "other": "runs eagerly: it waits",
    }


def test_a_contender_without_a_place_alone():
    with pytest.raises(contenders.Missing, match=r"not installed|only its plain"):
        timing.alone(contenders.PYTHAE, "gmm", 20, 1, "cpu")


def test_without_stock_pyro_there_is_a_table_and_no_picture(tmp_path):
    found = {"processor milliseconds": {COMPILED: [2.0, 2.1]}, "milliseconds": {COMPILED: [2.0, 2.1]}, "missing": {}}
    results = {"machine": "a", "threads": 1, "device": "cuda", "versions": "b", "cases": {"vae": {"20": found}}}
    assert "| ours, compiled | 2.05 [" in report.write(results, tmp_path, "cuda_1_thread")
    assert not list(tmp_path.glob("*.png"))
