"""Runs that differ only in seed, weight, temperature or learning rate, trained together in one compiled step.

The step of one run is captured as a plain graph. On a GPU it is mapped over all of them, a product of matrices becomes
a batch of products, and all is one recording; a CPU has nothing left to fill, and the one function is called for each.
Each run keeps its own random numbers, so it ends as if it had been alone, to rounding. Parameters and the state of the
optimizers become views into stacked tensors, so that every run can be scored and saved at any time.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten

from inference.backends import Function, Recorded, compiled, elsewhere, is_recorded, retraced
from inference.capture import CannotCapture
from inference.compiled import CompiledSVI
from inference.step import loss_and_gradients
from inference.updates import Update, started
from inference.watched import constants, identities

log = logging.getLogger(__name__)
aten = torch.ops.aten
_DRAWS = {aten.randn.default: Tensor.normal_, aten.rand.default: Tensor.uniform_}
_TAKES_TENSOR = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)


class Draw(NamedTuple):
    """Random numbers that a step needs: how they are drawn, and an example."""

    draw: Any
    example: Tensor


class VectorizedSVI:
    """One step for many runs.

    Args:
        runs: each with its own model, guide, optimizer and objective, built as if it were alone. They have to be the
            same but for values: seeds, learning rates, and numbers that multiply or divide or are held in tensors.
        generators: the random numbers of each run, on the device of its parameters. A run alone that starts at
            ``torch.manual_seed(s)`` is the one here with ``torch.Generator().manual_seed(s)``.
        batch_size: map over runs for batches of this size alone; at others, such as the last batch of an epoch, the
            runs step one after another, which gives the same numbers. None compiles for the first size that comes.
        inductor: False runs the plain graph, operation by operation.
        mapped: whether the graph is mapped over the runs, or called for each of them; None does what is faster on the
            device.

    Attributes:
        why_eager: why the runs step one after another; None where they step together.

    Raises:
        ValueError: no runs, or not one generator for each.
    """

    def __init__(
        self,
        runs: Sequence[CompiledSVI],
        generators: Sequence[torch.Generator],
        batch_size: int | None = None,
        inductor: bool = True,
        mapped: bool | None = None,
    ) -> None:
        if not runs or len(runs) != len(generators):
            raise ValueError(f"give at least one run and a generator for each: {len(runs)} and {len(generators)} given")
        self.runs, self.generators, self.batch_size = list(runs), list(generators), batch_size
        self.inductor, self.mapped = inductor, mapped
        self.taken = 0
        self.why_eager: str | None = None
        self._together: _Together | None = None

    def step(self, xs: Sequence[Tensor]) -> Tensor:
        """One step of every run on its own batch ``(B, *event_shape)``; the losses in nats, ``(runs,)``.

        Batches may differ from run to run, but not in size.
        """
        if self.why_eager is None and self._fits(xs):
            try:
                if self._together is None:
                    self._together = _Together(self, list(xs))
                losses = self._together(xs, self.taken)
                self.taken += 1
                return losses
            except CannotCapture as error:
                self._together = None
                self.why_eager = " ".join(str(error).split())
                log.warning("runs step one after another: %s", self.why_eager)
        self.taken += 1
        return torch.stack([self._alone(i, x) for i, x in enumerate(xs)])

    def _fits(self, xs: Sequence[Tensor]) -> bool:
        self.batch_size = self.batch_size or xs[0].shape[0]
        return all(x.shape[0] == self.batch_size for x in xs) and all(started(run.optim) for run in self.runs)

    def _alone(self, i: int, x: Tensor) -> Tensor:
        with as_default(self.generators[i]):
            return torch.as_tensor(self.runs[i].eager_step(x))


class _Together:
    """The compiled step of all runs, for one shape of their batches."""

    def __init__(self, svi: VectorizedSVI, xs: list[Tensor]) -> None:
        self.svi = svi
        leaves, spec = tree_flatten(((xs[0],), {}))
        found = []
        for run, generator in zip(svi.runs, svi.generators, strict=True):
            with as_default(generator):
                found.append(loss_and_gradients(run, leaves, spec))
        self.captured = [captured for captured, _ in found]
        self.parameters = [parameters for _, parameters in found]
        self.graph = self.captured[0].graph
        self.numbers = _lift_differing_numbers([captured.graph for captured in self.captured])
        self.draws = _lift_draws(self.graph)
        self.device = self.parameters[0][0].device
        if is_recorded(self.device):
            self._bring_constants()
        self._places = [constants([run.model, run.guide, run.objective]) for run in svi.runs]
        self._taken_as = [identities(places) for places in self._places]
        self._bind(xs, svi.taken)
        self._mapped = is_recorded(self.device) if svi.mapped is None else svi.mapped
        if self._mapped:
            graph, inputs = self._graph_of_all(), self._inputs
        else:
            inputs = self._each[0]
            graph = retraced(self._one, inputs)
        self._function: Function = compiled(graph, inputs) if svi.inductor else graph
        self._recorded = Recorded(self._all, self._inputs) if is_recorded(self.device) else None

    def _bring_constants(self) -> None:
        """Let constants that programs make on the host lie on the device."""
        for captured in self.captured:
            for place in elsewhere(captured, self.device):
                if captured.held[place]:
                    where = captured.tensors[place].device
                    raise CannotCapture(f"they read a tensor on {where} that may change; move it to {self.device}")
                captured.tensors[place] = captured.tensors[place].to(self.device)

    def _graph_of_all(self) -> GraphModule:
        places = range(len(self._inputs))
        in_dims = tuple(None if place < len(self._shared) and self._shared[place] else 0 for place in places)
        try:
            return retraced(torch.func.vmap(self._one, in_dims), self._inputs)
        except RuntimeError as error:
            raise CannotCapture(f"it cannot be mapped over runs: {str(error).splitlines()[0]}") from error

    def _all(self, *inputs: Tensor) -> tuple[Tensor]:
        """The losses of all runs, ``(runs,)``, after a step of each."""
        if self._mapped:
            return (self._function(*inputs)[0],)
        return (self._one_by_one(self._parted(inputs)),)

    def _one_by_one(self, each: Sequence[Sequence[Tensor]]) -> Tensor:
        return torch.stack([self._function(*own)[0] for own in each])

    def _parted(self, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
        """What each run has of the inputs."""
        whole = [*self._shared, *[False] * (len(inputs) - len(self._shared))]
        return [
            [tensor if shared else tensor[i] for tensor, shared in zip(inputs, whole, strict=True)]
            for i in range(len(self.captured))
        ]

    def __call__(self, xs: Sequence[Tensor], taken: int) -> Tensor:
        if [identities(places) for places in self._places] != self._taken_as:
            raise CannotCapture("a number of a run changes from step to step; write it into a tensor")
        if not all(update.current for update in self.updates):  # a checkpoint was loaded
            self._bind(list(xs), taken)
            self._recorded = Recorded(self._all, self._inputs) if self._recorded else None
        rows = [update.advance(taken - self._bound_at) for update in self.updates]
        self._rates.copy_(torch.tensor(rows, dtype=self._rates.dtype), non_blocking=True)
        torch.stack(list(xs), out=self._x)
        for draw, noise in zip(self.draws, self._noise, strict=True):
            for generator, own in zip(self.svi.generators, noise, strict=True):
                draw.draw(own, generator=generator)
        if self._recorded is not None:
            return self._recorded()[0]
        with torch.no_grad():
            return self._function(*self._inputs)[0].clone() if self._mapped else self._one_by_one(self._each)

    def _bind(self, xs: list[Tensor], taken: int) -> None:
        """Stack what the runs read and write, and make their own tensors views into the stacks."""
        self.updates = [
            Update(run.optim, parameters) for run, parameters in zip(self.svi.runs, self.parameters, strict=True)
        ]
        self._refuse_other_options()
        self._bound_at = taken
        read = list(zip(*(captured.tensors for captured in self.captured), strict=True))
        self._shared = [all(tensor is same[0] for tensor in same) for same in read]
        lifted = [same[0] if shared else _stacked(same) for same, shared in zip(read, self._shared, strict=True)]
        self._x = torch.stack(xs)
        self._noise = [torch.stack([draw.example] * len(xs)) for draw in self.draws]
        state = [_stacked(same) for same in zip(*(update.tensors for update in self.updates), strict=True)]
        counters = [_stacked(same) for same in zip(*(update.counters for update in self.updates), strict=True)]
        self._sizes = [len(lifted), 1, len(self.numbers), len(self._noise), len(state), len(counters), 1]
        shape = (len(xs), *self.updates[0].rows)
        self._rates = torch.zeros(shape, dtype=self.parameters[0][0].dtype, device=self.device)
        self._inputs = [*lifted, self._x, *self.numbers, *self._noise, *state, *counters, self._rates]
        self._each = self._parted(self._inputs)

    def _one(self, *inputs: Tensor) -> tuple[Tensor]:
        """The step of one run, as :func:`torch.func.vmap` sees it."""
        rest = iter(inputs)
        lifted, (x,), numbers, noise, state, counters, (rates,) = ([next(rest) for _ in range(n)] for n in self._sizes)
        loss, *gradients = self.graph(*lifted, x, *numbers, *noise)
        stand_ins = {id(tensor): own for tensor, own in zip(self.captured[0].tensors, lifted, strict=True)}
        parameters = [stand_ins[id(parameter)] for parameter in self.parameters[0]]
        self.updates[0].apply(parameters, gradients, state, counters, rates, x.shape[0])
        return (loss,)

    def _refuse_other_options(self) -> None:
        options = [(update.clip, update.layout) for update in self.updates]
        if any(option != options[0] for option in options):
            raise CannotCapture("the runs' optimizers differ in more than their learning rates")


@contextmanager
def as_default(generator: torch.Generator) -> Iterator[None]:
    """Let torch draw from this generator where none is named, and leave the default ones as they were."""
    device = generator.device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        if cuda:
            torch.cuda.set_rng_state(generator.get_state(), device)
        else:
            torch.set_rng_state(generator.get_state())
        yield
        generator.set_state(torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state())


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one, ``(runs, *shape)``, into which each becomes a view."""
    stack = torch.stack([tensor.detach() for tensor in tensors])
    for tensor, own in zip(tensors, stack, strict=True):
        tensor.data = own
    return stack


