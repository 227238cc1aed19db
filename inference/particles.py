"""Runs a guide and a model and returns per-datum log-weights. The only file that reads Pyro traces.

Everything else (bounds, diagnostics, held-out likelihoods, pictures) is arithmetic on what these functions return, so
a hand-written Pyro program that keeps the naming contract (observed site ``x``, latent sites inside the plate ``data``
at dim -1) works wherever the composed models do.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, TorchDistribution
from torch import Tensor

from inference.closed_form import Latent, closed_form_kl, is_relaxed
from inference.frozen import expect_same_twice
from inference.handlers import DetachedDraws, parameters_of
from inference.sites import (
    Through,
    of_draws_alone,
    per_datum,
    sample_sites,
    site_x,
    total,
    was_observed,
    with_draws,
    with_values,
)
from inference.structure import Program, Site, StructureError, check_pairing, check_paths, data_plate, innermost

View = Callable[[TorchDistribution], TorchDistribution]


class Rescore(Protocol):
    """Scores other values of all latents, ``(K, ..., N, *event_shape)`` by site, under the model and the same guide.

    ``view`` says what stands for the distribution of each latent, under guide and model. The guide is not run again,
    so that this is right where its latents do not depend on one another.
    """

    def __call__(self, values: Mapping[str, Tensor], view: View) -> "Particles": ...


@dataclass(frozen=True)
class Particles:
    """K draws from the guide for each of N data, scored. All log-densities are ``(K, N)``, in nats, unscaled.

    N is the size of the plate over the data: of the batch, where that plate is subsampled. ``data_scale`` is then full
    size over batch size (else 1). It is kept apart because it belongs outside any logsumexp over particles: inside,
    IWAE would not be a bound.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_q: Tensor
    latents: dict[str, Latent]
    data_scale: float
    same_order: bool  # the guide samples its latents in the model's order
    auxiliary: dict[str, TorchDistribution] = field(default_factory=dict)  # sites that the guide alone has
    rescore: Rescore | None = None  # the same distributions at other values of the latents

    @property
    def log_weight(self) -> Tensor:
        """log p(x, z) - log q(z|x), ``(K, N)``."""
        return self.log_likelihood + self.log_prior - self.log_q

    @property
    def reparameterized(self) -> bool:
        """Whether gradients with respect to the guide flow through every value it draws."""
        return not self.not_reparameterized

    @property
    def not_reparameterized(self) -> list[str]:
        """The guide's sites whose values carry no gradient to its parameters."""
        drawn = {**{name: latent.q for name, latent in self.latents.items()}, **self.auxiliary}
        return [name for name, q in drawn.items() if not q.has_rsample]

    @property
    def point_masses(self) -> list[str]:
        """The guide's sites, where each of them is one point for each datum and nothing about them is random."""
        drawn = {**{name: latent.q for name, latent in self.latents.items()}, **self.auxiliary}
        return list(drawn) if all(isinstance(innermost(q), Delta) for q in drawn.values()) else []

    def analytic_kl(self) -> Tensor:
        """KL(q(z|x) || p(z)) in closed form, ``(K, N)`` nats; sums over latent sites, conditional on their parents.

        Raises:
            StructureError: some pair of distributions has no closed form, or the guide samples its latents in
                another order than the model or has auxiliary sites, where the sum of conditional divergences is not
                the divergence, or only one of the two programs masks a latent.
        """
        return sum(self.site_kls().values(), torch.zeros_like(self.log_q))

    def sampled_kl(self) -> Tensor:
        """log q(z|x) - log p(z), ``(K, N)`` nats, which estimates the KL; relaxed draws do not, see :class:`Latent`."""
        kl = self.log_q - self.log_prior
        for name, z in self.latents.items():
            if is_relaxed(z.q):
                kl = kl + per_datum(z.sampled_kl(name), kl.shape) - per_datum(z.log_q() - z.log_p(), kl.shape)
        return kl

    def site_kls(self, closed_form: bool = True) -> dict[str, Tensor]:
        """The terms of :meth:`analytic_kl` by site, ``(K, N)`` nats each, or their Monte-Carlo estimates."""
        shape = self.log_q.shape
        if not closed_form:
            return {n: per_datum(z.sampled_kl(n), shape) for n, z in self.latents.items()}
        if self.auxiliary:
            raise StructureError(
                f"the guide's auxiliary sites {list(self.auxiliary)} leave no closed-form KL; use "
                "objective.kl=monte_carlo"
            )
        if len(self.latents) > 1 and not self.same_order:
            raise StructureError(
                "a closed-form KL needs the guide to sample its latents in the model's order; use "
                "objective.kl=monte_carlo"
            )
        return {
            name: per_datum(closed_form_kl(name, z.q, z.p, z.q_mask, z.p_mask), shape)
            for name, z in self.latents.items()
        }


