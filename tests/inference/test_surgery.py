"""ELBO surgery: exact for tables, by quadrature for normals, unbiased where it is estimated."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm

from inference.diagnostics import surgery
from inference.particles import cross_log_q, particles
from models.latent import LatentVariableModel
from models.likelihoods import FixedGaussian
from models.nets import Linear
from models.priors import StandardNormal
from tests import brute_force, oracles
from tests.programs import TableGuide, TableModel, at


def gaussian_pair(loc, scale):
    """One scalar datum per posterior N(loc_i, scale_i^2), which its guide finds by the datum itself."""
    table = {float(i): (m, s) for i, (m, s) in enumerate(zip(loc, scale, strict=True))}

    def guide(x):
        m, s = torch.tensor([table[v] for v in x[:, 0].tolist()]).T
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(m.unsqueeze(-1), s.unsqueeze(-1)).to_event(1))

    model = LatentVariableModel(StandardNormal((1,)), FixedGaussian((1,), (1,), Linear))
    return model, guide, torch.arange(len(loc)).double().unsqueeze(-1)


def mean_and_error(values):
    values = np.array(values)
    return values.mean(0), values.std(0, ddof=1) / math.sqrt(len(values))


# --- the identities on exact numbers -----------------------------------------------------------------------------


@pytest.mark.row("4.24", "4.25", "0.14")
def test_surgery_of_tables_is_exact():
    oracle, n = oracles.tiny_discrete_vae(), 64
    q = oracles.random_tables(n, 8)
    kl, information, marginal = brute_force.table_surgery(q, oracle.prior)
    assert abs(kl - information - marginal) < 1e-12
    assert 0 < information < math.log(n)
    # The program's densities give the same numbers: every state under every datum's posterior, exactly.
    model, guide, x = TableModel(oracle), TableGuide(q), torch.tensor(oracle.data())
    log_q = cross_log_q(guide, {"z": torch.arange(8)}, x).detach().numpy().T  # (n, 8)
    assert np.allclose(np.exp(log_q), q, atol=1e-12)
    states = torch.arange(8).unsqueeze(1).expand(8, n)
    log_prior = particles(model, at(guide, z=states), x, 8).log_prior[:, 0].detach().numpy()
    found = brute_force.table_surgery(np.exp(log_q), np.exp(log_prior))
    assert np.allclose(found, (kl, information, marginal), atol=1e-10)


@pytest.mark.row("4.24", "4.25")
def test_quadrature_of_gaussian_surgery_adds_up():
    rng = np.random.default_rng(0)
    loc, scale = rng.normal(size=12), rng.uniform(0.2, 0.8, size=12)
    kl, information, marginal = brute_force.scalar_surgery(loc, scale)
    assert abs(kl - information - marginal) < 1e-10
    closed = np.mean([oracles.gaussian_kl(np.array([m]), np.array([[s**2]])) for m, s in zip(loc, scale, strict=True)])
    assert abs(kl - closed) < 1e-6
    assert 0 < information < math.log(12)


# --- the estimator -----------------------------------------------------------------------------------------------


@pytest.mark.row("4.24", "4.25", "4.26")
@pytest.mark.parametrize("chunk", [5, 256])
def test_the_estimator_is_unbiased_for_gaussian_posteriors(chunk):
    rng = np.random.default_rng(0)
    loc, scale = rng.normal(size=12), rng.uniform(0.2, 0.8, size=12)
    kl, information, marginal = brute_force.scalar_surgery(loc, scale)
    model, guide, x = gaussian_pair(loc, scale)
    runs = [surgery(model, guide, x, chunk) for _ in range(400)]
    assert all(abs(run.kl - run.mutual_information - run.marginal_kl) < 1e-12 for run in runs)
    assert all(0 <= run.mutual_information <= math.log(12) for run in runs)
    assert all(abs(run.kl - kl) < 1e-6 for run in runs)  # in closed form
    assert runs[0].num_data == 12
    mean, error = mean_and_error([run.mutual_information for run in runs])
    assert abs(mean - marginal) > 5 * error
    assert abs(mean - information) < 5 * error
    mean, error = mean_and_error([run.marginal_kl for run in runs])
    assert abs(mean - marginal) < 5 * error


@pytest.mark.row("4.24")
def test_the_estimator_is_unbiased_for_tables():
    oracle, q = oracles.tiny_discrete_vae(), oracles.random_tables(64, 8)
    kl, information, marginal = brute_force.table_surgery(q, oracle.prior)
    model, guide, x = TableModel(oracle), TableGuide(q), torch.tensor(oracle.data())
    with torch.no_grad():
        runs = [surgery(model, guide, x) for _ in range(300)]
    assert abs(runs[0].kl - kl) < 1e-10
    mean, error = mean_and_error([run.mutual_information for run in runs])
    assert abs(mean - marginal) > 5 * error
    assert abs(mean - information) < 5 * error


@pytest.mark.row("4.25")
def test_information_is_at_most_the_logarithm_of_the_number_of_data():
    model, guide, x = gaussian_pair(100.0 * np.arange(9), np.full(9, 0.1))  # posteriors that never overlap
    assert surgery(model, guide, x).mutual_information == pytest.approx(math.log(9), abs=1e-12)


@pytest.mark.row("0.14")
def test_the_aggregated_posterior_is_the_mixture_of_all_posteriors():
    rng = np.random.default_rng(1)
    loc, scale, z = rng.normal(size=7), rng.uniform(0.2, 0.8, size=7), np.linspace(-3, 3, 11)
    _, guide, x = gaussian_pair(loc, scale)
    log_q = cross_log_q(guide, {"z": torch.tensor(z).unsqueeze(-1)}, x)
    aggregate = (log_q.logsumexp(1) - math.log(7)).numpy()
    assert np.allclose(aggregate, logsumexp(norm.logpdf(z[:, None], loc, scale), axis=1) - math.log(7), atol=1e-12)


@pytest.mark.row("4.26")
def test_the_three_parts_make_up_the_bound_and_the_prior_moves_only_the_third():
    oracle, q = oracles.tiny_discrete_vae(), oracles.random_tables(64, 8)
    x = torch.tensor(oracle.data())
    found = []
    for prior in (oracle.prior, oracles.random_tables(1, 8, seed=9)[0]):
        model, guide = TableModel(oracle._replace(prior=prior)), TableGuide(q)
        pyro.set_rng_seed(0)
        with torch.no_grad():
            parts = surgery(model, guide, x)
            states = torch.arange(8).unsqueeze(1).expand(8, 64)
            draws = particles(model, at(guide, z=states), x, 8)
        reconstruction = (draws.log_q.exp() * draws.log_likelihood).sum(0).mean().item()
        elbo = oracle._replace(prior=prior).elbo(oracle.data(), q).mean()
        assert abs(reconstruction - parts.mutual_information - parts.marginal_kl - elbo) < 1e-6
        found.append((reconstruction, parts))
    (first, one), (second, other) = found
    assert first == second
    assert one.mutual_information == other.mutual_information
    assert abs(one.marginal_kl - other.marginal_kl) > 0.1
