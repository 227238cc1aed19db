"""What a trained pair of model and guide is like: pure functions of (model, guide, x) to named numbers."""

import math
from dataclasses import dataclass

import torch
from pyro.distributions import Independent, TorchDistribution
from torch import Tensor

from inference.closed_form import factors
from inference.particles import (
    Particles,
    Program,
    StructureError,
    cross_log_q,
    encode,
    guess_max_plate_nesting,
    particles,
)
from inference.structure import innermost

DENSITIES_AT_ONCE = 2**16  # a flow's networks hold hundreds of numbers for each


@dataclass(frozen=True)
class Terms:
    """The bound's two terms for each datum, ``(N,)`` nats: ``elbo = reconstruction - kl``."""

    reconstruction: Tensor
    kl: Tensor
    kl_estimator: str  # "closed form" or "Monte Carlo"

    @property
    def elbo(self) -> Tensor:
        return self.reconstruction - self.kl


def elbo_terms(model: Program, guide: Program, x: Tensor, num_samples: int = 1) -> Terms:
    """Reconstruction E_q log p(x|z) and KL(q(z|x) || p(z)) of each datum.

    The KL is exact where it has a closed form and averaged over the ``num_samples`` draws where not.
    """
    nesting = guess_max_plate_nesting(model, guide, x) if num_samples > 1 else 1
    draws = particles(model, guide, x, num_samples, max_plate_nesting=nesting)
    kl, estimator = _kl(draws)
    return Terms(draws.log_likelihood.mean(0), kl.mean(0), estimator)


def kl_per_dimension(model: Program, guide: Program, x: Tensor, chunk: int = 256) -> Tensor | None:
    """Mean over the data of KL(q(z_d|x) || p(z_d)), ``(D,)`` nats, sites one after the other.

    None where it does not split over dimensions: a posterior or a prior that correlates them, latents with a mask or
    in plates of their own, or no closed form.
    """
    sums = []
    for some in x.split(chunk):
        mean = _kl_per_dimension(model, guide, some)
        if mean is None:
            return None
        sums.append(mean * len(some))
    return torch.stack(sums).sum(0) / len(x)


def _kl_per_dimension(model: Program, guide: Program, x: Tensor) -> Tensor | None:
    draws = particles(model, guide, x)
    try:
        draws.analytic_kl()
    except StructureError:
        return None
    parts = []
    for latent in draws.latents.values():
        q, p = factors(latent.q), factors(latent.p)
        if q is None or p is None or latent.q_mask is not None or len(latent.q.batch_shape) > 1:
            return None
        kl = torch.distributions.kl_divergence(q, p)
        parts.append(kl.reshape(-1, latent.q.event_shape.numel()).mean(0))  # (N, *event) -> (D,)
    return torch.cat(parts)


def active_units(guide: Program, x: Tensor, threshold: float = 0.01) -> int:
    """Number of latent dimensions with Var_x(E_q[z]) above ``threshold`` (Burda et al. 2016, section 5).

    A one-hot vector, or a state, is one latent, with the variance of its vector of probabilities: of each entry by
    itself it sinks below any threshold as the classes grow many. Where the means are averages over draws, the variance
    of those averages is taken off: it is not the data's.
    """
    means, error_variance, unit = _means_with_error(guide, x, 64)
    if means.shape[0] < 2:
        return 0
    variance = means.var(0) - error_variance.mean(0)  # (D,)
    return int((variance.new_zeros(int(unit[-1]) + 1).index_add(0, unit, variance) > threshold).sum())


def _classes(q: TorchDistribution) -> int:
    """Of a latent whose mean is a vector of probabilities; 1 of all others."""
    base = innermost(q)
    if isinstance(base, torch.distributions.Categorical | torch.distributions.OneHotCategorical):
        return base.probs.shape[-1]
    return 1


def posterior_means(guide: Program, x: Tensor, num_samples: int = 64) -> Tensor:
    """E_q[z] of each datum, ``(N, D)``, sites side by side.

    Averaged over draws where a family knows no mean, or where a latent depends on another one. Of a categorical it is
    the probabilities of its states.
    """
    return _means_with_error(guide, x, num_samples)[0]


@dataclass(frozen=True)
class Surgery:
    """The mean KL taken apart (Hoffman and Johnson 2016): ``kl = mutual_information + marginal_kl``, in nats.

    The mutual information of index and latent is estimated with one draw of z for each of ``num_data`` data against
    the mixture of all of them, and lies between 0 and log ``num_data``; the estimate is put back into that range,
    which cannot take it further from the truth. The marginal KL(q(z) || p(z)) is the rest of the mean KL.

    Of these data it is unbiased. As an estimate for a larger population of which they are a random part, it is low on
    average, because the entropy of a mixture is concave in its parts, and the marginal KL is high. ``upper`` estimates
    the information in that population from the same densities and is high on average: it weighs the datum's own density
    by its share of the population, which makes the estimate of q(z) right on average (Chen et al. 2018, appendix C.2)
    and that of its logarithm low. The truth lies between the two.
    """

    mutual_information: float
    marginal_kl: float
    kl: float
    num_data: int
    upper: float
    population: int
    estimator: str = "one draw per datum against the mixture of their posteriors"
    exact: bool = False  # of these data: without sampling noise


