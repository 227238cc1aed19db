"""ELBO surgery without sampling noise, where the latent is small: by sums over states or by quadrature."""

import math
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.diagnostics import Surgery, surgery
from inference.particles import Particles, particles, validation
from inference.structure import Program, StructureError, innermost
from models.flows import Flow

MOST_DENSITIES = 2**24  # points of the grid, or states, times data
AT_ONCE = 2**20
DRAWS = 256  # of each posterior, to see where it lies
REACH = 8.0  # standard deviations around each mean that the grid covers
STEPS = (0.8, 0.4)  # of the grid, in standard deviations of the narrowest posterior; the finer where mass is missed
FLOWS = 16  # times as costly to score as a normal, or more
LOST = {torch.float32: 1e-5, torch.float64: 1e-8}  # of the mass of any posterior


@torch.no_grad()
def exact_surgery(model: Program, guide: Program, x: Tensor, most: int = MOST_DENSITIES) -> Surgery:
    """ELBO surgery of the data ``(N, *event_shape)`` by enumeration or quadrature.

    For one latent, with the same prior for all data, that has few states (categorical, bits, one-hot vectors) or one or
    two real dimensions. The quadrature is the trapezoidal rule on one grid for all data, as fine as the narrowest
    posterior wants it, and is believed if it finds the mass of every posterior.

    Args:
        model: Pyro program.
        guide: Pyro program, in evaluation mode.
        x: data.
        most: points of the grid, or states, times data: how many densities may be computed; of flows a sixteenth.

    Raises:
        StructureError: it is another kind of latent, or takes more densities than that, or the posteriors have edges;
            :func:`inference.diagnostics.surgery` estimates.
    """
    # asking leaves no trace in the numbers that follow; the grid may leave a support, and the mass shows it
    with torch.random.fork_rng(), validation(False):
        q, p = _the_latent(model, particles(model, guide, x), x)
        return _exact(q, p, most)


def best_surgery(
    model: Program, guide: Program, x: Tensor, population: int | None = None, most: int = MOST_DENSITIES
) -> Surgery:
    """:func:`exact_surgery` where it can be had, the estimate where not; which it was is said in the answer.

    Arguments as of both. ``upper`` is an estimate still where ``x`` is a part of a larger population.
    """
    estimated = surgery(model, guide, x, population=population)
    try:
        exact = exact_surgery(model, guide, x, most)
    except StructureError:
        return estimated
    if estimated.population == exact.population:
        return exact
    return replace(exact, upper=max(estimated.upper, exact.upper), population=estimated.population)


def _exact(q: Any, p: Any, most: int) -> Surgery:
    if q.has_enumerate_support:
        states = q.enumerate_support(expand=False)  # (S, 1, *event)
        _expect_few(len(states) * q.batch_shape[0], most)
        return _summed(q, p, states, 1.0, f"a sum over {len(states):,} states")[0]
    most = most // FLOWS if isinstance(innermost(q), Flow) else most
    for step in STEPS:
        points, area = _grid(q, step, most)
        found, mass = _summed(q, p, points, area, f"quadrature over {len(points):,} points")
        if (mass - 1).abs().max() < LOST.get(points.dtype, 1e-3):
            break
    else:
        raise StructureError(f"the grid finds {float(mass.min()):.6f} of some posterior; use surgery")
    if not math.isfinite(found.kl):
        raise StructureError("the posteriors reach where the prior has no density; use surgery")
    return found


def _the_latent(model: Program, draws: Particles, x: Tensor) -> tuple[Any, Any]:
    """q(z|x) of all data, batch shape ``(N,)``, and p(z) of one datum, which has to be that of all.

    Raises:
        StructureError: there are several latents, or they differ in their prior, or have masks.
    """
    if len(draws.latents) != 1 or draws.auxiliary:
        raise StructureError(f"exact surgery is of one latent; these are {[*draws.latents, *draws.auxiliary]}")
    ((name, latent),) = draws.latents.items()
    if latent.q.batch_shape != draws.log_q.shape[1:] or not (latent.q_mask is latent.p_mask is None):
        raise StructureError("exact surgery is of a latent in the plate over the data, without a mask")
    drawn = latent.value[:1]

    def first(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample(name, dist.Delta(drawn, event_dim=len(latent.q.event_shape)))

    p = particles(model, first, x[:1]).latents[name].p
    if not torch.allclose(p.log_prob(latent.value), latent.p.log_prob(latent.value), rtol=1e-4, atol=1e-4):
        raise StructureError("exact surgery is against one prior; here each datum has its own")
    return latent.q, p


def _expect_few(densities: int, most: int) -> None:
    if densities > most:
        raise StructureError(f"exact surgery would take {densities:,} densities, and {most:,} are allowed; use surgery")


def _grid(q: Any, width: float, most: int) -> tuple[Tensor, float]:
    """Points ``(S, 1, *event)`` that cover every posterior, and the length or area that each stands for.

    They are ``width`` standard deviations of the narrowest posterior apart.
    """
    dim = q.event_shape.numel()
    if dim not in (1, 2) or q.support.is_discrete:
        raise StructureError(f"exact surgery is of few states or at most two real dimensions, not of {dim} as here")
    draws = q.sample(torch.Size((DRAWS,)))  # (256, N, *event)
    flat = draws.flatten(2) if draws.dim() > 2 else draws.unsqueeze(-1)
    loc, scale = flat.mean(0), flat.std(0)  # (N, D)
    step = width * scale.amin(0)
    low, high = (loc - REACH * scale).amin(0), (loc + REACH * scale).amax(0)
    if not (step > 0).all() or not torch.isfinite(high - low).all():
        raise StructureError("exact surgery needs posteriors of some width and a finite one; use surgery")
    counts = ((high - low) / step).double().ceil().add(1).tolist()
    _expect_few(int(math.prod(counts)) * len(loc), most)
    axes = [a + s * torch.arange(int(n), device=s.device) for a, s, n in zip(low, step, counts, strict=True)]
    points = torch.cartesian_prod(*axes).reshape(-1, 1, *q.event_shape)
    return points, float(step.prod())


def _summed(q: Any, p: Any, points: Tensor, weight: float, estimator: str) -> tuple[Surgery, Tensor]:
    """The parts as sums over points ``(S, 1, *event)`` of one weight, and the mass found of each posterior ``(N,)``."""
    num_data = q.batch_shape[0]
    kl, information, marginal = (torch.zeros((), dtype=torch.float64, device=points.device) for _ in range(3))
    mass = torch.zeros(num_data, dtype=torch.float64, device=points.device)
    for some in points.split(max(1, AT_ONCE // num_data)):
        log_q = q.log_prob(some).double()  # (C, N)
        log_p = p.log_prob(some).double().reshape(-1, 1)  # (C, 1)
        log_aggregate = log_q.logsumexp(1, keepdim=True) - math.log(num_data)
        density, aggregate = log_q.exp() * weight, log_aggregate.exp() * weight
        mass += density.sum(0)
        kl += _expected(density, log_q - log_p) / num_data
        information += _expected(density, log_q - log_aggregate) / num_data
        marginal += _expected(aggregate, log_aggregate - log_p)
    bounded = min(max(float(information), 0.0), math.log(num_data))  # rounding
    found = Surgery(bounded, max(float(marginal), 0.0), float(kl), num_data, bounded, num_data, estimator, True)
    return found, mass


def _expected(density: Tensor, log_ratio: Tensor) -> Tensor:
    return torch.where(density > 0, density * log_ratio, 0.0).sum()
