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
Estimate = tuple[float, float]  # a number and its standard error
BATCHES = 20  # of draws, between which standard errors are found
CLEAR = 3.0  # standard errors that tell a length from nothing


@dataclass(frozen=True)
class Moments:
    """Moments of the gradient of a bound per datum, ascending, over ``repeats`` draws; by block of parameters.

    ``batches`` are means over consecutive draws, as many in each, ``(B, P)``; ``variance`` is that of a draw, ``(P,)``.
    """

    batches: Gradient
    variance: Gradient
    repeats: int
    milliseconds: float  # median of one loss and gradient: of processor time, on a GPU by the clock
    saved_bytes: int  # kept between the forward and the backward pass

    def mean(self, block: str) -> Tensor:
        """Mean over all draws, ``(P,)``."""
        return self.batches[block].mean(0)

    def total_variance(self, block: str) -> float:
        """Trace of the covariance of a block."""
        return float(self.variance[block].sum())

    def signal_to_noise(self, block: str) -> float | None:
        """Length of E g over the root of the total variance, as of one parameter in Rainforth et al. (2018, eq. 5).

        The noise of the mean is taken off its square, which would otherwise look like a signal of one over the root of
        the number of draws. None where nothing varies, or no signal can be told from none.
        """
        variance = self.total_variance(block)
        square, error = squared_length(self.batches[block])
        return (square / variance) ** 0.5 if variance > 0 and square > CLEAR * error else None

    def bias_along(self, block: str, reference: "Reference") -> Estimate | None:
        """Error of the mean along the reference gradient, as a fraction of its length, and the standard error of that.

        Zero for an unbiased estimator, -1 for one that misses the gradient. None where the reference is lost in noise.
        """
        if reference.squared_length(block) is None:
            return None
        rows = reference.rows[block]
        half = max(1, len(rows) // 2)  # one half finds the direction, the other the component along it
        unit = rows[:half].mean(0) / rows[:half].mean(0).norm()
        length, length_error = _mean_and_error(rows[half:] @ unit if len(rows) > 1 else rows @ unit)
        component, error = _mean_and_error(self.batches[block] @ unit)
        return component / length - 1.0, (error**2 + (component / length * length_error) ** 2) ** 0.5 / abs(length)

    def squared_bias(self, block: str, reference: "Reference") -> Estimate | None:
        """|E g - reference|^2 over |reference|^2, and its standard error.

        In all directions at once, and without what the noise of either would add: the estimate is unbiased, and falls
        on either side of zero for an estimator that is. None where the reference is lost in noise.
        """
        length = reference.squared_length(block)
        if length is None:
            return None
        value, error = squared_distance(self.batches[block], reference.rows[block])
        return value / length, error / length


@dataclass(frozen=True)
class Reference:
    """What a gradient should be: independent unbiased estimates, ``(B, P)`` by block; one row where it is exact."""

    rows: Gradient
    origin: Mapping[str, str]  # by block

    def squared_length(self, block: str) -> float | None:
        """Of the gradient, the noise of the rows taken off; None where it cannot be told from zero."""
        value, error = squared_length(self.rows[block])
        return value if value > CLEAR * error else None


def squared_length(rows: Tensor) -> Estimate:
    """The squared length of what independent ``(B, P)`` rows estimate, without bias, and its standard error.

    The mean product of two different rows; the error by leaving out one row at a time, which overstates it where the
    length is zero. A single row is taken to be exact.
    """
    gram = rows @ rows.T
    count = len(rows)
    if count == 1:
        return float(gram), 0.0
    left = gram.sum() - 2 * gram.sum(0) + gram.diagonal()  # sums of products without one row, (B,)
    own = gram.diagonal().sum() - gram.diagonal()
    value = (gram.sum() - gram.diagonal().sum()) / (count * (count - 1))
    return float(value), _jackknife((left - own) / ((count - 1) * (count - 2))) if count > 2 else float("inf")


def squared_distance(first: Tensor, second: Tensor) -> Estimate:
    """The squared distance between what the rows ``(B, P)`` and ``(C, P)`` estimate, without bias, and its error."""
    center = second.mean(0)
    to_center, _ = squared_length(first - center)  # too long by the squared error of the center
    excess = _mean_square_error(second)
    error = _leaving_out(first, second)
    return to_center - excess, error


def _mean_square_error(rows: Tensor) -> float:
    """Squared length of the error of the rows' mean, estimated from their scatter; 0 for a single, exact row."""
    count = len(rows)
    return float(rows.var(0).sum()) / count if count > 1 else 0.0


def _leaving_out(first: Tensor, second: Tensor) -> float:
    """Standard error of :func:`squared_distance`, leaving out one row of either set at a time."""
    square = 0.0
    for these, others in ((first, second), (second, first)):
        if (count := len(these)) > 2:
            gap = these - others.mean(0)
            gram = gap @ gap.T
            left = gram.sum() - 2 * gram.sum(0) + gram.diagonal()
            own = gram.diagonal().sum() - gram.diagonal()
            square += _jackknife((left - own) / ((count - 1) * (count - 2))) ** 2
    return square**0.5


def _jackknife(without_one: Tensor) -> float:
    count = len(without_one)
    return float(((count - 1) / count * (without_one - without_one.mean()).square().sum()).sqrt())


def _mean_and_error(values: Tensor) -> Estimate:
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(values.mean()), error


def exact_reference(gradient: Gradient) -> Reference:
    """The gradient itself, where it is known."""
    return Reference({name: g.unsqueeze(0) for name, g in gradient.items()}, dict.fromkeys(gradient, "exact"))


def long_run(
    objective: pyro.infer.ELBO, model: nn.Module, guide: nn.Module, x: Tensor, repeats: int, what: str = ""
) -> Reference:
    """An unbiased estimator's mean over many draws, with its noise."""
    found = measure(objective, model, guide, x, repeats)
    return Reference(found.batches, dict.fromkeys(found.batches, f"{repeats:,} draws{what and ' of ' + what}"))


def blocks_of(model: nn.Module, guide: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of the model and of the guide."""
    return {"model": list(model.parameters()), "guide": list(guide.parameters())}


def measure(
    objective: pyro.infer.ELBO, model: nn.Module, guide: nn.Module, x: Tensor, repeats: int, batches: int = BATCHES
) -> Moments:
    """Draw the gradient ``repeats`` times at the same parameters and data.

    Args:
        objective: any of Pyro's ELBOs or ours.
        model: Pyro program.
        guide: Pyro program.
        x: data, ``(N, *event_shape)``.
        repeats: number of draws, rounded up to a multiple of ``batches``.
        batches: number of means that are kept.
    """
    blocks = {name: parameters for name, parameters in blocks_of(model, guide).items() if parameters}
    sizes = {name: sum(p.numel() for p in ps) for name, ps in blocks.items()}
    rows = {n: x.new_zeros((batches, size), dtype=torch.float64) for n, size in sizes.items()}
    mean = {n: x.new_zeros(size, dtype=torch.float64) for n, size in sizes.items()}
    spread = {n: torch.zeros_like(m) for n, m in mean.items()}
    each, times = -(-repeats // batches), []
    with pyro.validation_enabled(False):
        saved = _saved_bytes(objective, model, guide, x, blocks)
        for draw in range(each * batches):
            start = _clock(x.device)
            gradient = draw_gradient(objective, model, guide, x, blocks)
            times.append(_clock(x.device) - start)
            for name, value in gradient.items():
                rows[name][draw // each] += value / each
                change = value - mean[name]
                mean[name] += change / (draw + 1)
                spread[name] += change * (value - mean[name])
    variance = {n: s / max(each * batches - 1, 1) for n, s in spread.items()}
    return Moments(rows, variance, each * batches, 1e3 * statistics.median(times), saved)


def _clock(device: torch.device) -> float:
    """Seconds: of processor time, to which other programs do not add; of a GPU by the clock, its queue done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


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
    """Bytes of the distinct tensors that autograd keeps for the backward pass, parameters not counted.

    Of a tensor that is a part of another one, such as a batch of all data, no more counts than is kept of it.
    """
    own = {p.untyped_storage().data_ptr() for ps in blocks.values() for p in ps}
    kept: dict[int, dict[tuple[int, int], int]] = {}  # by storage: bytes of its parts
    whole: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (place := storage.data_ptr()) not in own:
            part = int(tensor.storage_offset()), tensor.numel()  # numel counts what expand repeats; capped below
            kept.setdefault(place, {})[part] = tensor.numel() * tensor.element_size()
            whole[place] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        draw_gradient(objective, model, guide, x, blocks)
    return sum(min(sum(parts.values()), whole[place]) for place, parts in kept.items())