@torch.no_grad()
def surgery(
    model: Program, guide: Program, x: Tensor, chunk: int | None = None, population: int | None = None
) -> Surgery:
    """ELBO surgery over the data ``x``; costs ``N^2`` densities of the guide, ``chunk`` times N of them at once.

    Args:
        model: Pyro program.
        guide: Pyro program.
        x: data, ``(N, *event_shape)``.
        chunk: number of latents scored at a time.
        population: number of data that ``x`` is a random part of, where they are not all.
    """
    num_data = x.shape[0]
    population = max(population or num_data, num_data)
    chunk = chunk or max(1, DENSITIES_AT_ONCE // num_data)
    draws = [particles(model, guide, some) for some in x.split(256)]
    kl = float(torch.cat([_kl(part)[0].reshape(-1) for part in draws]).mean())
    latents = {
        name: torch.cat([part.latents[name].value.reshape(-1, *latent.q.event_shape) for part in draws])
        for name, latent in draws[0].latents.items()
    }
    log_ratio, high = [], []
    for start in range(0, num_data, chunk):
        some = {name: z[start : start + chunk] for name, z in latents.items()}
        log_q = cross_log_q(guide, some, x)  # (chunk, N)
        own = log_q[torch.arange(log_q.shape[0]), torch.arange(start, start + log_q.shape[0])]
        log_ratio.append(own - (log_q.logsumexp(1) - math.log(num_data)))
        high.append(own - _log_aggregate(log_q, own, start, population))
    information = min(max(float(torch.cat(log_ratio).mean()), 0.0), math.log(num_data))
    upper = min(max(float(torch.cat(high).mean()), 0.0), math.log(population))
    return Surgery(information, kl - information, kl, num_data, upper, population)


def _log_aggregate(log_q: Tensor, own: Tensor, start: int, population: int) -> Tensor:
    """log of an unbiased estimate of the population's q(z), ``(C, N) -> (C,)``: its own datum is there but once."""
    rows, num_data = log_q.shape
    if num_data == 1:
        return own
    others = log_q.clone()
    others[torch.arange(rows), torch.arange(start, start + rows)] = -math.inf
    weight = math.log((population - 1) / (population * (num_data - 1)))
    return torch.logaddexp(own - math.log(population), others.logsumexp(1) + weight)


def _kl(draws: Particles) -> tuple[Tensor, str]:
    try:
        return draws.analytic_kl(), "closed form"
    except StructureError:
        return draws.log_q - draws.log_prior, "Monte Carlo"


def _means_with_error(guide: Program, x: Tensor, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior means, ``(N, D)``, the variance of their Monte-Carlo error, zero where exact, and whose they are.

    The last, ``(D,)``, numbers the latents: 0, 1, ..., the same number for all classes of one.
    """
    runs = [encode(guide, x).values()]
    if len(runs[0]) > 1:  # what later sites are conditional on varies from run to run
        runs += [encode(guide, x).values() for _ in range(num_samples - 1)]
    draws = num_samples if len(runs) == 1 else 1
    by_site = [[_given_mean(q, draws) for q in run] for run in runs]  # (S, N, D of the site) each
    means = torch.cat([torch.cat(sites, dim=2) for sites in by_site])  # (S, N, D)
    first = [torch.arange(m.shape[-1]) % _classes(q) == 0 for q, m in zip(runs[0], by_site[0], strict=True)]
    unit = torch.cat(first).to(means.device).cumsum(0) - 1
    if means.shape[0] == 1:
        return means[0], torch.zeros_like(means[0]), unit
    return means.mean(0), means.var(0) / means.shape[0], unit


def _given_mean(q: TorchDistribution, num_samples: int) -> Tensor:
    """The mean given all earlier latents, ``(1, N, D)``, or where a family knows none, draws, ``(S, N, D)``."""
    try:
        mean = _mean(q).unsqueeze(0)
    except (NotImplementedError, AttributeError):
        mean = q.sample(torch.Size((num_samples,)))
    mean = mean.reshape(*mean.shape[: 1 + len(q.batch_shape)], -1)  # (S, *other plates, N, D)
    return mean.movedim(-2, 1).flatten(2)


def _mean(q: TorchDistribution) -> Tensor:
    base = q.base_dist if isinstance(q, Independent) else q
    if isinstance(base, torch.distributions.Categorical):
        return base.probs  # the number of a state means nothing; this is the mean of its one-hot code
    return q.mean
