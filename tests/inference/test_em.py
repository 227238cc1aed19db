"""EM: free energies at every half step, stationary points, and the step on a bound that lowers log p(x)."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from guides.enumerated import Enumerated, FreeCategorical, SummedOut, amortized, exact
from inference.ascent import ascend, variational_em
from inference.em import EMError, EMSettings, e_step, fit, free_energy, penalized_log_joint
from inference.engine import SVI, SharedOptimizer
from inference.stock import TraceEnum
from models.gmm import COVARIANCES, GaussianMixture
from models.hmm import HMM
from models.kmeans import KMeans
from models.latent_class import LatentClassModel
from models.nets import MLP
from models.ppca import PPCA
from models.tabular import TabularVAE


def clouds(size=120, dimension=2, seed=0) -> Tensor:
    rng = np.random.default_rng(seed)
    centers = rng.normal(scale=2, size=(3, dimension))
    return torch.tensor(centers[rng.integers(3, size=size)] + rng.normal(size=(size, dimension)))


def bits(size=200) -> Tensor:
    rng = np.random.default_rng(0)
    prototypes = rng.uniform(0.1, 0.9, size=(3, 6))
    return torch.tensor((rng.uniform(size=(size, 6)) < prototypes[rng.integers(3, size=size)]).astype(float))


MODELS = {
    **{f"gmm {name}": (lambda name=name: GaussianMixture((2,), 3, name), clouds) for name in COVARIANCES},
    "gmm ridge": (lambda: GaussianMixture((2,), 3, ridge=2.0), clouds),
    "tabular": (lambda: TabularVAE((6,), 3), bits),
    "tabular pseudo": (lambda: TabularVAE((6,), 3, pseudo_count=0.5), bits),
    "latent class": (lambda: LatentClassModel((6,), 3, 2), bits),
    "latent class pseudo": (lambda: LatentClassModel((6,), 3, 2, pseudo_count=0.5), bits),
    "hmm gaussian": (lambda: HMM((2,), 2), clouds),
    "hmm categorical": (lambda: HMM((6,), 2, "categorical", 2), bits),
}
ENUMERABLE = pytest.mark.parametrize("name", list(MODELS))
MODELS["ppca"] = (lambda: PPCA((3,), 1), lambda: clouds(dimension=3))
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def started(name, seed=0):
    make, data = MODELS[name]
    model, x = make(), data()
    model.initialize(x, torch.Generator().manual_seed(seed))
    return model, x


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


@pytest.mark.row("0.20", "1.4", "2.8", "4.1")
def test_gradient_ascent_in_a_free_q_ends_at_the_responsibilities():
    model, x = started("gmm full")
    x = x[:12]
    with torch.no_grad():
        model.log_scale += 0.7  # no responsibility so near 0 that gradients vanish
    guide = Enumerated(FreeCategorical(len(x), 3))
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    evidence = float(model.log_evidence(x).sum().detach())
    assert -elbo.loss(model, guide, x) < evidence - 1
    trace, size = [], len(x)
    with pyro.validation_enabled(False):
        for _ in range(30):
            bound = ascend(guide.parameters(), lambda: -elbo.differentiable_loss(model, guide, x) / size, 10)
            trace.append(float(bound))
    assert np.all(np.diff(trace) >= -1e-12)
    assert torch.allclose(guide.core(x).probs, model.posterior(x).probs, atol=1e-5)
    assert size * trace[-1] == pytest.approx(evidence, abs=1e-6)


@pytest.mark.row("1.6", "2.8", "3.13")
@pytest.mark.parametrize("inner", [1, 20])
def test_variational_em_moves_one_block_at_a_time_and_only_up(inner):
    model, x = started("gmm full")
    guide = amortized(model, (2,), lambda i, o: MLP(i, o, hidden=(16,)))
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    last = {n: [p.detach().clone() for p in m.parameters()] for n, m in (("E", guide), ("M", model))}

    def watch(step):
        still = "M" if step.kind == "E" else "E"
        program = {"E": guide, "M": model}
        assert all(torch.equal(a, b) for a, b in zip(last[still], program[still].parameters(), strict=True))
        last[step.kind] = [p.detach().clone() for p in program[step.kind].parameters()]

    with pyro.validation_enabled(False):
        history = variational_em(model, guide, elbo, x, 6, inner, inner, on_half_step=watch)
    bounds = np.array([step.free_energy for step in history])
    assert np.all(np.diff(bounds) >= -1e-12)
    assert bounds[-1] > bounds[0]
    with pytest.raises(ValueError, match="share"):
        variational_em(model, model, elbo, x, 1)


@pytest.mark.row("1.6")
def test_variational_em_reaches_the_log_likelihood_of_em():
    model, x = started("gmm full")
    guide = Enumerated(FreeCategorical(len(x), 3))
    em, _ = started("gmm full")
    result = fit(em, x, EMSettings(restarts=0, tolerance=1e-9, iterations=500))
    with pyro.validation_enabled(False):
        history = variational_em(model, guide, TraceEnum_ELBO(max_plate_nesting=1), x, 30, 8, 4)
    assert history[0].free_energy < result.free_energy - 0.1
    assert history[-1].free_energy == pytest.approx(result.free_energy, abs=0.02)


@pytest.mark.row("3.13")
def test_maximizing_the_elbo_under_the_posterior_guide_is_an_m_step():
    """SVI with q held at the posterior, run to its end, is one iteration of EM."""
    model, x = started("gmm diagonal")
    em, _ = started("gmm diagonal")
    guide = Enumerated(FreeCategorical(len(x), 3))
    with torch.no_grad():
        guide.core.logits.copy_(model.log_joint(x))
    statistics, _ = e_step(em, x)
    em.m_step(statistics)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=300, tolerance_grad=1e-11, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = elbo.differentiable_loss(model, guide, x) / len(x)
        loss.backward()
        return loss

    assert not torch.allclose(model.loc, em.loc, atol=1e-2)
    optimizer.step(closure)
    assert torch.allclose(model.weights, em.weights, atol=1e-6)
    assert torch.allclose(model.loc, em.loc, atol=1e-6)
    assert torch.allclose(model.log_scale, em.log_scale, atol=1e-6)


@pytest.mark.row("1.19")
def test_a_step_on_the_bound_may_lower_the_evidence_and_em_may_not():
    """One datum between two fixed components, one parameter: the log-odds theta of the second.

    log p = log((1 - s) a + s b), s = sigmoid(theta), with slope r - s, r = s b / p. Under q(1) = c the ELBO has slope
    c - s. At theta = 0 and x = 1, b > a, so that r > 1/2, and with c < 1/2 the two slopes disagree.
    """
    a, b = (math.exp(-0.5 * d**2) / math.sqrt(2 * math.pi) for d in (2.0, 0.0))
    c, x, step = 0.1, torch.ones(1, 1), 0.5

    def log_p(theta):
        s = 1 / (1 + math.exp(-theta))
        return math.log((1 - s) * a + s * b)

    def mixture():
        model = GaussianMixture((1,), 2, "spherical")
        with torch.no_grad():
            model.loc.copy_(torch.tensor([[-1.0], [1.0]]))
        return model

    model = mixture()
    guide = Enumerated(FreeCategorical(1, 2))
    with torch.no_grad():
        guide.core.logits.copy_(torch.tensor([[1 - c, c]]).log())
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    bound_before = -elbo.loss(model, guide, x)
    assert float(model.log_evidence(x).detach()) == pytest.approx(log_p(0.0), abs=1e-10)
    optimizer = SharedOptimizer([model.logits], torch.optim.SGD, step)
    SVI(model, guide, optimizer, elbo).step(x)
    theta = float((model.logits[1] - model.logits[0]).detach())
    assert theta == pytest.approx(2 * step * (c - 0.5), abs=1e-10)  # both logits move, in opposite directions
    assert -elbo.loss(model, guide, x) > bound_before
    after = float(model.log_evidence(x).detach())
    assert after == pytest.approx(log_p(theta), abs=1e-10)
    assert after < log_p(0.0) - 0.1

    em = mixture()
    statistics, _ = em.e_step(x)
    em.logits.data.copy_((statistics["count"] / statistics["count"].sum()).log())  # the M step of theta alone
    r = b / (a + b)
    assert float(em.weights[1].detach()) == pytest.approx(r, abs=1e-10)
    assert float(em.log_evidence(x).detach()) == pytest.approx(log_p(math.log(r / (1 - r))), abs=1e-10)
    assert float(em.log_evidence(x).detach()) > log_p(0.0) + 0.1


def test_em_and_svi_end_at_the_same_likelihood_and_only_em_is_monotone():
    em, x = started("gmm full")
    result = fit(em, x, EMSettings(restarts=0, tolerance=1e-9, iterations=500))
    model, _ = started("gmm full")
    untrained = float(model.log_evidence(x).mean().detach())
    guide = exact(model)
    svi = SVI(
        model, guide, SharedOptimizer(model.parameters(), torch.optim.Adam, 0.05), TraceEnum_ELBO(max_plate_nesting=1)
    )
    trace = []
    with pyro.validation_enabled(False):
        for step in range(500):
            svi.optim.set_learning_rate(0.05 * (1 - step / 500))
            svi.step(x[torch.randint(len(x), (30,))])
            if step % 10 == 0:
                trace.append(float(model.log_evidence(x).mean().detach()))
    assert result.free_energy > untrained + 0.1
    assert trace[-1] == pytest.approx(result.free_energy, abs=0.02)
    assert np.diff(trace).min() < -1e-6


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
