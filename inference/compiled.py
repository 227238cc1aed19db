"""Stochastic variational inference whose step is one compiled function: loss, gradient and update of the parameters.

Pyro's handlers run once, when a step is captured. On a CPU the graph they leave is compiled by Inductor; on a GPU the
compiled kernels are recorded into a CUDA graph. Random numbers come from torch's generators as in an eager step, so
that the same seed gives the same run to rounding, under either engine and across a resume.
"""

import logging
from collections.abc import Callable
from typing import Any

import pyro.infer
import pyro.optim
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from inference.backends import Function, Recorded, compiled, retraced
from inference.capture import CannotCapture, Captured, capture, constants, identities
from inference.engine import SVI, SharedOptimizer
from inference.particles import Program
from inference.updates import Update, optimizers_of

log = logging.getLogger(__name__)
MAX_GRAPHS = 8  # shapes, modes and constants that one object compiles for


class CompiledSVI(SVI):
    """A drop-in for :class:`pyro.infer.SVI` that compiles its step and does not wait for the device.

    The first step runs eagerly and lets the optimizer set up its state. What cannot be captured (a structure that
    changes, an estimator or program that reads tensors on the host, an optimizer without a rule in
    :mod:`inference.updates`) runs eagerly throughout; one line of the log says why.

    Numbers that change over a run (a weight, a temperature) have to be written into a tensor, ``weight.fill_(0.5)``:
    a graph keeps plain numbers as constants and is compiled again where one changes. The learning rate may change
    freely.

    Args:
        model: Pyro program p(x, z).
        guide: Pyro program q(z|x).
        optim: any of Pyro's optimizers, or :class:`~inference.engine.SharedOptimizer`.
        loss: an ELBO of Pyro's or ours, or a function ``(model, guide, *args) -> loss``.
        loss_and_grads: as in Pyro; a step with one of the caller's own is not captured.
        batch_size: compile for batches of this many data alone; others, such as the last of an epoch, run eagerly,
            which gives the same numbers. None compiles for every size that comes.
        inductor: False runs the plain graph, operation by operation; on a GPU it is recorded all the same.

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
    ) -> None:
        pyro.infer.SVI.__init__(self, model, guide, optim, loss, loss_and_grads)
        self.objective = loss
        self.batch_size = batch_size
        self.inductor = inductor
        self.taken = 0
        self.why_eager: str | None = None
        self._graphs: dict[Any, _Step] = {}
        self._constants: list[tuple[dict[str, Any], str]] | None = None
        if loss_and_grads is not None:
            self._stay_eager("loss_and_grads is the caller's own")
        elif isinstance(loss, pyro.infer.ELBO) and (why := _no_plain_loss(type(loss))):
            self._stay_eager(why)

    def step(self, *args: Any, **kw: Any) -> Tensor | float:
        """Take one step.

        Returns:
            The loss in nats as in Pyro, but as a tensor on the device; ``float(loss)`` waits for it.
        """
        leaves, spec = tree_flatten((args, kw))
        ready = self._find(leaves, spec) if self.why_eager is None else None
        if ready is not None:
            loss: Tensor | float = ready(leaves, self.taken)
        else:
            loss = self.eager_step(*args, **kw)
        self.taken += 1
        return loss

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

    def _find(self, leaves: list[Any], spec: TreeSpec) -> "_Step | None":
        """The compiled step for these arguments, captured where there is none yet; None if they run eagerly."""
        if self.batch_size is not None and leaves[0].shape[0] != self.batch_size:
            return None
        try:
            if not (self._graphs or started(self.optim)):
                return None
            key = self._key(leaves, spec)
            if key not in self._graphs:
                if len(self._graphs) == MAX_GRAPHS:
                    raise CannotCapture(self._what_changes())
                self._graphs[key] = _Step(self, leaves, spec)
            return self._graphs[key]
        except CannotCapture as error:
            self._stay_eager(str(error))
            return None

    def _key(self, leaves: list[Any], spec: TreeSpec) -> tuple[Any, ...]:
        """Everything that a graph takes as given."""
        if self._constants is None:
            self._constants = constants([self.model, self.guide, self.objective])
        shapes = tuple((a.shape, a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else a for a in leaves)
        trained = tuple([p.requires_grad for p in self.optim.parameters]) if hasattr(self.optim, "parameters") else ()
        key = (spec, shapes, trained, identities(self._constants))
        try:
            hash(key)
        except TypeError:
            raise CannotCapture("an argument is neither a tensor nor hashable") from None
        return key

    def _what_changes(self) -> str:
        """The constant that made so many graphs necessary."""
        assert self._constants is not None
        taken = list(zip(*(key[3] for key in self._graphs), strict=True))
        names = [name for (_, name), values in zip(self._constants, taken, strict=True) if len(set(values)) > 1]
        if names:
            return f"'{names[0]}' changes from step to step as a number or by assignment; write it into a tensor"
        return f"its arguments came in more than {MAX_GRAPHS} shapes"

    def _stay_eager(self, why: str) -> None:
        self.why_eager = " ".join(why.split())
        self._graphs.clear()
        log.warning("steps run eagerly: %s", self.why_eager)


class _Step:
    """The compiled step for one shape of the arguments."""

    def __init__(self, svi: CompiledSVI, leaves: list[Any], spec: TreeSpec) -> None:
        self.optim = svi.optim
        args = _tensors(leaves)
        self.captured, self.parameters = loss_and_gradients(svi, leaves, spec)
        self.device = self.parameters[0].device
        self._bind(args, svi.taken)
        self._function: Function = retraced(self._whole, self._inputs)
        if svi.inductor:
            self._function = compiled(self._function, self._inputs)
        self._recorded = Recorded(self._function, self._inputs) if self.device.type == "cuda" else None

    def __call__(self, leaves: list[Any], taken: int) -> Tensor:
        """One step on these arguments, ``taken`` being the number of steps before it; returns the loss."""
        args = _tensors(leaves)
        if not self.update.current:  # a checkpoint was loaded
            self._bind(args, taken)
            self._recorded = Recorded(self._function, self._inputs) if self._recorded else None
        self._write_numbers(self.update.advance(taken - self._bound_at))
        if self._recorded is not None:
            torch._foreach_copy_(self._inputs[self._args], args)
            return self._recorded()[0]
        self._inputs[self._args] = args
        with torch.no_grad():
            return self._function(*self._inputs)[0]

    def _bind(self, args: list[Tensor], taken: int) -> None:
        """Look up the tensors that every step reads and writes."""
        self.update = Update(self.optim, self.parameters)
        self._bound_at = taken
        numbers = self.update.rows
        self._numbers = torch.zeros(numbers, dtype=self.parameters[0].dtype, device=self.device)
        self._args = slice(len(self.captured.tensors), len(self.captured.tensors) + len(args))
        on_device = [arg.clone() for arg in args] if self.device.type == "cuda" else args
        state = [*self.update.tensors, *self.update.counters, self._numbers]
        self._inputs = [*self.captured.tensors, *on_device, *state]

    def _whole(self, *inputs: Tensor) -> tuple[Tensor]:
        """The whole step on stand-ins for the inputs: the loss, its gradient, and the update written in place."""
        lifted, args, rest = inputs[: self._args.start], inputs[self._args], inputs[self._args.stop :]
        loss, *gradients = self.captured.graph(*lifted, *args)
        stand_ins = {id(tensor): stand_in for tensor, stand_in in zip(self.captured.tensors, lifted, strict=True)}
        state = rest[: len(self.update.tensors)]
        counters, numbers = rest[len(self.update.tensors) : -1], rest[-1]
        parameters = [stand_ins[id(parameter)] for parameter in self.parameters]
        self.update.apply(parameters, gradients, state, counters, numbers, args[0].shape[0])
        return (loss,)

    def _write_numbers(self, numbers: list[tuple[float, ...]]) -> None:
        if self.device.type == "cpu":
            self._numbers.copy_(torch.tensor(numbers, dtype=self._numbers.dtype))
        else:  # through pinned memory, without a wait
            host = torch.tensor(numbers, dtype=self._numbers.dtype, pin_memory=True)
            self._numbers.copy_(host, non_blocking=True)


def loss_and_gradients(svi: CompiledSVI, leaves: list[Any], spec: TreeSpec) -> tuple[Captured, list[Tensor]]:
    """The graph of a step's loss and of its gradient for each parameter that has one; these parameters.

    Raises:
        CannotCapture: see :func:`inference.capture.capture`.
    """
    candidates = [p for o in optimizers_of(svi.optim) for g in o.param_groups for p in g["params"] if p.requires_grad]
    reached: list[Tensor] = []

    def function(*tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        args, kw = tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        loss = svi.differentiable_loss(*args, **kw)
        if not (isinstance(loss, Tensor) and loss.requires_grad):
            raise CannotCapture("the loss has no gradient")
        gradients = torch.autograd.grad(loss, candidates, allow_unused=True)
        reached[:] = [p for p, gradient in zip(candidates, gradients, strict=True) if gradient is not None]
        return [loss.detach(), *[gradient for gradient in gradients if gradient is not None]]

    captured = capture(function, _tensors(leaves), [svi.model, svi.guide, svi.objective])
    return captured, reached


def started(optim: pyro.optim.PyroOptim) -> bool:
    """Whether the torch optimizers exist, and have state where they keep any."""
    optimizers = optimizers_of(optim)
    stateless = [isinstance(o, torch.optim.SGD) and not o.defaults["momentum"] for o in optimizers]
    return bool(optimizers) and all(o.state or free for o, free in zip(optimizers, stateless, strict=True))


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


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
