"""Mean, variance and cost of a gradient estimator at fixed parameters, by repetition."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyro.infer
import torch
from torch import Tensor, nn

from inference.particles import Program

Gradient = dict[str, Tensor]  # block of parameters to its gradient, (P,)


@dataclass(frozen=True)
class Moments:
    """Moments of the gradient of a bound per datum, ascending, over ``repeats`` draws; ``(P,)`` for each block.

    ``projection`` is the mean, over the draws, of the component along a direction, and its standard error, where
    :func:`measure` was given directions.
    """

    mean: Gradient
    variance: Gradient
    projection: dict[str, tuple[float, float]]
    repeats: int
    milliseconds: float  # median of one loss and gradient
    saved_bytes: int  # kept between the forward and the backward pass

    def total_variance(self, block: str) -> float:
        """Trace of the covariance of a block."""
        return float(self.variance[block].sum())

    def signal_to_noise(self, block: str) -> float:
        """Mean over coordinates of |E g| / sd g (Rainforth et al. 2018, eq. 5), of those coordinates that vary."""
        mean, scale = self.mean[block], self.variance[block].sqrt()
        varies = scale > 0
        return float((mean[varies].abs() / scale[varies]).mean()) if bool(varies.any()) else float("inf")

    def bias(self, block: str, reference: "Reference") -> tuple[float, float]:
        """Error of the mean along the reference gradient, as a fraction of its length, and the standard error of that.

        Zero for an unbiased estimator, -1 for one that misses the gradient.
        """
        length, length_error = reference.lengths[block]
        mean, error = self.projection[block]
        return mean / length - 1.0, (error**2 + length_error**2) ** 0.5 / abs(length)


@dataclass(frozen=True)
class Reference:
    """What a gradient should be: unit vectors, its component along them with standard error, and where from."""

    directions: Gradient
    lengths: dict[str, tuple[float, float]]
    origin: str


def exact_reference(gradient: Gradient) -> Reference:
    """The gradient itself, where it is known."""
    return Reference(
        {name: g / g.norm() for name, g in gradient.items()},
        {n: (float(g.norm()), 0.0) for n, g in gradient.items()},
        "exact",
    )


def long_run(objective: pyro.infer.ELBO, model: nn.Module, guide: nn.Module, x: Tensor, repeats: int) -> Reference:
    """An unbiased estimator's mean over many draws: one half finds the direction, the other the component along it."""
    first = measure(objective, model, guide, x, repeats // 2)
    directions = {name: mean / mean.norm() for name, mean in first.mean.items() if float(mean.norm()) > 0}
    second = measure(objective, model, guide, x, repeats - repeats // 2, directions)
    return Reference(directions, second.projection, f"long run of {repeats:,}")


def blocks_of(model: nn.Module, guide: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of the model and of the guide."""
    return {"model": list(model.parameters()), "guide": list(guide.parameters())}


def measure(
    objective: pyro.infer.ELBO,
    model: nn.Module,
    guide: nn.Module,
    x: Tensor,
    repeats: int,
    directions: Mapping[str, Tensor] | None = None,
) -> Moments:
    """Draw the gradient ``repeats`` times at the same parameters and data.

    Args:
        objective: any of Pyro's ELBOs or ours.
        model: Pyro program.
        guide: Pyro program.
        x: data, ``(N, *event_shape)``.
        repeats: number of draws.
        directions: for each block, a unit vector along which the gradient's component is followed.
    """
    blocks = {name: parameters for name, parameters in blocks_of(model, guide).items() if parameters}
    total = {name: torch.zeros(sum(p.numel() for p in ps), dtype=torch.float64) for name, ps in blocks.items()}
    squares = {name: torch.zeros_like(t) for name, t in total.items()}
    components: dict[str, list[float]] = {name: [] for name in blocks}
    units = directions or {}
    times = []
    with pyro.validation_enabled(False):
        saved = _saved_bytes(objective, model, guide, x, blocks)
        for _ in range(repeats):
            start = time.perf_counter()
            gradient = draw_gradient(objective, model, guide, x, blocks)
            times.append(time.perf_counter() - start)
            for name, value in gradient.items():
                total[name] += value
                squares[name] += value.square()
                if name in units:
                    components[name].append(float(value @ units[name]))
    mean = {name: t / repeats for name, t in total.items()}
    variance = {n: (squares[n] / repeats - mean[n].square()).clamp_min(0) * repeats / (repeats - 1) for n in mean}
    projection = {
        name: (statistics.fmean(c), statistics.stdev(c) / len(c) ** 0.5) for name, c in components.items() if c
    }
    return Moments(mean, variance, projection, repeats, 1e3 * statistics.median(times), saved)


def draw_gradient(
    objective: pyro.infer.ELBO,
    model: Program,
    guide: Program,
    x: Tensor,
    blocks: Mapping[str, Sequence[nn.Parameter]],
) -> Gradient:
    """One draw of the gradient of the bound per datum; parameters that got none count as zeros."""
    for parameters in blocks.values():
        for parameter in parameters:
            parameter.grad = None
    objective.loss_and_grads(model, guide, x)
    return {
        name: -torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in ps]).double() / len(x)
        for name, ps in blocks.items()
    }


def _saved_bytes(
    objective: pyro.infer.ELBO,
    model: Program,
    guide: Program,
    x: Tensor,
    blocks: Mapping[str, Sequence[nn.Parameter]],
) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward pass, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for ps in blocks.values() for p in ps}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        draw_gradient(objective, model, guide, x, blocks)
    return sum(kept.values())
