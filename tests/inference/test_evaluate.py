"""Held-out numbers against the exact evidence, a plain loop over Pyro traces, and ArviZ."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy.special import logsumexp
from torch import nn

from guides.amortized import Amortized
from guides.deterministic import Deterministic
from guides.exact import ExactPosterior
from guides.gaussian import DiagonalNormal, Unconditional
from inference import evaluate as evaluation
from inference.evaluate import (
    EvaluationSettings,
    evaluate,
    evaluating,
    held_out,
    log_evidence,
    pareto_khat,
    validation_scores,
)
from inference.export import import_arviz
from models.flow_prior import CouplingPrior
from models.latent import LatentVariableModel
from models.likelihoods import FixedGaussian
from models.nets import Linear
from models.ppca import PPCA
from models.priors import LearnedNormal
from tests import oracles
from tests.programs import HierarchicalGuide, HierarchicalModel, at


@pytest.fixture
def model():
    made = PPCA((3,), 2)
    with torch.no_grad():
        made.likelihood.weight.copy_(torch.randn(3, 2))
        made.likelihood.log_scale.fill_(-0.4)
    return made


def exact_evidence(model, x):
    p = model.likelihood
    oracle = oracles.LinearModel(p.weight.detach().numpy(), p.loc.detach().numpy(), p.scale.item())
    return oracles.ppca_log_evidence(x.numpy(), oracle)


def wide_guide(model):
    """The exact posterior's means under twice its spread: a proposal whose weights have a variance."""

    def guide(x):
        posterior = model.posterior(x)
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.MultivariateNormal(posterior.loc, scale_tril=2 * posterior.scale_tril))

    return guide


# --- importance-sampled log p(x) ---------------------------------------------------------------------------------


@pytest.mark.row("0.1", "5.8")
def test_the_estimate_is_the_exact_evidence(model):
    x, count = torch.randn(6, 3), 20_000
    with torch.no_grad():
        found = log_evidence(model, wide_guide(model), x, count).log_p
        weights = evaluation.particles(model, wide_guide(model), x, count).log_weight.exp()
    exact = exact_evidence(model, x)
    error = (weights.std(0) / weights.mean(0) / count**0.5).numpy()  # of log w, by the delta method
    assert np.all(error < 0.02)
    elbo = weights.log().mean(0).numpy()
    assert np.all(np.abs(elbo - exact) > 5 * error)  # the bound would not pass for it
    assert np.all(np.abs(found.numpy() - exact) < 5 * error)


def test_the_estimate_is_a_plain_loop_over_traces():
    model, guide, x, count = HierarchicalModel(), HierarchicalGuide(), torch.randn(3, 5), 40
    guide_traces, weights = [], []
    with torch.no_grad():
        for _ in range(count):
            q = poutine.trace(guide).get_trace(x)
            p = poutine.trace(poutine.replay(model, trace=q)).get_trace(x)
            q.compute_log_prob()
            p.compute_log_prob()
            guide_traces.append(q)
            log_p = sum(p.nodes[name]["log_prob"] for name in ("top", "bottom", "x"))
            weights.append(log_p - sum(q.nodes[name]["log_prob"] for name in ("top", "bottom")))
        values = {n: torch.stack([q.nodes[n]["value"] for q in guide_traces]) for n in ("top", "bottom")}

        replayed = at(guide, **values)  # the same draws, all at once
        found = log_evidence(model, lambda data: (guide if len(data) < 3 else replayed)(data), x, count).log_p
    expected = logsumexp(torch.stack(weights).numpy(), axis=0) - math.log(count)
    assert np.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory_bytes", [1, 500, 20_000, None])
def test_chunks_do_not_change_the_answer(model, memory_bytes):
    """Under the exact posterior every weight is p(x), whatever is drawn and however many at a time."""
    x = torch.randn(7, 3)
    with torch.no_grad():
        found = log_evidence(model, Amortized(ExactPosterior(model)), x, 30, khat_data=7, memory_bytes=memory_bytes)
    assert np.allclose(found.log_p, exact_evidence(model, x), rtol=0, atol=1e-9)
    assert np.isnan(found.khat).all()  # equal weights have no tail


@pytest.mark.parametrize("memory_bytes", [3000, 50_000])
def test_the_memory_bound_is_kept(model, memory_bytes, monkeypatch):
    sizes, seen = [], []
    original = evaluation.particles

    def watched(model, guide, x, num_particles, **kw):
        draws = original(model, guide, x, num_particles, **kw)
        sizes.append(num_particles * x.numel() * 8)  # bytes of the reconstructions alone
        seen.append((num_particles, x.shape[0]))
        return draws

    monkeypatch.setattr(evaluation, "particles", watched)
    x, count = torch.randn(40, 3), 600
    with torch.no_grad():
        found = log_evidence(model, wide_guide(model), x, count, memory_bytes=memory_bytes)
    assert 8 * max(sizes) <= memory_bytes
    assert 8 * max(sizes) > memory_bytes / 4  # nor is most of it left lying
    assert sum(k * n for k, n in seen) == 40 * count
    assert found.log_p.shape == (40,)


