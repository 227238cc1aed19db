"""Reweighted wake-sleep, phase by phase, against its exact updates by enumeration and quadrature."""

import pytest
import torch

from inference.objectives import ELBO, IWAE
from inference.particles import StructureError, dream
from inference.wake_sleep import WakeSleep
from tests import estimation
from tests.estimation import BITS, NORMAL, all_bits, deviations, exact, gradient_draws, gradients, programs
from tests.gradient_cases import LIMIT, ROWS, iwae
from tests.programs import HierarchicalGuide, HierarchicalModel


def leaves(kind):
    values = {"bits": BITS, "normal": NORMAL}[kind]
    return tuple(
        {name: torch.tensor(value, requires_grad=True) for name, value in values[part].items()}
        for part in ("model", "guide")
    )


def exact_wake(kind, particles):
    """The gradient of E sum_k w_k log q(z_k|x), with draws and normalized weights held fixed."""
    model, guide = leaves(kind)
    terms = estimation._bits_terms if kind == "bits" else estimation._normal_terms
    (likelihood, prior, log_q), probability = terms(model, guide, particles)
    weights = (likelihood + prior - log_q).softmax(0).detach()
    if kind == "normal":  # score the nodes as constants: they move with the guide otherwise
        _, _, log_q = _at_fixed_nodes(model, guide, particles)
    return gradients((probability.detach() * (weights * log_q).sum(0)).sum(), model, guide)["guide"]


def _at_fixed_nodes(model, guide, particles):
    nodes = torch.tensor(estimation._hermite(60)[0])
    x = torch.tensor(NORMAL["x"])
    z = guide["base"] + (guide["slope"] * x).sum() + guide["log_scale"].exp() * nodes
    z = torch.cartesian_prod(*[z.detach()] * particles).reshape(-1, particles).T
    return estimation.normal_log_densities(model, guide, z)


def exact_sleep():
    """The gradient of the mean of log q(z|x) over the model's own bits and pixels."""
    model, guide = leaves("bits")
    states, pixels = all_bits(2), all_bits(3)
    total = 0
    for x in pixels:
        likelihood, prior = estimation.bits_log_joint(model, states, x)
        total = total + ((likelihood + prior).exp().detach() * estimation.bits_log_q(guide, states, x)).sum()
    return gradients(total, model, guide)["guide"]


@pytest.mark.parametrize("kind", ["bits", "normal"])
def test_the_wake_phase_follows_the_bound_in_the_model_and_the_weights_in_the_guide(kind):
    draws = gradient_draws(WakeSleep(2), kind, ROWS)
    bound, wake = exact(kind, iwae, 2), exact_wake(kind, 2)
    assert deviations(draws["value"], bound["value"]) < LIMIT
    assert deviations(draws["model"], bound["model"]) < LIMIT
    assert deviations(draws["guide"], wake) < LIMIT
    if kind == "bits":  # it is another target, although here and there its gradient is alike
        assert deviations(draws["guide"], bound["guide"]) > 2 * LIMIT


def test_the_wake_phase_doubly_reparameterized_has_the_same_mean_and_less_noise():
    plain, doubly = (gradient_draws(WakeSleep(2, gradient=g), "normal", ROWS) for g in ("weighted", "dreg"))
    assert deviations(doubly["guide"], exact_wake("normal", 2)) < LIMIT
    assert deviations(doubly["model"], exact("normal", iwae, 2)["model"]) < LIMIT
    assert doubly["guide"].var(0).sum() < plain["guide"].var(0).sum()


def test_the_sleep_phase_dreams():
    sleep = gradient_draws(WakeSleep(2, "sleep"), "bits", ROWS)
    assert deviations(sleep["guide"], exact_sleep()) < LIMIT
    assert deviations(sleep["guide"], exact_wake("bits", 2)) > 2 * LIMIT
    assert deviations(sleep["model"], exact("bits", iwae, 2)["model"]) < LIMIT


def test_both_phases_are_averaged():
    both = gradient_draws(WakeSleep(2, "both"), "bits", ROWS)
    expected = 0.5 * (exact_wake("bits", 2) + exact_sleep())
    assert deviations(both["guide"], expected) < LIMIT
    assert deviations(both["guide"], exact_sleep()) > 2 * LIMIT


def test_the_value_is_the_importance_weighted_bound_of_the_same_draws():
    model, guide, x = programs("normal", 5)
    for objective in (WakeSleep(3), WakeSleep(3, "both"), WakeSleep(3, gradient="dreg")):
        torch.manual_seed(0)
        found = objective.bound(model, guide, x).detach()
        torch.manual_seed(0)
        torch.testing.assert_close(found, IWAE(3).bound(model, guide, x).detach())


def test_dreams_train_the_guide_alone_and_go_through_a_hierarchy():
    model, guide = HierarchicalModel(), HierarchicalGuide()
    log_q = dream(model, guide, torch.zeros(7, 5))
    assert log_q.shape == (7,)
    log_q.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())


def test_wake_and_sleep_find_the_posterior_of_the_bits():
    """The updates of the guide alone end where q(z|x) = p(z|x) allows them to; they start far from it."""
    model, guide, x = programs("bits", 500)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.05)
    states = all_bits(2)
    truth = {name: torch.tensor(value) for name, value in BITS["model"].items()}
    likelihood, prior = estimation.bits_log_joint(truth, states, x[0])
    marginals = (likelihood + prior).softmax(0) @ states

    def error():
        logits = guide.base + torch.einsum("nbp,np->nb", guide.slope, x)
        return float((logits.sigmoid().mean(0) - marginals).abs().max().detach())

    assert error() > 0.15
    for _ in range(150):
        optimizer.zero_grad()
        (-WakeSleep(20).bound(model, guide, x)).sum().backward()
        optimizer.step()
    assert error() < 0.05


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: WakeSleep(1), "needs 2 particles or more"),
        (lambda: WakeSleep(5, "dusk"), "'wake', 'sleep' or 'both', got 'dusk'"),
        (lambda: WakeSleep(5, gradient="stl"), "follows two targets, and gradient=stl is that of one bound"),
        (lambda: WakeSleep(5, "both", gradient="dreg"), "gradient=dreg is about the wake phase"),
        (lambda: WakeSleep(5, gradient="foo"), "'weighted' or 'dreg', got 'foo'"),
        (lambda: ELBO(gradient="weighted"), "got 'weighted'"),
    ],
)
def test_what_is_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


def test_a_doubly_reparameterized_wake_phase_needs_a_path():
    model, guide, x = programs("bits", 3)
    with pytest.raises(StructureError, match="cannot be reparameterized"):
        WakeSleep(3, gradient="dreg").bound(model, guide, x)
