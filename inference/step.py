"""The function that a compiled step is: loss, gradient and update as one graph; and several such steps in one call."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from inference.backends import Function, Recorded, compiled, elsewhere, is_recorded, is_written, retraced
from inference.capture import CannotCapture, Captured, NotYet, capture
from inference.engine import SharedOptimizer
from inference.handlers import ParametersMet
from inference.updates import Update, have_state, optimizers_of

if TYPE_CHECKING:
    from inference.compiled import CompiledSVI

MOST_ANNEALED = 64  # numbers in a tensor that may change between the steps of one call, such as a weight


class CompiledStep:
    """The compiled step for one shape of the arguments, or several such steps in one call.

    ``floats`` are the places of those among the arguments whose values may change.
    """

    def __init__(
        self, svi: "CompiledSVI", leaves: list[Any], spec: TreeSpec, count: int, floats: tuple[int, ...] = ()
    ) -> None:
        self.optim, self.count, self._floats = svi.optim, count, floats
        self.captured, self.parameters = loss_and_gradients(svi, leaves, spec, floats)
        self.device = self.parameters[0].device
        args = self.inputs_from(leaves)
        self._elsewhere = elsewhere(self.captured, self.device) if is_recorded(self.device) else []
        self._annealed = self._that_may_change() if count > 1 else []
        places = {id(tensor): place for place, tensor in enumerate(self.captured.tensors)}
        self._annealed_places = [places[id(tensor)] for tensor in self._annealed]
        self._bind(args, svi.taken)
        first = self._inputs_of(0, self._inputs)
        self._function: Function = retraced(self._one, first)
        if svi.inductor:
            self._function = compiled(self._function, first)
        self._recorded = Recorded(self._all, self._inputs) if is_recorded(self.device) else None

    def __call__(self, args: list[Tensor], rows: list[list[tuple[float, ...]]]) -> Tensor:
        """The steps on these arguments, those of each step after those of the one before; returns the losses."""
        self._write_numbers(rows)
        if self._recorded is not None:
            torch._foreach_copy_(self._inputs[self._args], args)
            for place in self._elsewhere:
                if self.captured.held[place]:
                    self._inputs[place].copy_(self.captured.tensors[place], non_blocking=True)
            return self._recorded()[0]
        self._inputs[self._args] = args
        with torch.no_grad():
            return self._all(*self._inputs)[0]

    def inputs_from(self, leaves: list[Any]) -> list[Tensor]:
        """What of a step's arguments, flattened, is an input of the graph."""
        return inputs_from(leaves, self._floats, self.parameters[0])

    def numbers(self, taken: int) -> list[tuple[float, ...]]:
        """What the optimizer needs to know of the step that comes after ``taken``; to be asked once for each step."""
        return self.update.advance(taken - self._bound_at)

    def is_valid(self, taken: int, alone: bool) -> bool:
        """Whether the optimizer is still what this function was made for; to be asked before each call.

        Args:
            taken: steps before the call.
            alone: whether these and nobody else stepped since the last call.
        """
        layout = self.update.layout
        if not self.update.current:  # a checkpoint was loaded
            self._bind(self._inputs[self._args][: self._arity], taken)
            self._recorded = Recorded(self._all, self._inputs) if self._recorded else None
        elif self.update.has_other_options():
            return False
        elif not (alone and self._counts_on_device):
            return self.update.recount(taken - self._bound_at)
        return self.update.layout == layout

    def note_annealed(self, i: int) -> None:
        """Remember for step ``i`` of a call what the weights and temperatures are now."""
        for tensor, values in zip(self._annealed, self._inputs[self._args.stop :], strict=False):
            values[i].copy_(tensor)

    def versions(self) -> list[int]:
        """How often the tensors too large to be annealed were written; must not change between steps of one call."""
        noted = {id(tensor) for tensor in self._annealed}
        return [t._version for t in self.captured.tensors if id(t) not in noted]

    def _that_may_change(self) -> list[Tensor]:
        """The small tensors that the graph reads and does not write, such as a weight that is annealed."""
        placeholders = [node for node in self.captured.graph.graph.nodes if node.op == "placeholder"]
        written = {
            id(tensor) for node, tensor in zip(placeholders, self.captured.tensors, strict=False) if is_written(node)
        }
        fixed = {id(parameter) for parameter in self.parameters} | written
        return [t for t in self.captured.tensors if id(t) not in fixed and t.numel() <= MOST_ANNEALED]

    def _bind(self, args: list[Tensor], taken: int) -> None:
        """Look up the tensors that every step reads and writes."""
        self.update = Update(self.optim, self.parameters)
        self._bound_at, self._arity = taken, len(args)
        self._counts_on_device = any(counter.device.type != "cpu" for counter in self.update.counters)
        numbers = (self.count, *self.update.rows)
        self._numbers = torch.zeros(numbers, dtype=self.parameters[0].dtype, device=self.device)
        self._args = slice(len(self.captured.tensors), len(self.captured.tensors) + self.count * len(args))
        if is_recorded(self.device):
            args = [arg.to(self.device, copy=True) for _ in range(self.count) for arg in args]
        else:
            args = args * self.count
        lifted = list(self.captured.tensors)
        for place in self._elsewhere:
            lifted[place] = lifted[place].to(self.device, copy=True)
        annealed = [torch.stack([tensor.detach()] * self.count).to(self.device) for tensor in self._annealed]
        state = [*self.update.tensors, *self.update.counters, self._numbers]
        self._inputs = [*lifted, *args, *annealed, *state]

    def _all(self, *inputs: Tensor) -> tuple[Tensor]:
        """The losses of all steps, each by the same function: as one graph they would hold every step's parameters."""
        return (torch.stack([self._function(*self._inputs_of(i, inputs))[0] for i in range(self.count)]),)

    def _inputs_of(self, i: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What step ``i`` of a call reads and writes."""
        lifted, args, rest = list(inputs[: self._args.start]), inputs[self._args], inputs[self._args.stop :]
        for place, values in zip(self._annealed_places, rest, strict=False):
            lifted[place] = values[i]
        own = args[i * self._arity : (i + 1) * self._arity]
        return [*lifted, *own, *rest[len(self._annealed) : -1], rest[-1][i]]

    def _one(self, *inputs: Tensor) -> tuple[Tensor]:
        """A step on stand-ins for its inputs: the loss, its gradient, and the update written in place."""
        lifted, rest = inputs[: self._args.start], inputs[self._args.start :]
        args, state, counters, numbers = self._parted(rest)
        loss, *gradients = self.captured.graph(*lifted, *args)
        stand_ins = {id(tensor): stand_in for tensor, stand_in in zip(self.captured.tensors, lifted, strict=True)}
        parameters = [stand_ins[id(parameter)] for parameter in self.parameters]
        batch_size = args[0].shape[0] if args and args[0].dim() else 1
        self.update.apply(parameters, gradients, state, counters, numbers, batch_size)
        return (loss,)

    def _parted(self, rest: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Tensor]:
        """Arguments, state, counters and numbers."""
        end = self._arity + len(self.update.tensors)
        return rest[: self._arity], rest[self._arity : end], rest[end:-1], rest[-1]

    def _write_numbers(self, rows: list[list[tuple[float, ...]]]) -> None:
        if self.device.type == "cpu":
            self._numbers.copy_(torch.tensor(rows, dtype=self._numbers.dtype))
        else:  # through pinned memory, without a wait
            host = torch.tensor(rows, dtype=self._numbers.dtype, pin_memory=True)
            self._numbers.copy_(host, non_blocking=True)


def loss_and_gradients(
    svi: "CompiledSVI",
    leaves: list[Any],
    spec: TreeSpec,
    floats: Sequence[int] = (),
    others: Sequence[float] | None = None,
) -> tuple[Captured, list[Tensor]]:
    """The graph of a step's loss and of its gradient for each parameter that has one; these parameters.

    Args:
        svi: whose step.
        leaves: arguments, flattened.
        spec: how to undo that.
        floats: places of the floats among them that are to be inputs, after the tensors.
        others: other values of these, at which the graph has to be the same.

    Raises:
        CannotCapture: see :func:`inference.capture.capture`.
    """
    candidates = [p for o in optimizers_of(svi.optim) for g in o.param_groups for p in g["params"] if p.requires_grad]
    own = not isinstance(svi.optim, SharedOptimizer)
    known = {id(p) for p in candidates}
    reached: list[Tensor] = []

    def function(*tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        given = {place: next(rest) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        given |= {place: next(rest) for place in floats}
        args, kw = tree_unflatten([given.get(place, leaf) for place, leaf in enumerate(leaves)], spec)
        with ParametersMet() as seen:
            loss = svi.differentiable_loss(*args, **kw)
        trained = candidates
        if own:  # Pyro's own optimizers step on the parameters that a step comes upon, and on no others
            sites = [value.unconstrained() for value in seen.met.values()]
            if not known.issuperset(id(p) for p in sites if p.requires_grad):
                raise NotYet("parameters come in from step to step")
            trained = [p for p in candidates if any(p is site for site in sites)]
        loss = loss if isinstance(loss, Tensor) else torch.as_tensor(loss, dtype=candidates[0].dtype)
        gradients: Sequence[Tensor | None] = [None] * len(trained)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        if own:  # and where these had a gradient once, it is zero if a step has none
            gradients = [
                torch.zeros_like(p) if gradient is None and p.grad is not None else gradient
                for p, gradient in zip(trained, gradients, strict=True)
            ]
        reached[:] = [p for p, gradient in zip(trained, gradients, strict=True) if gradient is not None]
        if not reached:
            raise CannotCapture("the loss has no gradient")
        return [loss.detach(), *[gradient for gradient in gradients if gradient is not None]]

    if not candidates:
        raise CannotCapture("no parameter has a gradient")
    inputs = inputs_from(leaves, floats, candidates[0])
    changed = None if others is None else [*tensors_of(leaves), *_as_tensors(others, candidates[0])]
    with svi.store(), _same_store():
        captured = capture(function, inputs, [svi.model, svi.guide, svi.objective], changed)
    if not have_state(svi.optim, reached):
        raise NotYet("parameters come in from step to step")
    for p in reached if own else ():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return captured, reached


@contextmanager
def _same_store() -> Iterator[None]:
    """Pyro's store is afterwards as it was; what would change it is left to a step that Pyro takes.

    Raises:
        NotYet: parameters were registered, or exchanged.
    """
    store = pyro.get_param_store()
    spaces = [store._params, store._param_to_name, store._constraints]
    kept = [dict(space) for space in spaces]
    try:
        yield
        if store._params.keys() != kept[0].keys() or any(p is not kept[0][n] for n, p in store._params.items()):
            raise NotYet("parameters come in from step to step")
    finally:
        for space, before in zip(spaces, kept, strict=True):
            if space.keys() != before.keys() or any(space[each] is not before[each] for each in before):
                space.clear()
                space.update(before)


def inputs_from(leaves: list[Any], floats: Sequence[int], like: Tensor) -> list[Tensor]:
    """The inputs of a graph: the tensors among the arguments, then the floats at some places as tensors."""
    tensors = tensors_of(leaves)
    return [*tensors, *_as_tensors([leaves[place] for place in floats], like)] if floats else tensors


def _as_tensors(values: Sequence[float], like: Tensor) -> Sequence[Tensor]:
    """Numbers as tensors without a dimension, of the dtype and on the device of another, without a wait."""
    if like.device.type == "cpu":
        return torch.tensor(values, dtype=like.dtype).unbind()
    return torch.tensor(values, dtype=like.dtype, pin_memory=True).to(like.device, non_blocking=True).unbind()


def tensors_of(leaves: list[Any]) -> list[Tensor]:
    """Those of the arguments that are tensors."""
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
