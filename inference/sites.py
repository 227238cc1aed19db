"""The sample sites of a Pyro trace, and their log-densities datum by datum."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from inference.structure import Site, StructureError

Through = Callable[[Tensor, int], Tensor]  # of a draw and the number of its event dimensions


def sample_sites(trace: poutine.Trace) -> dict[str, Site]:
    return {name: s for name, s in prune_subsample_sites(trace).nodes.items() if s["type"] == "sample"}


def with_draws(trace: poutine.Trace, change: Through) -> poutine.Trace:
    """A trace whose draws are changed; the one given is left as it is."""
    drawn = {name: site for name, site in sample_sites(trace).items() if not site["is_observed"]}
    return with_values(trace, {name: change(site["value"], site["fn"].event_dim) for name, site in drawn.items()})


def with_values(trace: poutine.Trace, values: Mapping[str, Tensor]) -> poutine.Trace:
    """A trace whose draws are others, by site; the one given is left as it is."""
    changed = trace.copy()
    for name, value in values.items():
        changed.nodes[name] = {**changed.nodes[name], "value": value}
    return changed


def was_observed(site: Site) -> bool:
    """Whether a site under ``poutine.uncondition`` is one of data, not of latents."""
    return bool(site["infer"].get("was_observed"))


def site_x(sites: dict[str, Site]) -> Site:
    observed = [name for name, site in sites.items() if was_observed(site)]
    if "x" not in observed:
        raise StructureError(f"the model has no observed site 'x'; its observed sites are {observed}")
    return sites["x"]


def total(sites: dict[str, Site], shape: torch.Size) -> Tensor:
    """Sum of the sites' log-densities, ``(K, N)``."""
    terms = [per_datum(_log_prob(site), shape) for site in sites.values()]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def _log_prob(site: Site) -> Tensor:
    with _site_names_itself(site) if is_validation_enabled() else nullcontext():
        log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
    plates = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    if any(size not in (1, plates.get(dim - log_prob.dim(), 1)) for dim, size in enumerate(log_prob.shape)):
        raise StructureError(
            f"site '{site['name']}' has log-densities of shape {tuple(log_prob.shape)} in plates of sizes {plates} by "
            "dim; declare its event dimensions by .to_event(n), and the sizes of the plates as those of the data"
        )
    return log_prob


@contextmanager
def _site_names_itself(site: Site) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise StructureError(f"site '{site['name']}': {error}") from error


def of_draws_alone(trace: poutine.Trace, score: Callable[[poutine.Trace], Tensor], shape: torch.Size) -> Tensor:
    """log q of the draws of a trace, ``(K, N)`` nats, with the gradient along the draws and no other.

    The slope in the draws is taken first, at copies of them that lead nowhere, and hands on what reaches the draws:
    no parameter gets a gradient but through a draw, the guide's own no more than those it reads off the model.

    Args:
        trace: of the guide's draws.
        score: the log-densities of a trace with these sites and other values, ``(K, N)``.
        shape: (K, N).

    Raises:
        StructureError: the densities can be had at the very draws alone, as those of a flow without an inverse.
    """
    drawn = {n: s for n, s in sample_sites(trace).items() if not s["is_observed"] and s["value"].requires_grad}
    copies = {name: site["value"].detach().requires_grad_() for name, site in drawn.items()}
    try:
        log_q = score(with_values(trace, copies))
    except (KeyError, NotImplementedError) as error:
        raise StructureError(
            f"the guide cannot score draws under other gradients than they were drawn with ({error}); use a flow with "
            "an inverse, or gradient=reparameterized"
        ) from error
    result = log_q.detach()
    if not (log_q.requires_grad and drawn):
        return result
    slopes = torch.autograd.grad(log_q.sum(), list(copies.values()), retain_graph=True, allow_unused=True)
    for (name, site), slope in zip(drawn.items(), slopes, strict=True):
        if slope is not None:
            step = slope * (site["value"] - copies[name].detach())  # zero, with the slope for its gradient
            batch_dim = step.dim() - site["fn"].event_dim
            result = result + per_datum(step.reshape(*step.shape[:batch_dim], -1).sum(-1), shape)
    return result


def per_datum(log_prob: Tensor, shape: torch.Size) -> Tensor:
    """(K, *other plates, N) -> (K, N): plates other than those of the particles and the data are summed over."""
    num_particles, num_data = shape
    if log_prob.shape == shape:
        return log_prob
    if log_prob.dim() <= 1:
        return log_prob.expand(shape)
    if log_prob.shape[-1] != num_data:
        log_prob = log_prob.expand(*log_prob.shape[:-1], num_data)
    # without a particle plate the leading dimensions are all other plates
    return log_prob.reshape(num_particles, -1, num_data).sum(1)
