"""Climbing a bound without sampling noise: its half steps, a line search, and variational EM made of it."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

HALVINGS = 40


class EMError(RuntimeError):
    """EM could not go on; the message says what to try."""


class HalfStep(NamedTuple):
    """What one half step did; in nats per datum (for K-means minus mean squared distances)."""

    iteration: int  # from 1
    kind: str  # "E": q moved, "M": the model moved
    free_energy: float  # F(q, theta), plus the log-prior of theta per datum where the model has one
    log_evidence: float | None = None  # log p(x), or for hard EM max_z log p(x, z); of EM known after E steps only


OnHalfStep = Callable[[HalfStep], None]


def checked(step: HalfStep, before: HalfStep | None, dtype: torch.dtype) -> HalfStep:
    """The same step; no half step lowers F: the theorem that tells a bug, or a precision too low, from a slow start.

    Raises:
        EMError: this one did, or F is not finite.
    """
    if not abs(step.free_energy) < float("inf"):
        raise EMError(
            f"F is {step.free_energy} after the {step.kind} step of iteration {step.iteration}; standardize x"
        )
    slack = 1e3 * torch.finfo(dtype).eps
    if before is not None and step.free_energy < before.free_energy - slack * (1 + abs(before.free_energy)):
        raise EMError(
            f"the {step.kind} step of iteration {step.iteration} lowered F from {before.free_energy:.12g} to "
            f"{step.free_energy:.12g} per datum: the two half steps are not of one bound, or too little precision is "
            "left; try float64 or standardized data"
        )
    return step


def stands_still(before: HalfStep, after: HalfStep, tolerance: float) -> bool:
    """Whether F gained no more than the tolerance, or than its own rounding, over an iteration."""
    rounding = 4 * torch.finfo(torch.float64).eps * abs(after.free_energy)
    return after.free_energy - before.free_energy <= max(tolerance, rounding)


def ascend(
    parameters: Iterable[nn.Parameter], bound: Callable[[], Tensor], steps: int = 1, size: float = 1.0
) -> Tensor:
    """Gradient steps that never lower ``bound``, which they change no other parameters of; returns it, ``()``.

    Each step is halved until it gains a little of what its slope promises (Armijo 1966), and kept back if none does;
    one that gains at once is longer the next time.

    Args:
        parameters: what is moved.
        bound: a function of them without sampling noise.
        steps: how many.
        size: length of the first step, relative to the gradient divided by its norm.
    """
    moved = [p for p in parameters if p.requires_grad]
    value = bound()
    for _ in range(steps):
        gradients = torch.autograd.grad(value, moved, allow_unused=True)
        direction = [torch.zeros_like(p) if g is None else g for p, g in zip(moved, gradients, strict=True)]
        slope = torch.stack([d.square().sum() for d in direction]).sum()
        norm = float(slope.sqrt())
        if not 0 < norm < float("inf"):
            break
        start = [p.detach().clone() for p in moved]
        for _ in range(HALVINGS):
            with torch.no_grad():
                for p, origin, d in zip(moved, start, direction, strict=True):
                    p.copy_(origin + size / norm * d)
            after = bound()
            if bool(after >= value + 1e-4 * size * norm):
                value, size = after, 2 * size
                break
            size /= 2
        else:
            with torch.no_grad():
                for p, origin in zip(moved, start, strict=True):
                    p.copy_(origin)
            break
    return value.detach()


class VariationalEM:
    """Alternate ascent in the guide's parameters (E) and in the model's (M) on one bound (Neal and Hinton 1998).

    Each block changes its own parameters only, and no half step lowers the bound, which has to be free of sampling
    noise: enumerated latents, or one draw for good, that of ``seed``.

    Args:
        model: Pyro program.
        guide: Pyro program, with parameters of its own.
        elbo: any of Pyro's with ``differentiable_loss``, or ours. One that has ``half_step(kind, model, guide, x,
            steps)`` makes the half step itself, and returns the bound per datum and how often it went through x.
        x: data ``(N, *event_shape)``, all of them at every step.
        iterations: most pairs of half steps.
        e_steps: gradient steps of an E half step.
        m_steps: gradient steps of an M half step.
        tolerance: a gain of the bound per datum below it, over one iteration, ends the run.
        seed: of the random numbers, the same at every evaluation; None where there are none.
        on_half_step: called after each half step.

    Attributes:
        iteration: how many were made.
        converged: whether the tolerance was met.
        passes: over the data, one for each evaluation of the bound.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        elbo: ELBO | Any,
        x: Tensor,
        iterations: int = 100,
        e_steps: int = 10,
        m_steps: int = 10,
        tolerance: float = 0.0,
        seed: int | None = None,
        on_half_step: OnHalfStep | None = None,
    ) -> None:
        shared = {id(p) for p in model.parameters()} & {id(p) for p in guide.parameters()}
        if shared:
            raise ValueError(f"model and guide share {len(shared)} parameters; variational EM moves them in turn")
        self.model, self.guide, self.elbo, self.x, self.seed = model, guide, elbo, x, seed
        self.blocks = (("E", guide, e_steps), ("M", model, m_steps))
        self.iterations, self.tolerance, self.on_half_step = iterations, tolerance, on_half_step
        self.iteration, self.passes, self.converged = 0, 0.0, False
        self.best_start = 0
        self._last: HalfStep | None = None

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.converged or self.iteration == self.iterations

    @property
    def remaining(self) -> int:
        """Iterations still to come at most."""
        return 0 if self.converged else self.iterations - self.iteration

    @property
    def ends(self) -> list[float | None]:
        """The bound at the end, per datum; nothing before."""
        return [self._last.free_energy] if self.finished and self._last else []

    def step(self) -> list[HalfStep]:
        """One iteration; returns its two half steps."""
        before, steps = self._last, []
        self.iteration += 1
        for kind, program, count in self.blocks:
            value = float(self._half_step(kind, program, count))
            self._last = checked(HalfStep(self.iteration, kind, value), self._last, self.x.dtype)
            steps.append(self._last)
            if self.on_half_step is not None:
                self.on_half_step(self._last)
        self.converged = before is not None and stands_still(before, steps[-1], self.tolerance)
        return steps

    def _half_step(self, kind: str, program: nn.Module, steps: int) -> Tensor:
        if not hasattr(self.elbo, "half_step"):
            return ascend(program.parameters(), self._bound, steps)
        bound, passes = self.elbo.half_step(kind, self.model, self.guide, self.x, steps)
        self.passes += passes
        return bound

    def _bound(self) -> Tensor:
        self.passes += 1
        if self.seed is None:
            return -self.elbo.differentiable_loss(self.model, self.guide, self.x) / self.x.shape[0]
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return -self.elbo.differentiable_loss(self.model, self.guide, self.x) / self.x.shape[0]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the coming iterations depend on, besides model and guide: tensors, and what JSON holds."""
        return {}, {
            "iteration": self.iteration,
            "passes": self.passes,
            "converged": self.converged,
            "last": self._last,
        }

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        self.iteration, self.passes, self.converged = state["iteration"], state["passes"], state["converged"]
        self._last = None if state["last"] is None else HalfStep(*state["last"])


def variational_em(*args: Any, **options: Any) -> list[HalfStep]:
    """Run a :class:`VariationalEM` of these arguments to its end; returns all its half steps."""
    em = VariationalEM(*args, **options)
    history: list[HalfStep] = []
    while not em.finished:
        history += em.step()
    return history
