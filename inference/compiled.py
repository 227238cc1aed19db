"""Stochastic variational inference whose step is one compiled function: loss, gradient and update of the parameters.

Pyro's handlers run once, when a step is captured. On a CPU the graph they leave is compiled by Inductor; on a GPU the
compiled kernels are recorded into a CUDA graph. Random numbers come from torch's generators as in an eager step, so
that the same seed gives the same run to rounding, under either engine and across a resume.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pyro
import pyro.infer
import pyro.optim
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten

from inference.arguments import Floats
from inference.capture import CannotCapture, NotYet
from inference.engine import SVI, SharedOptimizer
from inference.parameters import in_modules
from inference.particles import Program
from inference.step import CompiledStep, loss_and_gradients
from inference.updates import started
from inference.watched import Space, constants, identities, is_plain, name_of

log = logging.getLogger(__name__)
MAX_GRAPHS = 8  # shapes, modes and constants that one object compiles for
_ONE_TENSOR = tree_flatten(((0,), {}))[1]  # the arguments of most steps


class CompiledSVI(SVI):
    """A drop-in for :class:`pyro.infer.SVI` that compiles its step and does not wait for the device.

    The first step runs eagerly and lets the optimizer set up its state. What cannot be captured (a structure that
    changes, an estimator or program that reads tensors on the host, an optimizer without a rule in
    :mod:`inference.updates`) runs eagerly throughout; one line of the log says why.

    A float among the arguments of :meth:`step` may change from step to step (an annealed weight, a temperature), and so
    may the learning rate: nothing is compiled again. Where the program needs the plain number, as in ``if beta > 0.5``,
    there is a graph for each value. Numbers that the programs hold themselves are constants of a graph too: write what
    changes into a tensor, ``weight.fill_(0.5)``.

    Args:
        model: Pyro program p(x, z).
        guide: Pyro program q(z|x).
        optim: any of Pyro's optimizers, or :class:`~inference.engine.SharedOptimizer`.
        loss: an ELBO of Pyro's or ours, or a function ``(model, guide, *args) -> loss``.
        loss_and_grads: as in Pyro; a step with one of the caller's own is not captured.
        batch_size: compile for batches of this many data alone; others, such as the last of an epoch, run eagerly,
            which gives the same numbers. None compiles for every size that comes.
        inductor: False runs the plain graph, operation by operation; on a GPU it is recorded all the same.
        steps_per_call: how many of the steps that :meth:`steps` is asked for are taken in one call, which prepares them
            at once; on a GPU they are one recording.

    Attributes:
        taken: steps taken by this object.
        why_eager: why steps are not compiled; None where they are.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: pyro.optim.PyroOptim,
        loss: pyro.infer.ELBO | Callable[..., Tensor],
        loss_and_grads: Callable[..., Any] | None = None,
        batch_size: int | None = None,
        inductor: bool = True,
        steps_per_call: int = 1,
    ) -> None:
        if steps_per_call < 1:
            raise ValueError(f"steps_per_call must be at least 1, got {steps_per_call}")
        pyro.infer.SVI.__init__(self, model, guide, optim, loss, loss_and_grads)
        self.objective = loss
        self.steps_per_call = steps_per_call
        self.batch_size = batch_size
        self.inductor = inductor
        self.taken = 0
        self.why_eager: str | None = None
        self._graphs: dict[Any, CompiledStep] = {}
        self._constants: list[tuple[Space, str]] | None = None
        self._floats: dict[TreeSpec, Floats] = {}
        self._put_off = 0  # steps in a row that were to bring in parameters
        if loss_and_grads is not None:
            self._stay_eager("loss_and_grads is the caller's own")
        elif isinstance(loss, pyro.infer.ELBO) and (why := _no_plain_loss(type(loss))):
            self._stay_eager(why)

    def step(self, *args: Any, **kw: Any) -> Tensor | float:
        """Take one step.

        Returns:
            The loss in nats as in Pyro, but as a tensor on the device; ``float(loss)`` waits for it.
        """
        plain = len(args) == 1 and not kw and isinstance(args[0], Tensor)
        leaves, spec = (list(args), _ONE_TENSOR) if plain else tree_flatten((args, kw))
        with self.store():
            ready = self._find(leaves, spec) if self.why_eager is None else None
        if ready is not None:
            loss: Tensor | float = ready(ready.inputs_from(leaves), [ready.numbers(self.taken)])[0]
        else:
            loss = self.eager_step(*args, **kw)
            self._mark(None)
        self.taken += 1
        return loss

    def steps(self, batches: Sequence[Tensor], before: Callable[[int], None] | None = None) -> Tensor:
        """A step on each batch, ``steps_per_call`` of them in one call where they are alike.

        The numbers are those of as many calls of :meth:`step`, to rounding.

        Args:
            batches: each ``(B, *event_shape)``.
            before: called with 0, 1, ... before each step, sets the learning rate and what is annealed; it may be
                called several times with the same number.

        Returns:
            The losses in nats, one for each batch.
        """
        losses, at_once = [], self.steps_per_call
        for start in range(0, len(batches), at_once):
            some = batches[start : start + at_once]
            prepare = None if before is None else lambda i, start=start: before(start + i)
            with self.store():
                ready = self._find_several(some, prepare) if len(some) == at_once > 1 else None
            if ready is None:
                losses.append(torch.stack([self._single(x, prepare, i) for i, x in enumerate(some)]))
            else:
                losses.append(self._several(ready, some, prepare))
        return torch.cat(losses)

    def _single(self, x: Tensor, before: Callable[[int], None] | None, i: int) -> Tensor:
        if before is not None:
            before(i)
        return torch.as_tensor(self.step(x))

    def _several(self, ready: CompiledStep, batches: Sequence[Tensor], before: Callable[[int], None] | None) -> Tensor:
        rows = []
        for i in range(len(batches)):
            if before is not None:
                before(i)
            ready.note_annealed(i)
            rows.append(ready.numbers(self.taken + i))
        losses = ready(list(batches), rows)
        self.taken += len(batches)
        return losses

    def _find_several(self, batches: Sequence[Tensor], before: Callable[[int], None] | None) -> CompiledStep | None:
        """The compiled function of several steps; None where these batches or what changes between them forbid it."""
        if self.why_eager is not None or len({x.shape for x in batches}) > 1:
            return None
        if before is not None and not self._keeps_its_numbers(len(batches), before):
            return None
        ready = self._find([batches[0]], _ONE_TENSOR, len(batches))
        if ready is None or before is None:
            return ready
        versions = []
        for i in range(len(batches)):
            before(i)
            versions.append(ready.versions())
        return ready if all(version == versions[0] for version in versions[1:]) else None

    def _keeps_its_numbers(self, count: int, before: Callable[[int], None]) -> bool:
        """Whether all that a graph takes as constant is the same before each of several steps."""
        places = self._places()
        taken = []
        for i in range(count):
            before(i)
            taken.append(identities(places))
        return all(each == taken[0] for each in taken)

    def _places(self) -> list[tuple[Space, str]]:
        if self._constants is None:
            self._constants = constants([self.model, self.guide, self.objective])
        return self._constants

    def store(self) -> AbstractContextManager[Any]:
        """Programs run with their parameters in their modules where the optimizer knows these, else as Pyro has it."""
        return in_modules() if isinstance(self.optim, SharedOptimizer) else nullcontext()

    def eager_step(self, *args: Any, **kw: Any) -> Tensor | float:
        """One step as Pyro takes it."""
        if isinstance(self.optim, SharedOptimizer):
            return super().step(*args, **kw)
        return pyro.infer.SVI.step(self, *args, **kw)

    def differentiable_loss(self, *args: Any, **kw: Any) -> Tensor:
        """The loss whose gradient a step follows, in nats."""
        if isinstance(self.objective, pyro.infer.ELBO):
            return self.objective.differentiable_loss(self.model, self.guide, *args, **kw)
        return self.objective(self.model, self.guide, *args, **kw)

    def _find(self, leaves: list[Any], spec: TreeSpec, count: int = 1) -> CompiledStep | None:
        """The compiled step for these arguments, captured where there is none yet; None if they run eagerly.

        With ``count``, of so many steps on arguments like these.
        """
        if self.batch_size is not None and leaves[0].shape[0] != self.batch_size:
            return None
        try:
            floats = None if spec is _ONE_TENSOR else self._floats_of(leaves, spec)
            if not (self._graphs or started(self.optim)):
                return None
            inputs = () if floats is None else floats.inputs_of(leaves)
            key = self._key(leaves, count, floats, inputs)
            ready = self._graphs.get(key)
            if ready is not None and not ready.is_valid(self.taken, self._mark(ready) is ready):
                ready = None
            if ready is None:
                self._graphs.pop(key, None)
                if len(self._graphs) == MAX_GRAPHS:
                    raise CannotCapture(self._what_changes())
                ready = CompiledStep(self, leaves, spec, count, inputs)
                self._graphs[self._key(leaves, count, floats, inputs)] = ready  # with what capturing prepared
                self._mark(ready)
            self._put_off = 0
            return ready
        except NotYet as error:
            self._put_off += 1
            if self._put_off > MAX_GRAPHS:
                self._stay_eager(str(error))
            return None
        except CannotCapture as error:
            self._stay_eager(str(error))
            return None

    def _mark(self, step: CompiledStep | None) -> CompiledStep | None:
        """Note on the optimizer, which others may use too, whose step comes next; returns what was noted before."""
        before = getattr(self.optim, "last_compiled_step", None)
        self.optim.last_compiled_step = step
        return before

    def _floats_of(self, leaves: list[Any], spec: TreeSpec) -> Floats:
        """Which floats are inputs of a graph, for arguments of this structure."""
        floats = self._floats.get(spec) or self._floats.setdefault(spec, Floats(spec))
        if floats.changed(leaves):
            can_tell = self._graphs or started(self.optim)
            floats.note(leaves, partial(loss_and_gradients, self, leaves, spec) if can_tell else None)
        return floats

    def _key(self, leaves: list[Any], count: int, floats: Floats | None, inputs: tuple[int, ...]) -> tuple[Any, ...]:
        """Everything that a graph takes as given; there is one ``floats`` for each structure of the arguments."""
        leaves = [float if place in inputs else leaf for place, leaf in enumerate(leaves)] if inputs else leaves
        shapes = tuple((a.shape, a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else a for a in leaves)
        for place, leaf in enumerate(leaves):
            if not (isinstance(leaf, Tensor) or leaf is float or is_plain(leaf)):
                name = "an argument" if floats is None else floats.name(place)
                raise CannotCapture(
                    f"{name} is a {type(leaf).__name__}; a graph takes tensors, numbers, words and None"
                )
        return floats, shapes, self._trained(), identities(self._places()), count

    def _trained(self) -> tuple[Any, ...]:
        """Which parameters there are, and which of them are trained."""
        if isinstance(self.optim, SharedOptimizer):
            return tuple([p.requires_grad for p in self.optim.parameters])
        kept = pyro.get_param_store()._params.values()
        flags = [p.grad is None for p in self.optim.optim_objs]  # such a parameter is not stepped on until it has one
        return tuple([-id(p) if p.requires_grad else id(p) for p in kept]), tuple(flags)

    def _what_changes(self) -> str:
        """The constant that made so many graphs necessary."""
        assert self._constants is not None
        taken = list(zip(*(key[3] for key in self._graphs), strict=True))
        names = [name_of(*place) for place, values in zip(self._constants, taken, strict=True) if len(set(values)) > 1]
        if names:
            return f"'{names[0]}' changes from step to step as a number or by assignment; write it into a tensor"
        return self._what_differs() or f"its arguments came in more than {MAX_GRAPHS} shapes"

    def _what_differs(self) -> str | None:
        """The plain argument that made so many graphs necessary."""
        for floats in self._floats.values():
            alike = [key[1] for key in self._graphs if key[0] is floats]
            for place, values in enumerate(zip(*alike, strict=True)):
                if len(set(values)) > 2 and not isinstance(values[0], tuple):
                    other = "what is neither a float nor a tensor is a constant of a graph"
                    return f"{floats.name(place)} changes from step to step: {floats.refused.get(place, other)}"
        return None

    def _stay_eager(self, why: str) -> None:
        self.why_eager = " ".join(why.partition("Trace Shapes:")[0].split())  # Pyro adds a table to what is raised
        self._graphs.clear()
        log.warning("steps run eagerly: %s", self.why_eager)


def _no_plain_loss(kind: type) -> str | None:
    """Why an estimator cannot be captured, if it is known beforehand."""
    if kind.__name__.startswith("Jit"):
        return f"{kind.__name__} compiles for itself; use {kind.__name__.removeprefix('Jit')}"
    owners = [
        next((c for c in kind.__mro__ if name in vars(c)), None) for name in ("differentiable_loss", "loss_and_grads")
    ]
    loss, gradients = (kind.__mro__.index(owner) if owner else len(kind.__mro__) for owner in owners)
    if gradients < loss:
        return f"{kind.__name__} takes gradients in its own loss_and_grads and has no differentiable_loss to match"
    return None
