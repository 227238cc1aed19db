"""ELBO surgery by sums and by quadrature, against tables and scipy's quadrature that know nothing of it."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal, FullNormal
from inference.diagnostics import surgery
from inference.evaluate import EvaluationSettings, evaluate, validation_scores
from inference.exact_surgery import best_surgery, exact_surgery
from inference.particles import StructureError
from models.latent import LatentVariableModel
from models.likelihoods import Bernoulli, FixedGaussian
from models.nets import Linear
from models.priors import MixturePrior, StandardNormal
from models.vamp import AggregatedPosterior
from tests import brute_force, oracles
from tests.prior_cases import pair, perturbed, posterior_parameters
from tests.programs import HierarchicalGuide, HierarchicalModel, TableGuide, TableModel


def parts_of(found):
    return found.kl, found.mutual_information, found.marginal_kl


@pytest.mark.row("4.24", "4.25")
def test_of_tables_it_is_the_sum_over_states():
    oracle, q = oracles.tiny_discrete_vae(), oracles.random_tables(64, 8)
    found = exact_surgery(TableModel(oracle), TableGuide(q), torch.tensor(oracle.data()))
    assert np.allclose(parts_of(found), brute_force.table_surgery(q, oracle.prior), atol=1e-12)
    assert found.estimator == "a sum over 8 states"


@pytest.mark.row("4.24", "4.25")
def test_of_scalars_it_is_scipys_quadrature():
    x = torch.randn(15, 3)
    model, guide = pair(StandardNormal((1,)), x)
    loc, scale = posterior_parameters(guide, x)
    expected = brute_force.scalar_surgery(loc[:, 0], scale[:, 0])
    assert min(expected) > 0.02
    assert np.allclose(parts_of(exact_surgery(model, guide, x)), expected, atol=1e-8)


@pytest.mark.row("4.26")
def test_in_the_plane_it_adds_up_and_the_estimator_agrees():
    x = torch.randn(10, 3)
    prior = perturbed(MixturePrior((2,), components=3))
    likelihood = FixedGaussian((3,), (2,), Linear)
    model, guide = LatentVariableModel(prior, likelihood), Amortized(FullNormal((2,), (3,), Linear))
    found = exact_surgery(model, guide, x)
    assert found.kl == pytest.approx(found.mutual_information + found.marginal_kl, abs=1e-10)
    runs = [surgery(model, guide, x) for _ in range(300)]
    for name in ("kl", "mutual_information", "marginal_kl"):
        values = np.array([getattr(run, name) for run in runs])
        assert abs(values.mean() - getattr(found, name)) < 5 * values.std(ddof=1) / math.sqrt(len(runs))
        assert values.std() > 1e-3  # what is spared


@pytest.mark.row("4.27")
def test_under_the_aggregated_posterior_the_marginal_kl_is_zero():
    x = torch.randn(12, 3)
    model, guide = pair(AggregatedPosterior((2,), (3,)), x)
    found = exact_surgery(model, guide, x)
    assert found.marginal_kl == pytest.approx(0, abs=1e-10)
    assert found.kl == pytest.approx(found.mutual_information, abs=1e-10)
    standard = LatentVariableModel(StandardNormal((2,)), model.likelihood)
    assert exact_surgery(standard, guide, x).marginal_kl > 0.05


def fixed(loc, scale):
    """A guide whose posterior of datum i is N(loc_i, scale_i^2)."""

    def guide(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(loc[: len(x)], scale[: len(x)]).to_event(1))

    return guide


def test_from_collapse_to_posteriors_that_never_meet():
    model, x = LatentVariableModel(StandardNormal((2,)), FixedGaussian((3,), (2,), Linear)), torch.randn(9, 3)
    same = exact_surgery(model, fixed(torch.zeros(9, 2), torch.ones(9, 2)), x)
    assert np.allclose(parts_of(same), 0, atol=1e-10)
    apart = torch.cartesian_prod(*[6.0 * torch.arange(3)] * 2)
    found = exact_surgery(model, fixed(apart, torch.full((9, 2), 0.3)), x)
    assert found.mutual_information == pytest.approx(math.log(9), abs=1e-10)
    with pytest.raises(StructureError, match="densities, and 1,000 are allowed"):
        exact_surgery(model, fixed(apart, torch.full((9, 2), 0.3)), x, most=1000)


class OneSided(PyroModule):
    """Exponential latents, whose densities have an edge that no grid finds exactly."""

    def forward(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Exponential(torch.ones(1)).to_event(1))


@pytest.mark.parametrize("checks", [True, False])
def test_what_it_is_not_for_is_refused_and_then_estimated(checks, monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", checks)
    x = torch.randn(9, 3)
    wide, guide = pair(StandardNormal((3,)), x)
    with pytest.raises(StructureError, match="at most two real dimensions, not of 3"):
        exact_surgery(wide, guide, x)
    found = best_surgery(wide, guide, x)
    assert not found.exact
    assert found.estimator.startswith("one draw per datum")
    with pytest.raises(StructureError, match="one latent"):
        exact_surgery(HierarchicalModel(), HierarchicalGuide(), torch.randn(4, 5))
    model = LatentVariableModel(StandardNormal((1,)), FixedGaussian((3,), (1,), Linear))
    with pytest.raises(StructureError, match="of some posterior; use surgery"):
        exact_surgery(model, OneSided(), x)
    with pytest.raises(StructureError, match="some width"):
        exact_surgery(model, fixed(torch.zeros(9, 1), torch.zeros(9, 1)), x)


@pytest.mark.row("4.26")
def test_evaluation_uses_it_and_says_so():
    x = torch.randint(0, 2, (40, 3)).double()
    prior = perturbed(MixturePrior((2,), components=3))
    model = LatentVariableModel(prior, Bernoulli((3,), (2,), Linear))
    guide = Amortized(DiagonalNormal((2,), (3,), Linear))
    exact = exact_surgery(model, guide, x)
    settings = EvaluationSettings(particles=10, draws=2, khat_data=1)
    summary, _ = evaluate(model, guide, x, settings, seed=0)
    assert "quadrature over" in summary["test/mutual_information_estimator"]
    assert summary["test/mutual_information_estimator"] == summary["test/kl_estimator"]
    assert summary["test/kl"] == pytest.approx(exact.kl, abs=1e-8)
    assert summary["test/mutual_information"] == pytest.approx(exact.mutual_information, abs=1e-8)
    assert summary["test/mutual_information_upper"] == summary["test/mutual_information"]
    assert summary["test/marginal_kl"] == pytest.approx(exact.marginal_kl, abs=1e-8)
    assert summary["test/elbo"] == pytest.approx(summary["test/reconstruction"] - exact.kl, abs=1e-8)
    part, _ = evaluate(model, guide, x, EvaluationSettings(10, draws=2, khat_data=1, surgery_data=20), seed=0)
    assert part["test/kl_estimator"] == "Monte Carlo"  # of all data, where the surgery is of a part
    assert part["test/mutual_information_upper"] >= part["test/mutual_information"]
    scores = validation_scores(model, guide, x, seed=0, surgery_data=40)
    assert scores["valid/kl"] == pytest.approx(exact.kl, abs=1e-8)
    assert scores["valid/marginal_kl"] == pytest.approx(exact.marginal_kl, abs=1e-8)
