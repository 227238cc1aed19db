"""Sums over the states of discrete latents, of bounds that are linear in their draws."""

from pyro import poutine
from torch import Tensor

from inference.objectives import Objective
from inference.particles import particles
from inference.structure import Program, StructureError


def placed(guide: Program, **values: Tensor) -> Program:
    """The guide with its latents at given values in place of draws; it scores them as its own."""
    trace = poutine.Trace()
    for name, value in values.items():
        trace.add_node(name, type="sample", name=name, is_observed=False, value=value, infer={})
    return poutine.replay(guide, trace=trace)


def summed(objective: Objective, model: Program, guide: Program, x: Tensor, states: Tensor, site: str = "z") -> Tensor:
    """A bound whose expectation over one discrete latent is a sum: ``(N,)`` nats, without sampling noise.

    Args:
        objective: one that is the mean of its particles' contributions, such as the ELBO under any weight of its KL.
        model: Pyro program.
        guide: Pyro program whose site of that name has finitely many states.
        x: data, ``(N, *event_shape)``.
        states: all of them, ``(S, *event_shape of the latent)``.
        site: the latent's name.

    Raises:
        StructureError: the bound is another function of its particles.
    """
    if not objective.linear:
        raise StructureError(
            f"{type(objective).__name__} is no mean over particles, so it is no sum over states; use an ELBO"
        )
    size = (states.shape[0], x.shape[0])
    values = states.unsqueeze(1).expand(*size, *states.shape[1:])  # (S, *event) -> (S, N, *event)
    draws = particles(model, placed(guide, **{site: values}), x, states.shape[0])
    return (draws.latents[site].log_q().exp() * objective.contribution(draws)).sum(0)
