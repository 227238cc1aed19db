"""EM beside gradients: free and amortized q, variational EM, SVI."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

from guides.enumerated import Enumerated, FreeCategorical, amortized, exact
from inference.ascent import ascend, variational_em
from inference.em import EMSettings, e_step, fit
from inference.engine import SVI, SharedOptimizer
from models.gmm import GaussianMixture
from models.nets import MLP
from tests.em_cases import started


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
