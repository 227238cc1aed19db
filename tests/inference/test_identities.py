"""The identities behind the bound, on programs whose every probability is in a table or has a closed form.

The oracle is the table; the code under test is the Pyro program of the same numbers, run with its latent at every
state as a particle, so that averages over particles are exact sums.
"""

import math

import numpy as np
import pyro
import pyro.infer
import pytest
import torch

from guides.amortized import Amortized
from guides.exact import ExactPosterior
from guides.gaussian import DiagonalNormal, Unconditional
from inference.engine import SVI, SharedOptimizer
from inference.objectives import ELBO, IWAE
from inference.particles import Particles, particles
from inference.schedules import cosine
from models.nets import Linear
from models.ppca import PPCA
from tests import brute_force, oracles
from tests.programs import TableGuide, TableModel, at

STATES = 8


@pytest.fixture(scope="module")
def oracle():
    return oracles.tiny_discrete_vae()


def enumerated(model, table, x) -> Particles:
    """Every state of z as one particle, for each row of data: tensors are ``(S, N)``."""
    states = torch.arange(STATES).unsqueeze(1).expand(STATES, len(x))
    return particles(model, at(TableGuide(table), z=states), torch.as_tensor(x), STATES)


def tables(count, num_data):
    return oracles.random_tables(count * num_data, STATES).reshape(count, num_data, STATES)


@pytest.mark.row("0.1", "2.1", "3.1", "0.29")
def test_evidence_and_posterior_of_the_program_are_those_of_the_table(oracle):
    x = oracle.data()
    draws = enumerated(TableModel(oracle), tables(1, 64)[0], x)
    log_joint = (draws.log_likelihood + draws.log_prior).detach()
    log_p = log_joint.logsumexp(0)
    assert np.allclose(log_joint.T, oracle.log_joint(x), atol=1e-10)
    assert np.allclose(log_p, oracle.log_evidence(x), atol=1e-10)
    assert np.allclose((log_joint - log_p).exp().T, oracle.posterior(x), atol=1e-10)
    assert abs(log_p.exp().sum() - 1) < 1e-10  # over all data


@pytest.mark.row("0.3", "0.4", "1.5", "1.15", "2.7", "2.9", "2.10", "3.3", "3.11")
def test_three_forms_of_the_bound_coincide_below_log_p(oracle):
    x, model, log_p = oracle.data(), TableModel(oracle), oracle.log_evidence(oracle.data())
    for table in tables(20, 64):
        draws = enumerated(model, table, x)
        q = draws.log_q.exp()
        ratio = (q * draws.log_weight).sum(0).detach().numpy()
        reconstruction = (q * draws.log_likelihood).sum(0)
        kl = (q * (draws.log_q - draws.log_prior)).sum(0)
        log_joint = draws.log_likelihood + draws.log_prior
        posterior_kl = (q * (draws.log_q - log_joint + log_joint.logsumexp(0))).sum(0).detach().numpy()
        assert np.allclose(ratio, oracle.elbo(x, table), atol=1e-10)
        assert np.allclose((reconstruction - kl).detach(), oracle.elbo_as_reconstruction_minus_kl(x, table), atol=1e-10)
        assert np.allclose(log_p - posterior_kl, oracle.elbo_as_evidence_minus_kl(x, table), atol=1e-10)
        assert np.allclose(ratio, (reconstruction - kl).detach(), atol=1e-10)
        assert np.allclose(log_p, ratio + posterior_kl, atol=1e-10)  # nothing is left over
        assert np.all(ratio < log_p - 1e-6)
        # The closed form of a categorical KL is the sum over its states.
        assert torch.allclose(draws.analytic_kl()[0], kl, atol=1e-10)