def _lift_draws(graph: GraphModule) -> list[Draw]:
    """Turn the graph's random numbers into its last inputs."""
    draws: list[Draw] = []
    for node in list(graph.graph.nodes):
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        if node.target not in _DRAWS:
            raise CannotCapture(f"{node.target} draws from a generator that the runs cannot have each for itself")
        size, options = node.args[0], {key: node.kwargs.get(key) for key in ("dtype", "device")}
        _to_input(graph, node, f"noise_{len(draws)}")
        draws.append(Draw(_DRAWS[node.target], torch.empty(size, **options)))
    graph.recompile()
    return draws


def _to_input(graph: GraphModule, node: Node, name: str) -> None:
    """Replace a node by a new last input."""
    last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
    with graph.graph.inserting_after(last):
        node.replace_all_uses_with(graph.graph.placeholder(name))
    graph.graph.erase_node(node)


def _lift_differing_numbers(graphs: list[GraphModule]) -> list[Tensor]:
    """Turn the numbers in which graphs differ into last inputs of the first; their values for each, ``(runs,)``.

    Raises:
        CannotCapture: the graphs differ in more than numbers that multiply, divide or are added.
    """
    every = [list(graph.graph.nodes) for graph in graphs]
    if len({len(nodes) for nodes in every}) > 1:
        raise CannotCapture("the runs' operations differ")
    names = [{node: i for i, node in enumerate(nodes)} for nodes in every]
    values: list[Tensor] = []
    for nodes in zip(*every, strict=True):
        forms = [_form(node, place) for node, place in zip(nodes, names, strict=True)]
        if all(form == forms[0] for form in forms):
            continue
        values.append(_differing_number(nodes, forms))
        first = nodes[0]
        last = [n for n in graphs[0].graph.nodes if n.op == "placeholder"][-1]
        with graphs[0].graph.inserting_after(last):
            first.update_arg(1, graphs[0].graph.placeholder(f"number_{len(values)}"))
    graphs[0].recompile()
    return values


def _form(node: Node, place: dict[Node, int]) -> tuple[Any, ...]:
    """What a node does, in terms that compare across graphs."""
    args = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: f"node {place[n]}")
    val = node.meta.get("val")
    shape = (val.shape, val.stride(), val.dtype) if isinstance(val, Tensor) else None
    return node.op, node.target, args, shape


def _differing_number(nodes: Sequence[Node], forms: list[tuple[Any, ...]]) -> Tensor:
    target = forms[0][1]
    numbers = [form[2][0][1] if form[1] in _TAKES_TENSOR and len(form[2][0]) == 2 else None for form in forms]
    others = [(form[0], form[1], form[2][0][:1], form[2][1], form[3]) for form in forms]
    if any(other != others[0] for other in others) or not all(isinstance(n, int | float) for n in numbers):
        raise CannotCapture(f"the runs differ in {target}, which is no number that multiplies, divides or is added")
    val = nodes[0].meta["val"]
    return torch.tensor(numbers, dtype=val.dtype, device=val.device)
