"""Interleaved timing: every round gives each contender its turn, so that a busy moment is busy for all."""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def bits(count: int, batch_size: int) -> list[Tensor]:
    """Batches of random bits, ``(batch_size, 784)``, as dense as MNIST's."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(batch_size, 784, generator=generator) < 0.13).float() for _ in range(count)]


def interleaved(names: Sequence[str], batch_size: int, rounds: int, block: int) -> dict[str, list[float]]:
    """Milliseconds for a step of each contender, one number for each round."""
    from benchmarks.contenders import CONTENDERS, RUNS_IN

    batches = bits(block, batch_size)
    contenders = {name: CONTENDERS[name]() for name in names}
    for steps in contenders.values():
        for _ in range(2):
            steps(batches)  # compiled by now
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        order = list(contenders) if turn % 2 == 0 else list(contenders)[::-1]
        for name in order:
            start = time.perf_counter()
            contenders[name](batches)
            times[name].append((time.perf_counter() - start) / block / RUNS_IN.get(name, 1) * 1e3)
    return times


def ratios(times: dict[str, list[float]], above: str, below: str) -> dict[str, float]:
    """Median and quartiles of one contender's time over another's, round by round."""
    pairs = sorted(a / b for a, b in zip(times[above], times[below], strict=True))
    low, middle, high = statistics.quantiles(pairs, n=4)
    return {"median": middle, "low quartile": low, "high quartile": high}


def alone(name: str, batch_size: int, threads: int) -> dict[str, float]:
    """Import time, time of the first steps with cold caches, and peak memory of a contender in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        command = [sys.executable, "-m", "benchmarks.timing", name, str(batch_size), str(threads)]
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _measure(name: str, batch_size: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    start = time.perf_counter()
    from benchmarks.contenders import CONTENDERS

    steps = CONTENDERS[name]()
    ready = time.perf_counter()
    batches = bits(4, batch_size)
    steps(batches)
    first = time.perf_counter()
    steps(batches)
    again = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "import seconds": ready - start + _TORCH_SECONDS,
        "first steps seconds": max(first - ready - (again - first), 0.0),
        "peak MiB": peak,
    }


_TORCH_SECONDS = 0.0
if __name__ == "__main__":
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    _TORCH_SECONDS = time.perf_counter() - begin
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
