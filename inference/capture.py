"""Runs Python code once and leaves a plain graph of tensor operations: Pyro's handlers are paid for a single time.

What is left reads and writes the very tensors that the code did (parameters, buffers, annealed weights), so that
changing one of them in place changes what the graph computes, and needs no second capture.
"""

import pickle
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pyro
import pyro.infer.trace_elbo
import pyro.infer.trace_mean_field_elbo
import pyro.infer.traceenum_elbo
import pyro.infer.util
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from inference.particles import validation
from inference.watched import name_of, undone

aten = torch.ops.aten
_FRESH = (aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default)
_REPLACEMENT = {aten.normal_.default: (aten.randn.default, 0.0), aten.uniform_.default: (aten.rand.default, 0.0)}
_WAITING = (pyro.infer.trace_elbo, pyro.infer.trace_mean_field_elbo, pyro.infer.traceenum_elbo)


class CannotCapture(RuntimeError):
    """The code has no fixed graph of tensor operations; the message says why in one line."""


class NotYet(CannotCapture):
    """There will be a graph after a step has run as Pyro has it: this one brings in parameters or exchanges them."""


class Captured(NamedTuple):
    """A graph ``(*tensors, *args) -> outputs`` and the very tensors that the code read beside its arguments.

    ``held`` says which of these somebody holds and may write into; the others the code makes anew in each run.
    """

    graph: GraphModule
    tensors: list[Tensor]
    held: list[bool]


def capture(
    function: Callable[..., Sequence[Tensor]],
    args: Sequence[Tensor],
    owners: Iterable[Any] = (),
    others: Sequence[Tensor] | None = None,
) -> Captured:
    """The graph of ``function(*args)``. Random numbers and the owners' state are left as they were.

    Args:
        function: from tensors to tensors; it may take gradients on the way.
        args: example arguments, whose shapes the graph keeps.
        owners: modules and objects whose tensors and numbers the function may change.
        others: arguments of the same shapes and other values, at which the graph has to be the same.

    Raises:
        CannotCapture: the code waits for a tensor's value, has shapes that depend on one, differs from call to call,
            draws random numbers that are not torch's, or replaces an owner's tensor or number where it would have to
            write into a tensor.
    """
    owners = list(owners)
    python_noise = _python_noise()
    with undone(owners) as held, _without_waits(), validation(False):
        function(*args)  # what a program prepares in its first run is no part of the graph
        held[:] = [(space, name, space.get(name) if value is None else value) for space, name, value in held]
        first, second = (_trace(function, given) for given in (args, args if others is None else others))
        if python_noise != _python_noise():
            raise CannotCapture("it draws from Python's or numpy's generator; a graph would keep the first numbers")
        changed = [(space, name) for space, name, value in held if space.get(name) is not value]
        if replaced := [place for place in changed if not isinstance(place[0].get(place[1]), torch.nn.Parameter)]:
            raise CannotCapture(f"'{name_of(*replaced[0])}' is replaced in each step; write into a tensor instead")
    _refuse_dynamic_shapes(first)
    if first.code != second.code or not _same_constants(pairs := _constants(first, second)):
        raise CannotCapture("its operations differ from call to call")
    _functional_noise(first)
    tensors, held_by_somebody = _lift(first), {id(a) for a, b in pairs if a is b}
    return Captured(first, tensors, [id(tensor) in held_by_somebody for tensor in tensors])


def _python_noise() -> int:
    """Where Python's and numpy's generators are."""
    return hash((random.getstate(), pickle.dumps(np.random.get_state())))  # noqa: NPY002


def _trace(function: Callable[..., Sequence[Tensor]], args: Sequence[Tensor]) -> GraphModule:
    try:
        return make_fx(function)(*args)
    except CannotCapture:
        raise
    except NotImplementedError as error:
        raise CannotCapture(_first_line(error) or "part of it is not implemented") from error
    except RuntimeError as error:
        if "data-dependent" in str(error) or "value out of a tracing tensor" in str(error):
            raise CannotCapture(f"{_place(error)} needs a tensor's value on the host") from error
        raise CannotCapture(_first_line(error)) from error


def _constants(first: GraphModule, second: GraphModule) -> list[tuple[Any, Any]]:
    """What two traces of one code hold, side by side."""
    names = [node.target for node in first.graph.nodes if node.op == "get_attr"]
    return [(getattr(first, name), getattr(second, name)) for name in names]


def _same_constants(pairs: Iterable[tuple[Any, Any]]) -> bool:
    """Whether they are the same, those made on the way by value."""
    return all(
        a is b or (isinstance(a, Tensor) and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)) for a, b in pairs
    )


