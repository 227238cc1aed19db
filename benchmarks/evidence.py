"""What importance-sampled log p(x) costs, against the decoder's matrix products alone."""

import time

import torch
from torch import nn


def evidence_times(data: int, particles: int, rounds: int) -> dict[str, list[float]]:
    """Seconds for ``data`` images at ``particles`` samples each: products alone, eager and compiled weights."""
    from benchmarks.contenders import parts
    from benchmarks.timing import bits
    from inference.evaluate import evaluating, log_evidence
    from inference.weights import CompiledWeights

    model, guide, _ = parts()
    x = bits(1, data)[0]
    layers = [layer for layer in model.likelihood.net.modules() if isinstance(layer, nn.Linear)]
    inputs = [torch.randn(particles, layer.in_features) for layer in layers]
    compiled = CompiledWeights(model, guide)

    def products() -> None:
        for _ in range(data):
            for layer, given in zip(layers, inputs, strict=True):
                torch.mm(given, layer.weight.T)

    turns = {
        "decoder's products": products,
        "eager": lambda: log_evidence(model, guide, x, particles),
        "compiled": lambda: log_evidence(model, guide, x, particles, weigh=compiled),
    }
    times: dict[str, list[float]] = {name: [] for name in turns}
    with evaluating(model, guide, seed=0):
        for turn in range(rounds + 1):
            for name, run in turns.items():
                start = time.perf_counter()
                run()
                if turn:  # the first round compiles
                    times[name].append(time.perf_counter() - start)
    return times
