"""Interleaved timing: every round gives each contender its turn, so that a busy moment is busy for all."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

Times = dict[str, list[float]]


def bits(count: int, batch_size: int) -> list[Tensor]:
    """Batches of random bits, ``(batch_size, 784)``, as dense as MNIST's."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(batch_size, 784, generator=generator) < 0.13).float() for _ in range(count)]


def interleaved(names: Sequence[str], batch_size: int, rounds: int, block: int) -> tuple[Times, Times]:
    """Milliseconds for a step of each contender, one number for each round: by the clock, and of processor time.

    Processor time is that of all threads. On a busy machine the clock measures the others as well.
    """
    from benchmarks.contenders import CONTENDERS, RUNS_IN

    batches = bits(block, batch_size)
    contenders = {name: CONTENDERS[name]() for name in names}
    for steps in contenders.values():
        for _ in range(2):
            steps(batches)  # compiled by now
    wall: Times = {name: [] for name in names}
    processor: Times = {name: [] for name in names}
    for turn in range(rounds):
        order = list(contenders) if turn % 2 == 0 else list(contenders)[::-1]
        for name in order:
            start, used = time.perf_counter(), time.process_time()
            contenders[name](batches)
            per_step = 1e3 / block / RUNS_IN.get(name, 1)
            wall[name].append((time.perf_counter() - start) * per_step)
            processor[name].append((time.process_time() - used) * per_step)
    return wall, processor


def ratios(times: dict[str, list[float]], above: str, below: str) -> dict[str, float]:
    """Median and quartiles of one contender's time over another's, round by round."""
    pairs = sorted(a / b for a, b in zip(times[above], times[below], strict=True))
    low, middle, high = statistics.quantiles(pairs, n=4)
    return {"median": middle, "low quartile": low, "high quartile": high}


def alone(name: str, batch_size: int, threads: int) -> dict[str, float]:
    """Seconds to start and to take the first steps with cold caches, and peak memory, in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        arguments = [name, str(batch_size), str(threads), str(time.time())]
        command = [sys.executable, "-m", "benchmarks.timing", *arguments]
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _measure(name: str, batch_size: int, threads: int, launched: float) -> dict[str, float]:
    torch.set_num_threads(threads)
    from benchmarks.contenders import CONTENDERS

    steps = CONTENDERS[name]()
    start = time.time()
    steps(bits(4, batch_size))
    return {"start seconds": start - launched, "first steps seconds": time.time() - start, "peak MiB": _peak_mib()}


def _peak_mib() -> float:
    """Peak resident memory of this program; ``getrusage`` would count the parent that it was forked from."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))
