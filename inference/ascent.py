"""Climbing a bound without sampling noise by gradients: a line search, and variational EM made of it."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

HALVINGS = 40


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


class Alternation(NamedTuple):
    """One half step of variational EM."""

    iteration: int  # from 1
    kind: str  # "E": the guide's parameters moved, "M": the model's
    bound: float  # nats per datum


def variational_em(
    model: nn.Module,
    guide: nn.Module,
    elbo: ELBO,
    x: Tensor,
    iterations: int = 100,
    e_steps: int = 10,
    m_steps: int = 10,
    on_half_step: Callable[[Alternation], None] | None = None,
) -> list[Alternation]:
    """Alternate ascent in the guide's parameters (E) and in the model's (M) on one bound (Neal and Hinton 1998).

    Each block changes its own parameters only, and no half step lowers the bound, which has to be free of sampling
    noise: enumerated latents, or a fixed draw.

    Args:
        model: Pyro program.
        guide: Pyro program, with parameters of its own.
        elbo: any of Pyro's with ``differentiable_loss``, or ours.
        x: data ``(N, *event_shape)``, all of them at every step.
        iterations: pairs of half steps.
        e_steps: gradient steps of an E half step.
        m_steps: gradient steps of an M half step.
        on_half_step: called after each half step.
    """
    shared = {id(p) for p in model.parameters()} & {id(p) for p in guide.parameters()}
    if shared:
        raise ValueError(f"model and guide share {len(shared)} parameters; variational EM moves them in turn")

    def bound() -> Tensor:
        loss = elbo.differentiable_loss(model, guide, x)
        return -loss / x.shape[0]

    history = []
    for iteration in range(1, iterations + 1):
        for kind, program, steps in (("E", guide, e_steps), ("M", model, m_steps)):
            value = float(ascend(program.parameters(), bound, steps))
            history.append(Alternation(iteration, kind, value))
            if on_half_step is not None:
                on_half_step(history[-1])
    return history