def test_progress_is_told(model):
    seen = []
    with torch.no_grad():
        log_evidence(model, wide_guide(model), torch.randn(250, 3), 10, on_progress=lambda *at: seen.append(at))
    assert seen == [(100, 250), (200, 250), (250, 250)]


def test_programs_with_nested_plates_are_scored():
    def model(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 2, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(x.sum(1) / 3, math.sqrt(1 / 3)))

    x = torch.randn(5, 2)
    exact = dist.MultivariateNormal(torch.zeros(2), torch.ones(2, 2) + torch.eye(2)).log_prob(x)
    assert torch.allclose(log_evidence(model, guide, x, 30).log_p, exact, atol=1e-9)


# --- how far to trust it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_khat_finds_a_known_tail(shape):
    rng, draws = np.random.default_rng(0), 200_000
    found = pareto_khat(-shape * np.log(rng.uniform(size=(4, draws))))  # weights u^-shape are Pareto
    error = (1 + shape) / math.sqrt(3 * math.sqrt(draws))  # asymptotic, of the tail that is fitted
    assert np.all(np.abs(found - shape) < 5 * error)
    assert np.all(np.abs(found - shape - 0.3) > error)


def test_khat_is_arviz_row_by_row():
    log_weights = np.random.default_rng(0).normal(scale=[[0.5], [1.0], [3.0]], size=(3, 500))
    alone = [float(import_arviz().psislw(row)[1]) for row in log_weights]
    assert np.allclose(pareto_khat(log_weights), alone, atol=1e-12)
    assert alone[0] < alone[2]
    assert np.array_equal(log_weights, np.random.default_rng(0).normal(scale=[[0.5], [1.0], [3.0]], size=(3, 500)))


def test_rows_without_a_tail_are_told_from_hopeless_ones():
    rng = np.random.default_rng(0)
    equal = np.full(500, -1234.5) + 1e-11 * rng.normal(size=500)  # but for rounding
    hopeless = 1e4 * rng.normal(size=500)
    found = pareto_khat(np.stack([equal, rng.normal(size=500), hopeless]))
    assert np.isnan(found[0])
    assert np.isfinite(found[1])
    assert found[2] == math.inf
    assert np.isnan(pareto_khat(rng.normal(size=(2, 20)))).all()
    assert evaluation._median(np.array([math.nan, 0.5, math.inf])) == math.inf
    assert evaluation._median(np.array([math.nan, 0.5, 0.6, math.inf, math.nan])) == 0.6
    assert evaluation._median(np.array([math.nan])) is None


def test_khat_is_computed_for_the_first_data_only(model):
    x = torch.randn(250, 3)
    with torch.no_grad():
        assert log_evidence(model, wide_guide(model), x, 50, khat_data=120).khat.shape == (120,)
        assert log_evidence(model, wide_guide(model), x, 50).khat.shape == (0,)
        assert log_evidence(model, wide_guide(model), x[:9], 50, khat_data=120).khat.shape == (9,)


# --- nothing is disturbed ----------------------------------------------------------------------------------------


def test_evaluating_leaves_training_as_it_was():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Linear(2, 2))
    module[2].eval()  # a part that is frozen
    other = nn.Linear(2, 2).eval()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    draws = []
    for seed in (5, 5, 6):
        with evaluating(module, other, lambda x: x, seed=seed):
            assert not any(part.training for part in [*module.modules(), *other.modules()])
            assert not torch.is_grad_enabled()
            draws.append(torch.randn(3))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in module.modules()] == [True, True, True, False]
    assert not other.training
    assert torch.is_grad_enabled()


def test_evaluating_restores_after_a_failure():
    module = nn.Linear(2, 2)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), evaluating(module, seed=0):
        raise ZeroDivisionError
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)


