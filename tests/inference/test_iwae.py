"""The importance-weighted bound against sums over all tuples, quadrature, and log p itself."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from scipy.stats import norm

from guides.amortized import Amortized
from guides.gaussian import Unconditional
from inference.objectives import IWAE
from inference.particles import particles
from tests import brute_force, oracles
from tests.pairs import as_oracle, linear
from tests.programs import (
    TableGuide,
    TableModel,
    at,
)


@pytest.mark.parametrize("datum", [0, 21, 63])
def test_iwae_is_the_sum_over_all_tuples_of_states(datum):
    oracle, states = oracles.tiny_discrete_vae(bits=2), 4
    x = oracle.data()[datum : datum + 1]
    q = oracles.random_tables(1, states, seed=datum)
    log_weights = (oracle.log_joint(x) - np.log(q))[0]
    bounds = []
    for k in (1, 2, 3, 4):
        tuples = torch.tensor(list(itertools.product(range(states), repeat=k)))  # (S^K, K)
        guide = at(TableGuide(np.repeat(q, len(tuples), axis=0)), z=tuples.T if k > 1 else tuples[:, 0])
        draws = particles(TableModel(oracle), guide, torch.tensor(x).expand(len(tuples), -1), k)
        probability = draws.log_q.sum(0).exp()
        assert abs(probability.sum() - 1) < 1e-12
        bound = (probability * IWAE(k).from_particles(draws)).sum().item()
        assert abs(bound - oracles.iwae_by_enumeration(log_weights, q[0], k)) < 1e-10
        bounds.append(bound)
        if k == 1:
            assert abs(bound - oracle.elbo(x, q)[0]) < 1e-10
    assert np.all(np.diff(bounds) > 1e-6)
    assert bounds[-1] < oracle.log_evidence(x)[0]


def test_iwae_on_a_gaussian_is_its_quadrature():
    """z ~ N(0, 1), x ~ N(2 z, 1/4), under a guide that is too narrow and off centre."""
    x, loc, scale, count = 1.2, 0.1, 0.4, 200_000

    def model(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(2 * z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(loc, scale))

    log_weight = lambda z: norm.logpdf(z) + norm.logpdf(x, 2 * z, 0.5) - norm.logpdf(z, loc, scale)  # noqa: E731
    exact = [brute_force.iwae_by_quadrature(log_weight, loc, scale, k) for k in (1, 2, 3)]
    log_p = norm.logpdf(x, 0, math.sqrt(4 + 0.25))
    assert exact[0] < exact[1] < exact[2] < log_p
    for k, expected in zip((1, 2, 3), exact, strict=True):
        found = IWAE(k)(model, guide, torch.full((count // k,), x))
        error = found.std().item() / math.sqrt(count // k)
        others = [e for e in [*exact, log_p] if e != expected]
        assert min(abs(found.mean().item() - other) for other in others) > 4 * error
        assert abs(found.mean().item() - expected) < 4 * error


def test_iwae_rises_to_log_p():
    model, x = linear(), torch.randn(1, 3)
    guide = Amortized(Unconditional((2,), (3,)))
    log_p = oracles.ppca_log_evidence(x.numpy(), as_oracle(model))[0]
    with torch.no_grad():
        bounds = [IWAE(k)(model, guide, x.expand(20_000 // k, 3)).mean().item() for k in (1, 10, 100, 2000)]
    assert np.all(np.diff(bounds) > 0)
    assert log_p - bounds[0] > 1
    assert abs(bounds[-1] - log_p) < 0.1


def test_a_subsampled_iwae_stays_below_log_p_where_pyros_does_not():
    full, batch, k, repeats = 1000, 5, 50, 300
    data = 1.4 * torch.randn(full)
    log_p = norm.logpdf(data.numpy(), 0, math.sqrt(2)).sum()

    def model(x):
        with pyro.plate("data", full, subsample_size=batch, dim=-1) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", full, subsample_size=batch, dim=-1) as index:
            pyro.sample("z", dist.Normal(0.5 * x[index], 1.0))  # the posterior's scale is sqrt(1/2)

    def scored(objective):
        found = torch.tensor([-float(objective.loss(model, guide, data)) for _ in range(repeats)])
        return found.mean().item(), found.std().item() / math.sqrt(repeats)

    renyi = pyro.infer.RenyiELBO(alpha=0, num_particles=k, max_plate_nesting=1, vectorize_particles=True)
    mean, error = scored(renyi)
    assert mean - 5 * error > log_p  # the trap is real: the scale N / M is inside its logarithm
    mean, error = scored(IWAE(k))
    assert mean - 5 * error < log_p
    # Against the very data of each minibatch, whose choice is then no source of noise, it is a bound and a tight one.
    with torch.no_grad():
        own = torch.stack([_own_gap(model, guide, data, k) for _ in range(repeats)])
    assert own.mean() > -5 * own.std() / math.sqrt(repeats)
    assert own.mean() < 0.02


def _own_gap(model, guide, data, k):
    """log p(x) minus the bound, for each datum of one random batch, averaged over the batch."""
    trace = pyro.poutine.trace(guide).get_trace(data)
    index = trace.nodes["data"]["value"]
    fixed = pyro.poutine.replay(guide, trace=_only(trace, "data"))
    bound = IWAE(k)(model, fixed, data)
    return (torch.tensor(norm.logpdf(data[index].numpy(), 0, math.sqrt(2))) - bound).mean()


def _only(trace, name):
    kept = trace.copy()
    for other in [n for n in kept.nodes if n != name]:
        kept.remove_node(other)
    return kept
