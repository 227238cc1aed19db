"""What importance-sampled log p(x) costs, against the decoder's matrix products alone."""

import time

import torch
from torch import nn


def evidence_times(data: int, particles: int, rounds: int) -> dict[str, list[float]]:
    """Processor seconds for ``data`` images of ``particles`` samples: products alone, eager and compiled weights."""
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

    def faster_products() -> None:
        for _ in range(data):
            for layer, given in zip(layers, inputs, strict=True):
                torch.ops.mkldnn._linear_pointwise(given, layer.weight, None, "none", [], "")

    turns = {
        "products": products,
        "products by oneDNN": faster_products,
        "eager": lambda: log_evidence(model, guide, x, particles),
        "compiled": lambda: log_evidence(model, guide, x, particles, weigh=compiled),
    }
    times: dict[str, list[float]] = {name: [] for name in turns}
    with evaluating(model, guide, seed=0):
        for turn in range(rounds + 1):
            for name, run in turns.items():
                start = time.process_time()
                run()
                if turn:  # the first round compiles
                    times[name].append(time.process_time() - start)
    return times
