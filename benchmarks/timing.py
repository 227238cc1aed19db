"""Interleaved timing: every round gives each contender its turn, so that a busy moment is busy for all."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Times = dict[str, list[float]]
STEPS = 20  # in a contender's turn, fewer where they are long


def bits(count: int, batch_size: int, device: str = "cpu") -> list[Tensor]:
    """Batches of random bits, ``(batch_size, 784)``, as dense as MNIST's."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.rand(batch_size, 784, generator=generator) < 0.13 for _ in range(count))
    return [x.float().to(device) for x in made]


def interleaved(
    case: str, names: Iterable[str], batch_size: int, rounds: int, seconds: float, device: str
) -> dict[str, Any]:
    """Milliseconds for a step of each contender, one number for each round: by the clock, and of processor time.

    Processor time is that of all threads. On a busy machine the clock measures the others as well.

    Args:
        case: which model.
        names: contenders.
        batch_size: data in a batch.
        rounds: turns of each contender; fewer, but at least 5, where they would take longer than ``seconds``.
        seconds: about how long the rounds may take.
        device: cpu or cuda.
    """
    from benchmarks.contenders import RUNS_IN, Missing, contender

    contenders, missing, first = {}, {}, {}
    block = STEPS if batch_size * (50 if case == "iwae" else 1) < 1000 else 4
    batches = bits(block, batch_size, device)
    for name in names:
        start = time.perf_counter()
        try:
            contenders[name] = contender(name, case, batch_size, device)
            _turn(contenders[name], batches, device)  # compiled by now
            first[name] = time.perf_counter() - start
        except (Missing, torch.OutOfMemoryError) as why:  # the others are to be measured all the same
            missing[name] = str(why).partition("\n")[0]
            contenders.pop(name, None)
    turns = {name: _turn(steps, batches, device) for name, steps in contenders.items()}
    rounds = max(5, min(rounds, int(seconds / sum(wall for wall, _ in turns.values()))))
    wall: Times = {name: [] for name in contenders}
    processor: Times = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in list(contenders) if turn % 2 == 0 else list(contenders)[::-1]:
            clock, used = _turn(contenders[name], batches, device)
            wall[name].append(clock * 1e3 / block / RUNS_IN.get(name, 1))
            processor[name].append(used * 1e3 / block / RUNS_IN.get(name, 1))
    return {"milliseconds": wall, "processor milliseconds": processor, "missing": missing, "first call seconds": first}


def _turn(steps: Any, batches: Sequence[Tensor], device: str) -> tuple[float, float]:
    start, used = time.perf_counter(), time.process_time()
    steps(batches)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - used


def ratio(times: Times, above: str, below: str) -> dict[str, float]:
    """Median and quartiles of one contender's time over another's, round by round."""
    pairs = sorted(a / b for a, b in zip(times[above], times[below], strict=True))
    low, middle, high = statistics.quantiles(pairs, n=4)
    return {"median": middle, "low quartile": low, "high quartile": high}


def alone(name: str, case: str, batch_size: int, threads: int, device: str) -> dict[str, float]:
    """Seconds to import and start, and to the first result with cold caches, and peak memory, in its own process.

    Raises:
        Missing: it has no place there, or failed.
    """
    from benchmarks.contenders import Missing

    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        arguments = [name, case, str(batch_size), str(threads), device, str(time.time())]
        command = [sys.executable, "-m", "benchmarks.timing", *arguments]
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def _measure(name: str, case: str, batch_size: int, threads: int, device: str, launched: float) -> dict[str, float]:
    torch.set_num_threads(threads)
    from benchmarks.contenders import contender

    steps = contender(name, case, batch_size, device)
    start = time.time()
    _turn(steps, bits(5, batch_size, device), device)
    taken = time.time() - start
    return {"start seconds": start - launched, "first steps seconds": taken, "peak MiB": _peak_mib(device)}


def _peak_mib(device: str) -> float:
    """Peak memory of this program, on a GPU what its arrays take there.

    On a CPU what is resident; ``getrusage`` would count the parent that it was forked from.
    """
    if device == "cuda":
        arrays = sys.modules["jax"].local_devices()[0].memory_stats() if "jax" in sys.modules else {}
        return max(arrays.get("peak_bytes_in_use", 0), torch.cuda.max_memory_allocated()) / 2**20
    status = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:3], *map(int, sys.argv[3:5]), sys.argv[5], float(sys.argv[6]))))