def _lift(graph: GraphModule) -> list[Tensor]:
    """Turn the tensors that a graph holds into its first inputs; returns them."""
    first = next(iter(graph.graph.nodes))
    tensors: list[Tensor] = []
    inputs: dict[int, Node] = {}
    held = [node for node in graph.graph.nodes if node.op == "get_attr"]
    for node in held:
        tensor = getattr(graph, node.target)
        if isinstance(tensor, torch.Generator):
            raise CannotCapture("it draws from a torch.Generator of its own; a graph draws from torch's default one")
        if id(tensor) not in inputs:
            with graph.graph.inserting_before(first):
                inputs[id(tensor)] = graph.graph.placeholder(f"lifted_{len(tensors)}")
            tensors.append(tensor)
        node.replace_all_uses_with(inputs[id(tensor)])
    for node in held:  # the first node of all may be one of them
        graph.graph.erase_node(node)
    for node in graph.graph.nodes:
        if node.target is aten.lift_fresh_copy.default:  # of a constant; now an input is copied
            node.target = aten.clone.default
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return tensors


def _functional_noise(graph: GraphModule) -> None:
    """``empty(...).normal_()`` becomes ``randn(...)``: the same numbers, in a form that compilers know."""
    for node in list(graph.graph.nodes):
        if node.target not in _REPLACEMENT or node.args[0].target not in _FRESH or len(node.args) > 1 or node.kwargs:
            continue
        value = node.meta["val"]
        with graph.graph.inserting_before(node):
            options = {"dtype": value.dtype, "device": value.device}
            drawn = graph.graph.call_function(_REPLACEMENT[node.target][0], (list(value.shape),), options)
        drawn.meta["val"] = value
        node.args[0].replace_all_uses_with(drawn, delete_user_cb=lambda user, node=node: user is not node)
        node.replace_all_uses_with(drawn)
        graph.graph.erase_node(node)


def _refuse_dynamic_shapes(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        tags = getattr(node.target, "tags", ())
        masks = node.target is aten.index.Tensor and any(
            isinstance(index, Node) and index.meta["val"].dtype in (torch.bool, torch.uint8) for index in node.args[1]
        )
        if masks or (torch.Tag.dynamic_output_shape in tags and node.target is not aten.index.Tensor):
            raise CannotCapture(f"the shape that {node.target} gives depends on the values of a tensor")


@contextmanager
def _without_waits() -> Iterator[None]:
    """Pyro's ELBOs without their looks at values: NaN is watched by whoever trains, and numbers stay tensors.

    ``differentiable_loss`` of those in :data:`_WAITING` subtracts a number read off the device, for which the detached
    tensor has the same value and gradient.
    """
    kept = {
        "torch_item": lambda value: value.detach() if isinstance(value, Tensor) else value,
        "warn_if_nan": lambda value, *args, **kw: value,
    }
    patches = [
        mock.patch.object(module, name, stand_in)
        for module in _WAITING
        for name, stand_in in kept.items()
        if hasattr(module, name)
    ]
    patches.append(mock.patch.object(torch.Tensor, "all", _all_but_for_enumeration(torch.Tensor.all)))
    patches.append(mock.patch.object(pyro.infer.util, "_fulldot", _expectation))
    # a distribution that a program holds keeps the validation that was on when it was made
    patches.append(mock.patch.object(torch.distributions.Distribution, "_validate_sample", _accept))
    readers = ("numpy", "tolist", "__array__")
    patches += [mock.patch.object(torch.Tensor, name, _refuse_to_read) for name in readers]  # type: ignore[arg-type]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _all_but_for_enumeration(original: Callable[..., Any]) -> Callable[..., Any]:
    """Pyro asks whether all states are possible, to leave out those that are not: :func:`_expectation` does it."""

    def every(tensor: Tensor, *args: Any, **kw: Any) -> Any:
        asked_by = sys._getframe(1).f_globals.get("__name__")
        return True if asked_by == "pyro.infer.util" else original(tensor, *args, **kw)

    return every


def _accept(*args: Any) -> None:
    pass


def _refuse_to_read(tensor: Tensor, *args: Any, **kw: Any) -> None:
    """These read a tensor's memory, of which no tracer would know."""
    raise CannotCapture(f"{_place_of(traceback.extract_stack()[:-1])} needs a tensor's value on the host")


def _expectation(*factors: Tensor) -> Tensor:
    """The sum of probability times cost over the possible states; the others may cost what they will."""
    prob, cost = factors
    return (prob * torch.where(prob > 0, cost, 0)).sum()


def _place(error: BaseException) -> str:
    """The line of the program or of Pyro, not of torch below it, that raised."""
    return _place_of(traceback.extract_tb(error.__traceback__))


def _place_of(frames: Sequence[traceback.FrameSummary]) -> str:
    below = str(Path(torch.__file__).parent)
    frame = [frame for frame in frames if not frame.filename.startswith(below)][-1]
    return f"{Path(*Path(frame.filename).parts[-3:])}:{frame.lineno} ({frame.line})"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
