"""Update rules of torch's and Pyro's optimizers as arithmetic on tensors, the same as their own to rounding."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor

Group = dict[str, Any]
Slots = dict[str, Tensor]


class Rule(NamedTuple):
    """How one kind of optimizer updates a parameter.

    ``advance(group, t)`` gives the numbers of step t = 1, 2, ...; ``apply(p, gradient, slots, numbers, group)`` writes
    into the parameter and into its slots, those of the names here that the optimizer's state has. The sign of the
    gradient where ``maximize`` is on is not the rule's affair.
    """

    slots: tuple[str, ...]
    advance: Callable[[Group, int], tuple[float, ...]]
    apply: Callable[[Tensor, Tensor, Slots, Tensor, Group], None]


def _rate(group: Group, t: int) -> tuple[float]:
    return (group["lr"],)


def _decayed(gradient: Tensor, p: Tensor, rate: Tensor, group: Group) -> Tensor:
    """The gradient with the decay of weights in it, where that is not taken off the parameter itself."""
    if not group["weight_decay"]:
        return gradient
    if group.get("decoupled_weight_decay"):
        p.mul_(1 - rate * group["weight_decay"])
        return gradient
    return gradient + group["weight_decay"] * p


def _moments(gradient: Tensor, slots: Slots, group: Group, centered: bool = False) -> tuple[Tensor, Tensor]:
    """Running means of the gradient and of its square, with this gradient in them."""
    beta1, beta2 = group["betas"]
    mean, square = slots["exp_avg"], slots["exp_avg_sq"]
    mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
    around = gradient - mean if centered else gradient
    square.mul_(beta2).add_(around.square(), alpha=1 - beta2)
    return mean, square


def _bias_corrected(group: Group, t: int) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    return group["lr"], group["lr"] / (1 - beta1**t), 1 / math.sqrt(1 - beta2**t)


def _adam(p: Tensor, gradient: Tensor, slots: Slots, numbers: Tensor, group: Group) -> None:
    rate, step_size, root_correction = numbers.unbind()
    mean, square = _moments(_decayed(gradient, p, rate, group), slots, group)
    if group["amsgrad"]:
        square = slots["max_exp_avg_sq"].copy_(torch.maximum(slots["max_exp_avg_sq"], square))
    p.sub_(step_size * mean / (square.sqrt() * root_correction + group["eps"]))


def _clipped_rate(group: Group, t: int) -> tuple[float, ...]:
    """Pyro's Adam lets the learning rate itself decay, and has no correction inside of its epsilon."""
    group["lr"] *= group["lrd"]
    beta1, beta2 = group["betas"]
    return group["lr"], group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)


def _clipped_adam(p: Tensor, gradient: Tensor, slots: Slots, numbers: Tensor, group: Group) -> None:
    gradient = _decayed(gradient.clamp(-group["clip_norm"], group["clip_norm"]), p, numbers[0], group)
    mean, square = _moments(gradient, slots, group, group["centered_variance"])
    p.sub_(numbers[1] * mean / (square.sqrt() + group["eps"]))


def _rectified(group: Group, t: int) -> tuple[float, ...]:
    """Two step sizes, one of them 0: by the mean square, and without it while its variance is too large."""
    beta1, beta2 = group["betas"]
    left = 1 - beta2**t
    step_size, longest = group["lr"] / (1 - beta1**t), 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / left
    if length <= 5:
        return group["lr"], 0.0, step_size
    rectification = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return group["lr"], step_size * math.sqrt(left * rectification), 0.0


def _radam(p: Tensor, gradient: Tensor, slots: Slots, numbers: Tensor, group: Group) -> None:
    rate, adaptive, plain = numbers.unbind()
    mean, square = _moments(_decayed(gradient, p, rate, group), slots, group)
    p.sub_(mean * (adaptive / (square.sqrt() + group["eps"]) + plain))


