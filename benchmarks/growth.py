"""How cost grows with the size of the latent, with particles, samples and data."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

LATENTS, PARTICLES = (10, 50, 200), (1, 10, 50)
SAMPLES, IMAGES, TRAINING = (1000, 2000, 5000, 10_000), (5, 10, 20, 40), (1000, 10_000, 60_000)
BATCH, ROUNDS = 100, 7


def growth() -> dict[str, dict[str, float]]:
    """Processor milliseconds, medians: of a step by latent size, particles and data; of log p(x) by S and by N."""
    return {
        "step, latent size": _steps({str(d): {"latent": d} for d in LATENTS}),
        "step, particles of the bound": _steps({str(k): {"particles": k} for k in PARTICLES}),
        "step with its batch, training data": _training(),
        "log p(x) of 5 images, samples": _evidence({str(s): (5, s) for s in SAMPLES}),
        "log p(x) of 1000 samples, images": _evidence({str(n): (n, 1000) for n in IMAGES}),
    }


def _medians(turns: dict[str, Callable[[], Any]], per: int = 1) -> dict[str, float]:
    """Interleaved, after a first turn that compiles."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(ROUNDS + 1):
        for name, run in turns.items():
            start = time.process_time()
            run()
            if turn:
                times[name].append((time.process_time() - start) * 1e3 / per)
    return {name: statistics.median(values) for name, values in times.items()}


def _svi(**options: int) -> Any:
    from functools import partial

    from benchmarks.parts import vae
    from inference.compiled import CompiledSVI
    from inference.engine import SharedOptimizer

    model, guide, objective = vae(**options)
    parameters = [*model.parameters(), *guide.parameters()]
    optimizer = SharedOptimizer(parameters, partial(torch.optim.Adam, fused=True), 1e-3)
    return CompiledSVI(model, guide, optimizer, objective)


def _steps(options: dict[str, dict[str, int]]) -> dict[str, float]:
    from benchmarks.timing import bits
    from inference.particles import validation

    xs = bits(5, BATCH)
    engines = {name: _svi(**given) for name, given in options.items()}
    with validation(False):
        return _medians({name: (lambda svi=svi: svi.steps(xs)) for name, svi in engines.items()}, len(xs))


def _training() -> dict[str, float]:
    """Shuffled and freshly binarized batches of grey images that lie on the device, and the steps on them."""
    from inference.data import Batches, Dataset, Source
    from inference.particles import validation

    svi, turns = _svi(), {}
    for size in TRAINING:
        rows = torch.randint(0, 256, (size, 784), dtype=torch.uint8)
        splits = {"train": rows, "valid": rows[:1], "test": rows[:1]}
        dataset = Dataset("grey", "grey", (784,), 256, "dynamic", splits, {}, "", "bernoulli")
        turns[str(size)] = _first_batches(svi, Batches(Source(dataset, "train", "binary", "cpu"), BATCH))
    with validation(False):
        return _medians(turns, 10)


def _first_batches(svi: Any, batches: Any) -> Callable[[], None]:
    def run() -> None:
        taken = 0
        while taken < 10:
            for x in batches:
                svi.step(x)
                taken += 1
                if taken == 10:
                    return

    return run


def _evidence(sizes: dict[str, tuple[int, int]]) -> dict[str, float]:
    from benchmarks.parts import vae
    from benchmarks.timing import bits
    from inference.evaluate import evaluating, log_evidence
    from inference.weights import CompiledWeights

    model, guide, _ = vae()
    x, weigh = bits(1, max(n for n, _ in sizes.values()))[0], CompiledWeights(model, guide)
    with evaluating(model, guide, seed=0):
        weigh(x[:1], 1000)  # one function for all of them
        turns = {
            name: (lambda n=n, s=s: log_evidence(model, guide, x[:n], s, 0, 8 * 784 * 4 * 1000, weigh=weigh))
            for name, (n, s) in sizes.items()
        }
        return _medians(turns)