@pytest.mark.row("0.4", "1.4", "2.9")
def test_equality_holds_at_the_posterior_and_nowhere_near_it(oracle):
    x, model, log_p = oracle.data(), TableModel(oracle), oracle.log_evidence(oracle.data())
    posterior = oracle.posterior(x)

    def elbo(table):
        draws = enumerated(model, table, x)
        return (draws.log_q.exp() * draws.log_weight).sum(0).detach().numpy()

    assert np.allclose(elbo(posterior), log_p, atol=1e-10)
    for mixed in tables(5, 64):
        near = 0.95 * posterior + 0.05 * mixed
        assert np.all(elbo(near) < log_p - 1e-7)


@pytest.mark.row("0.29", "4.16", "5.2")
def test_pyros_enumeration_agrees_with_the_table(oracle):
    x = oracle.data()
    for table in tables(20, 64):
        guide = TableGuide(table, enumerate="parallel")
        loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).loss(TableModel(oracle), guide, torch.tensor(x))
        assert abs(-loss - oracle.elbo(x, table).sum()) < 1e-9
    model = pyro.infer.config_enumerate(TableModel(oracle), default="parallel")
    loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda x: None, torch.tensor(x))
    assert abs(-loss - oracle.log_evidence(x).sum()) < 1e-9


def log_evidence(oracle):
    draws = enumerated(TableModel(oracle), tables(1, 64)[0], oracle.data())
    return (draws.log_likelihood + draws.log_prior).logsumexp(0).detach().numpy()


@pytest.mark.row("0.2")
def test_maximum_likelihood_minimizes_the_divergence_from_the_data():
    p_data = np.random.default_rng(1).dirichlet(np.ones(64))
    entropy = -np.sum(p_data * np.log(p_data))
    found = []
    for seed in range(20):
        log_p = log_evidence(oracles.tiny_discrete_vae(seed))
        kl, expected = oracles.discrete_kl(p_data, np.exp(log_p)), np.sum(p_data * log_p)
        assert abs(kl + expected + entropy) < 1e-12
        found.append((kl, expected))
    kls, expectations = np.array(found).T
    assert np.std(kls) > 0.05
    assert np.argmin(kls) == np.argmax(expectations)
    # The same along a line of parameters, from one model through another.
    first, second = oracles.tiny_discrete_vae(3), oracles.tiny_discrete_vae(4)
    kls, expectations = [], []
    for t in np.linspace(-1, 2, 61):
        logits = (1 - t) * first.pixel_logits + t * second.pixel_logits
        log_p = log_evidence(oracles.DiscreteVAE(first.prior, logits))
        kls.append(oracles.discrete_kl(p_data, np.exp(log_p)))
        expectations.append(p_data @ log_p)
    assert np.argmin(kls) == np.argmax(expectations)
    assert 0 < np.argmin(kls) < 60


@pytest.mark.row("2.6")
def test_jensens_inequality_between_average_and_logarithm(oracle):
    """Of the same draws, log of the mean weight is at least the mean log-weight; equal where weights are."""
    x = torch.tensor(oracle.data())
    model, count = TableModel(oracle), 2000
    table = 0.5 * tables(1, 64)[0] + 0.5 / STATES  # no state is rare: the weights have a small variance
    loose = particles(model, TableGuide(table), x, count)
    log_mean, mean_log = IWAE(count).from_particles(loose), ELBO(count).from_particles(loose)
    assert (log_mean > mean_log + 1e-3).all()
    # In expectation the first is log E w = log p(x), which the second stays below.
    weights = (loose.log_weight.detach() - torch.tensor(oracle.log_evidence(oracle.data()))).exp()
    error = weights.std(0) / count**0.5
    assert ((weights.mean(0) - 1).abs() < 5 * error).all()
    assert ((weights.mean(0) - mean_log.detach().exp()).abs() > 5 * error).any()
    tight = particles(model, TableGuide(oracle.posterior(oracle.data())), x, 10)
    assert torch.allclose(IWAE(10).from_particles(tight), ELBO(10).from_particles(tight), atol=1e-12)
    assert tight.latents["z"].value.double().std(0).max() > 0  # the latents are not all the same, their weights are