def _scheduled_momentum(group: Group, t: int) -> tuple[float, ...]:
    now, after = (group["betas"][0] * (1 - 0.5 * 0.96 ** (s * group["momentum_decay"])) for s in (t, t + 1))
    return group["lr"], now, after, 1 - group["betas"][1] ** t


def _nadam(p: Tensor, gradient: Tensor, slots: Slots, numbers: Tensor, group: Group) -> None:
    rate, now, after, correction = numbers.unbind()
    gradient = _decayed(gradient, p, rate, group)
    product = slots["mu_product"].mul_(now)
    mean, square = _moments(gradient, slots, group)
    step = (1 - now) / (1 - product) * gradient + after / (1 - product * after) * mean
    p.sub_(rate * step / ((square / correction).sqrt() + group["eps"]))


def _adamax_rate(group: Group, t: int) -> tuple[float, ...]:
    return group["lr"], group["lr"] / (1 - group["betas"][0] ** t)


def _adamax(p: Tensor, gradient: Tensor, slots: Slots, numbers: Tensor, group: Group) -> None:
    beta1, beta2 = group["betas"]
    gradient = _decayed(gradient, p, numbers[0], group)
    mean, largest = slots["exp_avg"], slots["exp_inf"]
    mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
    largest.copy_(torch.maximum(largest * beta2, gradient.abs() + group["eps"]))
    p.sub_(numbers[1] * mean / largest)


def _adagrad(p: Tensor, gradient: Tensor, slots: Slots, numbers: Tensor, group: Group) -> None:
    gradient = _decayed(gradient, p, numbers[0], group)
    total = slots["sum"].add_(gradient.square())
    p.sub_(numbers[0] * gradient / (total.sqrt() + group["eps"]))


def _rmsprop(p: Tensor, gradient: Tensor, slots: Slots, numbers: Tensor, group: Group) -> None:
    alpha = group["alpha"]
    gradient = _decayed(gradient, p, numbers[0], group)
    square = slots["square_avg"].mul_(alpha).add_(gradient.square(), alpha=1 - alpha)
    if group["centered"]:
        square = square - slots["grad_avg"].mul_(alpha).add_(gradient, alpha=1 - alpha).square()
    step = gradient / (square.sqrt() + group["eps"])
    if group["momentum"]:
        step = slots["momentum_buffer"].mul_(group["momentum"]).add_(step)
    p.sub_(numbers[0] * step)


def _sgd(p: Tensor, gradient: Tensor, slots: Slots, numbers: Tensor, group: Group) -> None:
    gradient = _decayed(gradient, p, numbers[0], group)
    if group["momentum"]:
        momentum = slots["momentum_buffer"].mul_(group["momentum"]).add_(gradient, alpha=1 - group["dampening"])
        gradient = gradient + group["momentum"] * momentum if group["nesterov"] else momentum
    p.sub_(numbers[0] * gradient)


_MOMENTS = ("exp_avg", "exp_avg_sq")
_ADAM = Rule((*_MOMENTS, "max_exp_avg_sq"), _bias_corrected, _adam)
RULES: dict[type, Rule] = {
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    ClippedAdam: Rule(_MOMENTS, _clipped_rate, _clipped_adam),
    torch.optim.RAdam: Rule(_MOMENTS, _rectified, _radam),
    torch.optim.NAdam: Rule((*_MOMENTS, "mu_product"), _scheduled_momentum, _nadam),
    torch.optim.Adamax: Rule(("exp_avg", "exp_inf"), _adamax_rate, _adamax),
    torch.optim.Adagrad: Rule(("sum",), lambda g, t: (g["lr"] / (1 + (t - 1) * g["lr_decay"]),), _adagrad),
    torch.optim.RMSprop: Rule(("square_avg", "grad_avg", "momentum_buffer"), _rate, _rmsprop),
    torch.optim.SGD: Rule(("momentum_buffer",), _rate, _sgd),
}
