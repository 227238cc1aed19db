"""EM: free energies at every half step, stationary points, and the step on a bound that lowers log p(x)."""

import math

import numpy as np
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

from guides.enumerated import SummedOut, amortized, exact
from inference.em import EMError, EMSettings, e_step, fit, free_energy, penalized_log_joint
from inference.stock import TraceEnum
from models.gmm import GaussianMixture
from models.kmeans import KMeans
from models.nets import MLP
from tests.em_cases import ENUMERABLE, EVERY_MODEL, clouds, started


def log_prior(model):
    return float(model.log_prior().detach()) if hasattr(model, "log_prior") else 0.0


@pytest.mark.row("0.19", "0.43", "1.4", "4.1", "3.13", "3.14")
@EVERY_MODEL
@pytest.mark.parametrize("variant", ["exact", "hard", "incremental", "generalized"])
def test_no_half_step_lowers_the_free_energy(name, variant):
    model, x = started(name)
    result = fit(model, x, EMSettings(variant, iterations=15, restarts=0, tolerance=0, inner_steps=3))
    energies = np.array([step.free_energy for step in result.history])
    assert np.all(np.diff(energies) >= -1e-10)
    assert energies[-1] > energies[0] + 1e-3, "nothing moved"


@pytest.mark.row("0.19", "0.20", "1.4", "1.18", "4.1")
@EVERY_MODEL
def test_the_bound_is_tight_after_e_and_not_after_m(name):
    model, x = started(name)
    for _ in range(5):
        before = float(model.log_evidence(x).sum().detach()) + log_prior(model)
        statistics, log_evidence = e_step(model, x, chunk=50)
        assert float(log_evidence) + log_prior(model) == pytest.approx(before, abs=1e-8)
        assert float(free_energy(model, statistics).detach()) == pytest.approx(before, abs=1e-8)
        model.m_step(statistics)
        raised = float(free_energy(model, statistics).detach())
        after = float(model.log_evidence(x).sum().detach()) + log_prior(model)
        assert after > before
        assert after - raised > 1e-9, "the gap reopens"


@pytest.mark.row("0.21", "3.13")
@EVERY_MODEL
def test_the_m_step_is_the_maximum(name):
    model, x = started(name)
    for _ in range(2):
        statistics, _ = e_step(model, x)
        at_start = penalized_log_joint(model, statistics)
        untrained = torch.autograd.grad(at_start, list(model.parameters()))
        assert max(float(g.abs().max()) for g in untrained) > 1e-2
        model.m_step(statistics)
    best = penalized_log_joint(model, statistics)
    for gradient in torch.autograd.grad(best, list(model.parameters()), allow_unused=True):
        assert gradient is None or gradient.abs().max() < 1e-8
    kept = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for trial in range(100):
            for p, origin in zip(model.parameters(), kept, strict=True):
                p.copy_(origin + 10 ** (-trial / 25) * torch.randn_like(p))
            assert penalized_log_joint(model, statistics) <= best + 1e-9


@pytest.mark.row("5.2")
@ENUMERABLE
def test_a_model_without_a_guide_is_summed_out_whatever_it_says(name):
    model, x = started(name)
    elbo = TraceEnum(max_plate_nesting=1)
    evidence = model.log_evidence(x).sum()
    loss = elbo.differentiable_loss(model, SummedOut(model), x)
    assert float(-loss.detach()) == pytest.approx(float(evidence.detach()), abs=1e-8)
    for one, other in zip(*(torch.autograd.grad(v, list(model.parameters())) for v in (-loss, evidence)), strict=True):
        assert torch.allclose(one, other, atol=1e-8)
    if name.startswith("hmm"):
        return
    for guide in (exact(model), amortized(model, x.shape[1:], MLP)):
        assert elbo.loss(model, guide, x) == pytest.approx(
            TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x), abs=1e-9
        )


def test_chunks_do_not_change_a_run():
    for name in ("gmm full", "hmm categorical"):
        (one, x), (other, _) = started(name), started(name)
        fit(one, x, EMSettings(restarts=0, iterations=5))
        fit(other, x, EMSettings(restarts=0, iterations=5, chunk=7))
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-9)


def test_the_best_restart_is_kept_and_the_same_seed_gives_the_same():
    x = clouds()
    model = GaussianMixture((2,), 4, "spherical")
    seen = []
    result = fit(model, x, EMSettings(restarts=6, iterations=30), seen.append)
    assert len(result.free_energies) == 6
    assert result.free_energy == max(result.free_energies)
    assert len(set(np.round(result.free_energies, 4))) > 1
    assert len(seen) > len(result.history)
    again = fit(GaussianMixture((2,), 4, "spherical"), x, EMSettings(restarts=6, iterations=30))
    assert again == result
    _, log_evidence = e_step(model, x)
    assert float(log_evidence) / len(x) >= result.free_energy


def test_float32_is_enough():
    model, x = GaussianMixture((2,), 3).float(), clouds().float() + 100
    result = fit(model, x, EMSettings(iterations=100))
    double = fit(GaussianMixture((2,), 3), x.double(), EMSettings(iterations=100, seed=0))
    assert result.free_energy == pytest.approx(double.free_energy, abs=0.2)
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.empty(0, 2), ValueError, "no data"),
        (torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), ValueError, "row 1"),
        (torch.tensor([[0.0, 1.0], [float("inf"), 0.0]]), ValueError, "row 1"),
        (torch.randn(1, 2), EMError, "constant"),
        (torch.ones(10, 2), EMError, "constant"),
        (torch.randn(2, 2), EMError, "2 distinct rows.*at most 2"),
        (torch.randn(3, 2), EMError, "singular covariance.*fewer components.*restarts"),
        (torch.stack([torch.arange(9.0)] * 2, 1), EMError, "singular covariance.*columns"),
    ],
)
def test_degenerate_data_give_one_message(x, error, says):
    with pytest.raises(error, match=says):
        fit(GaussianMixture((2,), 3), x.double(), EMSettings(restarts=2))


def test_a_failed_restart_costs_the_others_nothing():
    model = GaussianMixture((2,), 3)
    random, tries = model.initialize, []

    def initialize(x, generator):
        tries.append(None)
        random(torch.ones_like(x) if len(tries) == 1 else x, generator)

    model.initialize = initialize
    result = fit(model, clouds(), EMSettings(restarts=2))
    assert result.free_energies[0] is None
    assert result.free_energies[1] == result.free_energy


def test_a_model_whose_steps_disagree_is_found_out():
    class Wrong(KMeans):
        def m_step(self, statistics):
            super().m_step(statistics)
            self.codebook.data.add_(1.0)

    with pytest.raises(EMError, match="M step of iteration 1 lowered F"):
        fit(Wrong((2,), 2), clouds())


@pytest.mark.parametrize(
    "options", [{"variant": "soft"}, {"iterations": 0}, {"restarts": -1}, {"tolerance": -1.0}, {"tolerance": math.nan}]
)
def test_bad_settings_get_one_message(options):
    with pytest.raises(ValueError, match=r"inference\."):
        EMSettings(**options)