@pytest.mark.row("1.28")
def test_the_guide_has_no_part_in_the_evidence(oracle):
    x, model = oracle.data(), TableModel(oracle)
    evidence, bounds = [], []
    for table in [*tables(3, 64), oracle.posterior(x)]:
        draws = enumerated(model, table, x)
        evidence.append((draws.log_likelihood + draws.log_prior).logsumexp(0))
        bounds.append((draws.log_q.exp() * draws.log_weight).sum(0))
    for other in range(1, 4):
        assert torch.allclose(evidence[0], evidence[other], rtol=0, atol=1e-12)
        assert (bounds[0] - bounds[other]).abs().max() > 0.1
    # Where z is continuous: importance weights of any guide average to the same p(x), the closed form.
    model, x = PPCA((3,), 2), torch.randn(1, 3)
    with torch.no_grad():
        model.likelihood.weight.copy_(torch.randn(3, 2))
        exact = model.log_evidence(x)
        for core in (Unconditional((2,), (3,)), DiagonalNormal((2,), (3,), Linear), ExactPosterior(model)):
            weights = (particles(model, Amortized(core), x, 200_000).log_weight - exact).exp()
            error = weights.std() / 200_000**0.5
            assert abs(weights.mean() - 1) < 5 * error + 1e-9
            assert model.log_evidence(x) == exact


@pytest.mark.row("2.11", "5.6")
def test_the_best_diagonal_normal_has_the_diagonal_of_the_precision():
    model, x = PPCA((3,), 2), torch.tensor([[0.4, -1.0, 0.7]])
    with torch.no_grad():
        model.likelihood.weight.copy_(torch.tensor([[1.0, 0.8], [0.3, 0.9], [-0.5, 0.6]]))
        model.likelihood.log_scale.fill_(-0.6)
    p = model.likelihood
    linear = oracles.LinearModel(p.weight.detach().numpy(), p.loc.detach().numpy(), p.scale.item())
    loc, covariance = oracles.ppca_posterior(x.numpy(), linear)
    scale, gap = brute_force.best_diagonal_normal(np.linalg.inv(covariance))
    # Independent of the formula: the closed-form ELBO there is log p less that divergence, and lower all around.
    log_p = oracles.ppca_log_evidence(x.numpy(), linear)[0]
    best = oracles.ppca_elbo(x.numpy(), linear, loc, np.diag(scale**2))[0]
    assert abs(log_p - best - gap) < 1e-10
    assert gap > 0.05
    for factor in ((1.05, 1), (1, 1.05), (0.95, 1), (1, 0.95)):
        assert oracles.ppca_elbo(x.numpy(), linear, loc, np.diag((scale * factor) ** 2))[0] < best - 1e-4
    # Marginal standard deviations, the other candidate, are worse.
    assert oracles.ppca_elbo(x.numpy(), linear, loc, np.diag(np.diag(covariance)))[0] < best - 0.01

    core = Unconditional((2,), (3,))
    guide = Amortized(core)

    def reached():
        found = np.diag((2 * core.log_scale).exp().detach().numpy())
        return oracles.ppca_elbo(x.numpy(), linear, core.loc.detach().numpy()[None], found)[0]

    assert best - reached() > 0.1
    optimizer = SharedOptimizer(guide.parameters(), torch.optim.Adam, 0.05)
    svi, steps = SVI(model, guide, optimizer, ELBO(2000, "analytic")), 600
    for step in range(steps):
        optimizer.set_learning_rate(0.05 * cosine(step / steps))
        svi.step(x)
    assert abs(reached() - best) < 1e-4
    assert np.allclose(core.loc.detach(), loc[0], atol=0.02)
    assert np.allclose(core.log_scale.detach(), np.log(scale), atol=0.02)
    assert math.isclose(log_p - reached(), gap, abs_tol=1e-4)
