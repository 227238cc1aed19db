"""What importance-sampled log p(x) costs, against the decoder's matrix products alone."""

import time
from typing import Any

import torch
from torch import Tensor, nn


def evidence_times(data: int, particles: int, rounds: int) -> dict[str, list[float]]:
    """Seconds for ``data`` images of ``particles`` samples: products alone, eager and compiled weights.

    Of one thread processor time, of several the clock, as for steps. The products are those of one image's samples at
    a time, by ``torch.mm`` and by oneDNN. Eager weights are timed for a tenth of the images and multiplied.
    """
    from benchmarks.parts import vae
    from benchmarks.timing import bits
    from inference.evaluate import evaluating, log_evidence
    from inference.weights import CompiledWeights

    model, guide, _ = vae()
    x = bits(1, data)[0]
    layers: Any = [layer for layer in model.likelihood.net.modules() if isinstance(layer, nn.Linear)]
    inputs = [torch.randn(particles, layer.in_features) for layer in layers]
    timer = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    compiled, few = CompiledWeights(model, guide), max(1, data // 10)

    def products(multiply: Any) -> None:
        for _ in range(data):
            for layer, given in zip(layers, inputs, strict=True):
                multiply(given, layer.weight)

    turns = {
        "products": (lambda: products(lambda a, b: torch.mm(a, b.T)), 1.0),
        "products by oneDNN": (lambda: products(_by_onednn), 1.0),
        "eager": (lambda: log_evidence(model, guide, x[:few], particles), data / few),
        "compiled": (lambda: log_evidence(model, guide, x, particles, weigh=compiled), 1.0),
    }
    times: dict[str, list[float]] = {name: [] for name in turns}
    with evaluating(model, guide, seed=0):
        for turn in range(rounds + 1):
            for name, (run, factor) in (turns if turn % 2 else dict(reversed(turns.items()))).items():
                start = timer()
                run()
                if turn:  # the first round compiles
                    times[name].append((timer() - start) * factor)
    return times


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
