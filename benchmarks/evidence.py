"""What importance-sampled log p(x) costs, against the decoder's matrix products alone."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

SLICE = 50  # images that every contender is timed on before the next are: about a second's work
FEWEST = 9  # turns to take a median and quartiles of; few images are gone through several times for it
EAGER = 10  # eager weights are timed on one image of so many

Turns = dict[str, tuple[Callable[[], Any], float]]


def evidence(x: Tensor, words: str, particles: int) -> dict[str, Any]:
    """Seconds for log p(x) of images ``(N, 784)``: products alone, eager and compiled weights.

    The images are gone through slice by slice, each of them by every contender in turn, in an order that is turned
    round from slice to slice; the first slice is done once before, uncounted, and compiles. Of one thread processor
    time, of several the clock, as for steps. Each is counted once, but for few images, where the turns would be too
    few for quartiles. The products are those of the decoder's three layers for one image's samples at a time, by
    ``torch.mm`` and by oneDNN. Eager weights are timed for a tenth of each slice and multiplied.

    Args:
        x: images.
        words: which they are.
        particles: samples for each.
    """
    from benchmarks.parts import vae
    from benchmarks.timing import ratio
    from inference.evaluate import evaluating
    from inference.weights import CompiledWeights

    model, guide, _ = vae()
    slices = x.split(SLICE)
    contenders = _Contenders(model, guide, CompiledWeights(model, guide), particles)
    timer = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {}
    with evaluating(model, guide, seed=0):
        for turn, some in enumerate([slices[0], *slices * math.ceil(FEWEST / len(slices))]):
            turns = contenders.turns(some)
            for name, (run, factor) in (turns if turn % 2 else dict(reversed(turns.items()))).items():
                start = timer()
                run()
                if turn:
                    times.setdefault(name, []).append((timer() - start) * factor)
            if turn % 20 == 0 and len(slices) > 20:
                print(f"  {turn} of {len(slices)} slices of {SLICE} images", flush=True)
    if contenders.compiled.why_eager is not None:
        raise RuntimeError(f"the weights were not compiled: {contenders.compiled.why_eager}")
    times = {name: times[name] for name in contenders.turns(slices[0])}
    ratios = {
        f"{name} over {products}": {
            **ratio(times, name, products),
            "of totals": sum(times[name]) / sum(times[products]),
        }
        for name in ("eager", "compiled")
        for products in ("products", "products by oneDNN")
    }
    counted = len(x) * math.ceil(FEWEST / len(slices))
    about = {"particles": particles, "images": len(x), "data": words, "images timed": counted}
    return {**about, "seconds": {name: sum(all_) for name, all_ in times.items()}, "ratios": ratios, "slices": times}


class _Contenders:
    def __init__(self, model: nn.Module, guide: nn.Module, compiled: Any, particles: int) -> None:
        self.model, self.guide, self.compiled, self.particles = model, guide, compiled, particles
        decoder: Any = model.likelihood
        layers: Any = [layer for layer in decoder.net.modules() if isinstance(layer, nn.Linear)]
        self.factors = [(torch.randn(particles, layer.in_features), layer.weight) for layer in layers]

    def turns(self, x: Tensor) -> Turns:
        """What each does for some images, and the factor by which its time is to be multiplied."""
        from inference.evaluate import log_evidence

        few = max(1, len(x) // EAGER)
        return {
            "products": (lambda: self._products(len(x), lambda a, b: torch.mm(a, b.T)), 1.0),
            "products by oneDNN": (lambda: self._products(len(x), _by_onednn), 1.0),
            "eager": (lambda: log_evidence(self.model, self.guide, x[:few], self.particles), len(x) / few),
            "compiled": (
                lambda: log_evidence(self.model, self.guide, x, self.particles, weigh=self.compiled),
                1.0,
            ),
        }

    def _products(self, count: int, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        for _ in range(count):
            for a, b in self.factors:
                multiply(a, b)


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What was measured, for the table."""
    yield (
        f"log p(x) of {found['images']:,} images ({found['data']}), {found['particles']:,} samples each, time over "
        "that of the decoder's matrix products alone: of all images together, and median [quartiles] of slices of at "
        f"most {SLICE}:"
    )
    yield ""
    for name, r in found["ratios"].items():
        yield f"* {name}: {r['of totals']:.2f}; {r['median']:.2f} [{r['low quartile']:.2f}, {r['high quartile']:.2f}]"
    sums = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["seconds"].items())
    yield f"* seconds for {found['images timed']:,} images (eager: a tenth of them, times ten): {sums}"


def images(count: int, root: str) -> tuple[Tensor, str]:
    """Images of bits ``(N, 784)``, and which they are.

    Args:
        count: how many.
        root: folder with MNIST, whose test images are taken, dynamically binarized; empty for random bits, as dense.
            A network's time does not depend on the pixels.

    Raises:
        DataError: MNIST is not there, or has fewer test images.
    """
    from benchmarks.timing import bits
    from inference.data import DataError, Source
    from inference.datasets import mnist

    if not root:
        return bits(1, count)[0], "random bits"
    source = Source(mnist(root), "test", "binary")
    if count > len(source):
        raise DataError(f"--evidence {count}: MNIST has {len(source):,} test images")
    x = source.fixed(torch.arange(count)).flatten(1)  # (N, 1, 28, 28) -> (N, 784)
    return x, f"{'the first ' if count < len(source) else 'all '}of MNIST's test set"


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