def test_scores_of_the_validation_set_are_repeatable(model):
    guide, x = Amortized(DiagonalNormal((2,), (3,), Linear)), torch.randn(20, 3)
    state = torch.get_rng_state()
    first, again, other = (validation_scores(model, guide, x, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
    assert first["valid/elbo"] == pytest.approx(first["valid/reconstruction"] - first["valid/kl"], abs=1e-9)


# --- the summary -------------------------------------------------------------------------------------------------


def test_the_summary_against_closed_forms(model):
    guide, x = Amortized(Unconditional((2,), (3,))), torch.randn(300, 3)
    settings = EvaluationSettings(particles=3000, elbo_samples=400, khat_data=10, surgery_data=100)
    summary, evidence = evaluate(model, guide, x, settings, seed=0)
    exact = exact_evidence(model, x)
    p = model.likelihood
    oracle = oracles.LinearModel(p.weight.detach().numpy(), p.loc.detach().numpy(), p.scale.item())
    elbo = oracles.ppca_elbo(x.numpy(), oracle, np.zeros((300, 2)), np.eye(2)).mean()
    assert summary["test/nll"] == pytest.approx(-exact.mean(), abs=0.03)
    assert abs(elbo - exact.mean()) > 1
    assert summary["test/elbo"] == pytest.approx(elbo, abs=0.1)
    assert summary["test/kl"] == pytest.approx(0, abs=1e-12)
    assert summary["test/reconstruction"] == pytest.approx(summary["test/elbo"] + summary["test/kl"], abs=1e-9)
    assert summary["test/nll_stderr"] == pytest.approx(np.std(evidence.log_p.numpy(), ddof=1) / math.sqrt(300))
    assert summary["test/mutual_information"] == pytest.approx(0, abs=1e-12)
    assert summary["test/active_units"] == 0
    assert summary["test/surgery_data"] == 100
    assert summary["test/nll_particles"] == 3000
    assert summary["test/data"] == 300
    assert summary["test/kl_per_dimension"] == [0, 0]
    assert evidence.khat.shape == (10,)
    again, _ = evaluate(model, guide, x, settings, seed=0)
    assert summary == again


@pytest.mark.row("0.18")
def test_bits_per_dimension(model):
    guide, x = Amortized(ExactPosterior(model)), torch.randn(20, 3)
    settings = EvaluationSettings(particles=2, elbo_samples=1)
    nats = -exact_evidence(model, x).mean()
    plain = evaluate(model, guide, x, settings, 0)[0]["test/bits_per_dim"]
    assert plain == pytest.approx(nats / 3 / math.log(2), abs=1e-9)
    # A density over [0, 1) of 256 dequantized levels: the uniform one costs 8 bits.
    density = evaluate(model, guide, x, settings, 0, log_levels=math.log(256))[0]["test/bits_per_dim"]
    assert density == pytest.approx(plain + 8, abs=1e-9)


def test_settings_say_which_of_them_is_wrong():
    for name in ("particles", "elbo_samples", "surgery_data", "khat_data", "draws", "posterior_data"):
        with pytest.raises(ValueError, match=rf"evaluation\.{name}: 0 is below 1"):
            EvaluationSettings(**{name: 0})
    with pytest.raises(ValueError, match=r"evaluation\.data: -1 is below 0; 0 takes all"):
        EvaluationSettings(data=-1)


class Numbered:
    """A split whose rows are their own indices, sorted as published test sets are."""

    def __len__(self):
        return 1000

    def fixed(self, index):
        return index.double().unsqueeze(-1)


def test_held_out_data_are_a_fair_sample():
    x, index = held_out(Numbered(), 0, seed=3)
    assert torch.equal(index.sort().values, torch.arange(1000))
    assert torch.equal(x[:, 0], index.double())
    first = [held_out(Numbered(), 100, seed)[1] for seed in range(200)]
    assert all(len(index.unique()) == 100 for index in first)
    assert torch.equal(first[0], held_out(Numbered(), 0, seed=0)[1][:100])  # any first so many of the same order
    counts = torch.stack(first).flatten().bincount(minlength=1000).double()
    # Each row is held out in 200 draws with probability 1/10: 20 times, with variance 18.
    assert abs(counts.mean() - 20) < 1e-9
    assert abs(counts.var() / 18 - 1) < 5 * math.sqrt(2 / 1000)
    assert abs(counts[:500].mean() - 20) < 5 * math.sqrt(18 / 1000)  # of 500 rows against the rest


@pytest.mark.parametrize("prior", [LearnedNormal, CouplingPrior])
def test_a_point_for_each_datum_bounds_nothing(prior):
    """Its KL is infinite: as the noise of a guide goes, the ELBO falls without end, and the point's has no number."""
    x = torch.randn(20, 3)
    model = LatentVariableModel(prior((2,)), FixedGaussian((3,), (2,), Linear))
    settings = EvaluationSettings(particles=4, elbo_samples=2)
    point, _ = evaluate(model, Amortized(Deterministic((2,), (3,), Linear)), x, settings, seed=0)
    for name in ("nll", "nll_stderr", "bits_per_dim", "marginal_kl"):
        assert point[f"test/{name}"] is None
    assert "infinite" in point["test/kl_estimator"]
    assert math.isfinite(point["test/reconstruction"])
    with pyro.validation_enabled(False):
        noisy = Amortized(DiagonalNormal((2,), (3,), Linear))
        known, _ = evaluate(model, noisy, x, settings, seed=0)
    assert math.isfinite(known["test/nll"])
    assert math.isfinite(known["test/marginal_kl"])
    scores = validation_scores(model, Amortized(Deterministic((2,), (3,), Linear)), x, 0, surgery_data=10)
    assert "valid/marginal_kl" not in scores
    assert scores["valid/mutual_information"] <= math.log(10)
    assert "valid/marginal_kl" in validation_scores(model, noisy, x, 0, surgery_data=10)