def particles(
    model: Program,
    guide: Program,
    x: Tensor,
    num_particles: int = 1,
    *args: Any,
    max_plate_nesting: int = 1,
    detach_draws: bool = False,
    detach_guide: bool = False,
    through: Through | None = None,
    **kw: Any,
) -> Particles:
    """Draw ``num_particles`` latents per datum from the guide and score them under guide and model.

    Args:
        model: Pyro program with an observed site and a plate over the data at dim -1.
        guide: Pyro program that samples every latent site of the model.
        x: data, ``(N, *event_shape)``; handed to both programs, with any further arguments after it. Where they
            subsample it themselves, N is the size of the subsample in what is returned.
        num_particles: K.
        max_plate_nesting: number of nested plates in the programs; 1 where ``data`` is the only one.
        detach_draws: the draws are constants, so that no gradient reaches the guide through their values.
        detach_guide: log q is a function of the draws alone, and no parameter has a gradient but through them. A guide
            of several sites is run once more for it, and has to give the same distributions twice.
        through: what happens to the draws between being drawn and being scored, a change of their gradient say;
            called with a value and its number of event dimensions. Goes with ``detach_guide``.

    Raises:
        StructureError: a site outside the data plate, a latent that only one program has, an enumerated site, or a
            ``poutine.scale`` other than 1 (temper a bound outside of its particles instead).
    """
    plate = _particle_plate(num_particles, max_plate_nesting)
    with parameters_of("guide"), DetachedDraws() if detach_draws else nullcontext():
        drawn = poutine.trace(plate(guide)).get_trace(x, *args, **kw)
    q_sites = sample_sites(drawn)
    if detach_guide:
        expect_same_twice(guide, "guide")
    check_paths(q_sites, detached=detach_draws or detach_guide, rescaled=through is not None)
    scored = drawn if through is None else with_draws(drawn, through)
    with parameters_of("model"):
        model_trace = poutine.trace(poutine.replay(plate(model), trace=scored)).get_trace(x, *args, **kw)
    p_sites = sample_sites(model_trace)
    latents, observed = _apart(p_sites)
    check_pairing(q_sites, latents, observed)
    num_data, data_scale = data_plate(q_sites, p_sites)
    shape = torch.Size((num_particles, num_data))
    same_order = [n for n in q_sites if n in latents] == list(latents)

    def score_again(draws: poutine.Trace) -> Tensor:
        if len(q_sites) == 1 or not torch.is_grad_enabled():
            return total(sample_sites(draws), shape)
        again = poutine.trace(poutine.replay(plate(guide), trace=draws))  # a site's distribution has draws for parents
        with poutine.block(hide_types=["param"]):
            return total(sample_sites(again.get_trace(x, *args, **kw)), shape)

    def rescore(values: Mapping[str, Tensor], view: View) -> Particles:
        with parameters_of("model"):
            moved = poutine.replay(plate(model), trace=with_values(drawn, values))
            unseen, seen = _apart(sample_sites(poutine.trace(moved).get_trace(x, *args, **kw)))
        there = {
            n: Latent(s["value"], view(q_sites[n]["fn"]), view(s["fn"]), q_sites[n]["mask"], s["mask"])
            for n, s in unseen.items()
        }
        return Particles(
            total(seen, shape),
            log_prior=_summed([z.log_p() for z in there.values()], shape),
            log_q=_summed([z.log_q() for z in there.values()], shape),
            latents=there,
            data_scale=data_scale,
            same_order=same_order,
        )

    return Particles(
        log_likelihood=total(observed, shape),
        log_prior=total(latents, shape),
        log_q=of_draws_alone(scored, score_again, shape) if detach_guide else total(q_sites, shape),
        latents={
            n: Latent(s["value"], q_sites[n]["fn"], s["fn"], q_sites[n]["mask"], s["mask"]) for n, s in latents.items()
        },
        data_scale=data_scale,
        same_order=same_order,
        auxiliary={n: s["fn"] for n, s in q_sites.items() if n not in latents},
        rescore=rescore,
    )


def _apart(sites: dict[str, Site]) -> tuple[dict[str, Site], dict[str, Site]]:
    """Latent sites and observed ones."""
    latents = {name: site for name, site in sites.items() if not site["is_observed"]}
    return latents, {name: site for name, site in sites.items() if site["is_observed"]}


def _summed(log_densities: list[Tensor], shape: torch.Size) -> Tensor:
    """Of several sites, ``(K, N)``."""
    return torch.stack([per_datum(each, shape) for each in log_densities]).sum(0)


def dream(model: Program, guide: Program, like: Tensor, *args: Any, **kw: Any) -> Tensor:
    """log q(z|x) in nats, ``(N,)``, of latents and data drawn from the model instead of from the world.

    The draws are constants: only the guide's parameters get a gradient.

    Args:
        model: Pyro program that can be run without data.
        guide: Pyro program.
        like: any tensor with the shape of the data wanted, ``(N, *event_shape)``.
    """
    with torch.no_grad():
        sites = sample_sites(poutine.trace(poutine.uncondition(model)).get_trace(like, *args, **kw))
    x = site_x(sites)["value"]
    latents = {name: site["value"] for name, site in sites.items() if not was_observed(site)}
    with parameters_of("guide"):
        dreamt = sample_sites(poutine.trace(poutine.condition(guide, data=latents)).get_trace(x, *args, **kw))
    if extra := [name for name, site in dreamt.items() if not site["is_observed"]]:
        raise StructureError(f"the guide draws sites {extra} that the model does not have; use phase=wake")
    return total(dreamt, torch.Size((1, like.shape[0])))[0]


