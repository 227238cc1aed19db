"""Optimizers as plain arithmetic on tensors, the same as torch's own, so that a step can be one graph.

The state stays where the optimizer keeps it and is written in place: a checkpoint of either kind of step continues
under the other. What changes from step to step (learning rate, bias corrections) enters as a small tensor.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import pyro.optim
import torch
from torch import Tensor

from inference.capture import CannotCapture
from inference.engine import SharedOptimizer
from inference.rules import RULES, Group, Rule


class Slot(NamedTuple):
    """One parameter with what its optimizer keeps of it."""

    parameter: Tensor
    group: Group
    state: dict[str, Any]
    rule: Rule

    @property
    def names(self) -> tuple[str, ...]:
        """Which of the rule's slots are in use; SGD without momentum has none."""
        return tuple(name for name in self.rule.slots if self.state.get(name) is not None)


class Update:
    """The update of some parameters by their optimizer, from its state of this moment on.

    Args:
        optim: our optimizer over all parameters, or one of Pyro's, which has one for each.
        parameters: those that have a gradient.

    Raises:
        CannotCapture: the optimizer, or an option of it, has no rule here.
    """

    def __init__(self, optim: pyro.optim.PyroOptim, parameters: Iterable[Tensor]) -> None:
        parameters = list(parameters)
        self.clip: float | None = getattr(optim, "gradient_clip", None)
        own = not isinstance(optim, SharedOptimizer)
        self._own_clips = [(optim._get_grad_clip_args(p) if own else None) or {} for p in parameters]
        self._optimizers = optimizers_of(optim)
        self._states = [optimizer.state for optimizer in self._optimizers]
        homes = {id(p): (o, group) for o in self._optimizers for group in o.param_groups for p in group["params"]}
        self.slots = [_slot(p, *homes[id(p)]) for p in parameters]
        if not self.slots:
            raise CannotCapture("no parameter has a gradient")
        done = self._counts()
        alike = [(id(slot.group), count) for slot, count in zip(self.slots, done, strict=True)]
        kinds = list(dict.fromkeys(alike))  # parameters of a group that took other numbers of steps have rows apart
        self._rows = [kinds.index(kind) for kind in alike]
        self._groups = [self.slots[self._rows.index(row)].group for row in range(len(kinds))]
        self._steps = [count for _, count in kinds]
        self._options = self.options
        counted = [slot for slot in self.slots if isinstance(slot.state.get("step"), Tensor)]
        near = [slot.state["step"].device == slot.parameter.device for slot in counted]
        self.counters = [slot.state["step"] for slot, here in zip(counted, near, strict=True) if here]
        self._on_host = [slot.state["step"] for slot, here in zip(counted, near, strict=True) if not here]
        self._counting = [slot.state for slot in self.slots if type(slot.state.get("step")) is int]
        self.tensors = [slot.state[name] for slot in self.slots for name in slot.names]

    @property
    def rows(self) -> tuple[int, int]:
        """Shape of what :meth:`advance` gives."""
        width = len(self.slots[0].rule.advance({**self._groups[0], "lrd": 1}, 1))
        return len(self._groups), width

    @property
    def options(self) -> list[Group]:
        """The options of each group but for its learning rate."""
        return [{k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")} for group in self._groups]

    @property
    def current(self) -> bool:
        """Whether the optimizers still keep their state where they did; loading a checkpoint moves it."""
        return all(o.state is state for o, state in zip(self._optimizers, self._states, strict=True))

    @property
    def layout(self) -> tuple[Any, ...]:
        """What a function that applies this update takes as given: which parameters share a row, and the options."""
        return self._rows, self._options

    def recount(self, done: int) -> bool:
        """Look up how many steps the parameters took; ``done`` of them are since this object was made.

        Other steps may have been on all of them or on some, by the same optimizer. Waits for the device if the counts
        are there.

        Returns:
            Whether :attr:`layout` is still true.
        """
        counts = self._counts()
        steps = [counts[self._rows.index(row)] for row in range(len(self._steps))]
        self._steps = [count - done for count in steps]
        return all(steps[row] == count for row, count in zip(self._rows, counts, strict=True))

    def _counts(self) -> list[int]:
        return [int(slot.state.get("step", 0)) for slot in self.slots]

    def has_other_options(self) -> bool:
        """Whether an option was changed, other than the learning rate."""
        both = zip(self._groups, self._options, strict=True)
        return any(group[name] != value for group, kept in both for name, value in kept.items())

    def advance(self, done: int) -> list[tuple[float, ...]]:
        """The numbers of the step after ``done`` more, a row for each of the optimizer's groups."""
        for state in self._counting:
            state["step"] += 1
        if self._on_host:  # torch's optimizers count there for a GPU, unless they are fused; no recording would
            torch._foreach_add_(self._on_host, 1)
        rule = self.slots[0].rule
        return [rule.advance(group, t + done + 1) for group, t in zip(self._groups, self._steps, strict=True)]

    def apply(
        self,
        parameters: Iterable[Tensor],
        gradients: Iterable[Tensor],
        tensors: Iterable[Tensor],
        counters: Iterable[Tensor],
        numbers: Tensor,
        batch_size: int,
    ) -> None:
        """Write one step into tensors that stand for the parameters, :attr:`tensors` and :attr:`counters`.

        Args:
            parameters: in the order of :attr:`slots`.
            gradients: sums over ``batch_size`` data.
            tensors: state.
            counters: numbers of steps done.
            numbers: what :meth:`advance` gave, ``(groups, numbers)``.
            batch_size: data in the batch; what a limit on the gradient is multiplied by.
        """
        gradients, rest = list(gradients), iter(tensors)
        if self.clip is not None:
            gradients = _clipped(gradients, self.clip * batch_size)
        gradients = [_clipped_alone(each, **own) for each, own in zip(gradients, self._own_clips, strict=True)]
        for p, gradient, slot, row in zip(parameters, gradients, self.slots, self._rows, strict=True):
            kept = {name: next(rest) for name in slot.names}
            slot.rule.apply(p, -gradient if slot.group.get("maximize") else gradient, kept, numbers[row], slot.group)
        for counter in counters:
            counter.add_(1)


def optimizers_of(optim: pyro.optim.PyroOptim) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside one of Pyro's, which makes them when it first sees their parameters.

    Raises:
        CannotCapture: their options change along the training.
    """
    if isinstance(optim, SharedOptimizer):
        return [optim.optimizer]
    if cycling := [each for each in optim.optim_objs.values() if getattr(each, "cycle_momentum", False)]:
        raise CannotCapture(f"{type(cycling[0]).__name__} with cycle_momentum changes more than the learning rate")
    return [getattr(each, "optimizer", each) for each in optim.optim_objs.values()]


def started(optim: pyro.optim.PyroOptim) -> bool:
    """Whether the torch optimizers exist, and have state where they keep any."""
    optimizers = optimizers_of(optim)
    stateless = [isinstance(o, torch.optim.SGD) and not o.defaults["momentum"] for o in optimizers]
    return bool(optimizers) and all(o.state or free for o, free in zip(optimizers, stateless, strict=True))


def have_state(optim: pyro.optim.PyroOptim, parameters: Iterable[Tensor]) -> bool:
    """Whether the optimizer took a step on each of them, or keeps nothing of it."""
    optimizers = optimizers_of(optim)
    if any(o.state for o in optimizers):
        return all(any(p in o.state for o in optimizers) for p in parameters)
    return True


def _slot(parameter: Tensor, optimizer: torch.optim.Optimizer, group: Group) -> Slot:
    kind = type(optimizer)
    if kind not in RULES:
        raise CannotCapture(f"{kind.__name__} has no rule; those with one: {', '.join(k.__name__ for k in RULES)}")
    state, rule = optimizer.state[parameter], RULES[kind]
    for name in rule.slots:  # NAdam keeps a number on the host, as long as no checkpoint is loaded
        if state.get(name) is not None:
            state[name] = state[name].to(parameter.device)
    return Slot(parameter, group, state, rule)


def _clipped(gradients: list[Tensor], largest: float) -> list[Tensor]:
    """As :func:`torch.nn.utils.clip_grad_norm_`."""
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    return [gradient * factor for gradient in gradients]


def _clipped_alone(gradient: Tensor, clip_norm: float | None = None, clip_value: float | None = None) -> Tensor:
    """The gradient of one parameter as Pyro's ``clip_args`` would have it."""
    if clip_norm is not None:
        (gradient,) = _clipped([gradient], clip_norm)
    return gradient if clip_value is None else gradient.clamp(-clip_value, clip_value)