def encode(guide: Program, x: Tensor) -> dict[str, TorchDistribution]:
    """q(z|x) for each latent site of the guide, in its order; batch shape ``(N,)``."""
    return {name: site["fn"] for name, site in sample_sites(poutine.trace(guide).get_trace(x)).items()}


def cross_log_q(guide: Program, latents: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """log q(z_i|x_j) of every latent under every datum's posterior, ``(I, J)`` nats.

    Args:
        guide: Pyro program.
        latents: by site name, ``(I, *event_shape)``.
        x: data, ``(J, *event_shape)``.
    """
    num_latents, num_data = next(iter(latents.values())).shape[0], x.shape[0]
    # (I, *event) -> (I, J, *event)
    values = {n: z.unsqueeze(1).expand(num_latents, num_data, *z.shape[1:]) for n, z in latents.items()}
    plate = _particle_plate(num_latents, 1)
    trace = poutine.trace(poutine.condition(plate(guide), data=values)).get_trace(x)
    return total(sample_sites(trace), torch.Size((num_latents, num_data)))


def decode(model: Program, latents: Mapping[str, Tensor], x: Tensor) -> TorchDistribution:
    """p(x|z) for given latents ``(N, *event_shape)``; only the number of rows of ``x`` matters to it.

    Latents that are not given are drawn from the model, conditional on those that are.
    """
    conditioned = poutine.condition(poutine.uncondition(model), data={**latents, "x": x})
    sites = sample_sites(poutine.trace(conditioned).get_trace(x))
    if unknown := [name for name in latents if name not in sites or was_observed(sites[name])]:
        known = [name for name, site in sites.items() if not was_observed(site)]
        raise StructureError(f"the model has no latent sites {unknown}; its latent sites are {known}")
    return site_x(sites)["fn"]


def generate(model: Program, like: Tensor) -> tuple[dict[str, Tensor], TorchDistribution, Tensor]:
    """Latents from the prior, p(x|z) at them, and a draw of x, for data ``(n, *event_shape)`` like those given."""
    sites = sample_sites(poutine.trace(poutine.uncondition(model)).get_trace(like))
    x = site_x(sites)
    return {name: s["value"] for name, s in sites.items() if not was_observed(s)}, x["fn"], x["value"]


def prior_latents(model: Program, like: Tensor) -> dict[str, Tensor]:
    """The latents alone of :func:`generate`, without a draw of x."""
    sites = sample_sites(poutine.trace(model).get_trace(like))
    return {name: site["value"] for name, site in sites.items() if not site["is_observed"]}


def guess_max_plate_nesting(model: Program, guide: Program, *args: Any, **kw: Any) -> int:
    """The deepest plate of either program, found by running both once; the random number state is left as it was.

    At least 1: a program without a plate is to be refused for that, not to take the particles for its data.
    """
    q_sites, p_sites = sites_of(model, guide, *args, **kw)
    sites = {**q_sites, **p_sites}.values()
    return max((-frame.dim for site in sites for frame in site["cond_indep_stack"] if frame.vectorized), default=1)


def sites_of(model: Program, guide: Program, *args: Any, **kw: Any) -> tuple[dict[str, Site], dict[str, Site]]:
    """The sample sites of guide and model, of one run of both that leaves no other trace."""
    with torch.random.fork_rng(), torch.no_grad(), poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*args, **kw)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kw)
    return sample_sites(guide_trace), sample_sites(model_trace)


def first_non_finite_site(model: Program, guide: Program, x: Tensor) -> str | None:
    """Names the first site, in order of execution, whose parameters, value or log-density is not finite."""
    with torch.no_grad(), pyro.validation_enabled(False):
        guide_trace = poutine.trace(guide).get_trace(x)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x)
        for program, trace in (("guide", guide_trace), ("model", model_trace)):
            for name, site in sample_sites(trace).items():
                for what, tensor in (("value", site["value"]), ("log-density", site["fn"].log_prob(site["value"]))):
                    if not torch.isfinite(tensor).all():
                        return f"{what} of {program} site '{name}'"
    return None


@contextmanager
def validation(enabled: bool) -> Iterator[None]:
    """Pyro's and torch's argument checks, on or off; each check costs a host sync, so steps run without them."""
    with pyro.validation_enabled(enabled):
        yield


def _particle_plate(num_particles: int, max_plate_nesting: int) -> Callable[[Program], Program]:
    if num_particles < 1:
        raise ValueError(f"the number of particles must be at least 1, got {num_particles}")
    if max_plate_nesting < 1:
        raise ValueError(f"max_plate_nesting counts the plate over the data, so it is at least 1: {max_plate_nesting}")
    if num_particles == 1:
        return lambda program: program
    return pyro.plate("_particles", num_particles, dim=-1 - max_plate_nesting)
