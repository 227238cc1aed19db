"""Every gradient estimator of every bound, held against the exact gradient; and wrong ones, to be told apart."""

import math
from dataclasses import replace

import pytest
import torch

from inference.baselines import VIMCO, LeaveOneOut, ScoreFunction, learning_signal
from inference.bounds import PIWAE
from inference.gradients import DoublyReparameterized, StickingTheLanding, with_gradient
from inference.particles import StructureError
from inference.thermodynamic import TVO
from tests.estimation import NORMAL, deviations, exact, exact_thermodynamic, gradient_draws
from tests.gradient_cases import BOUNDS, LIMIT, PATHWISE, ROWS, SCORED, assert_right, draws_of, elbo, iwae


@pytest.mark.row("0.10", "1.9", "1.10", "3.16", "4.4", "4.5", "5.7")
@pytest.mark.parametrize(("name", "gradient"), PATHWISE)
def test_pathwise_gradients_have_the_exact_mean(name, gradient):
    assert_right(draws_of(name, gradient, "normal"), name, "normal")


@pytest.mark.row("0.31", "4.4", "5.7")
@pytest.mark.parametrize("kind", ["bits", "normal"])
@pytest.mark.parametrize(("name", "gradient"), SCORED)
def test_score_function_gradients_have_the_exact_mean(name, gradient, kind):
    assert_right(draws_of(name, gradient, kind), name, kind)


class _Unchecked:
    def check(self, objective):
        pass


class BiasedLanding(_Unchecked, StickingTheLanding):
    """Sticking the landing where it is biased."""


class OwnAverage(LeaveOneOut):
    """A baseline that depends on the particle it is for."""

    def baseline(self, objective, draws, signal, x):
        return signal.mean(0)


class OwnWeight(VIMCO):
    """The same for a bound that all particles make together."""

    def substitute(self, contributions):
        return contributions


class Halved(DoublyReparameterized):
    """The path derivatives weighted once instead of twice."""

    def estimate(self, objective, draw, x):
        draws = draw(detach_guide=True, through=lambda z, event_dim: z)
        return objective.from_particles(draws), draws


class NoDirectTerm(ScoreFunction):
    """A score function that forgets the guide's part in the bound itself."""

    def estimate(self, objective, draw, x):
        draws = draw(detach_draws=True)
        signal, weight = learning_signal(objective, draws)
        direct = objective.from_particles(replace(draws, log_q=draws.log_q.detach()))
        return with_gradient(direct, direct + (weight * signal * draws.log_q).sum(0)), draws


@pytest.mark.parametrize(
    ("name", "wrong"), [("iwae", BiasedLanding), ("miwae", BiasedLanding), ("iwae", Halved), ("ciwae", Halved)]
)
def test_wrong_pathwise_gradients_are_told_apart(name, wrong):
    draws = draws_of(name, wrong(), "normal")
    assert deviations(draws["guide"], exact("normal", *BOUNDS[name][1:])["guide"]) > 2 * LIMIT


@pytest.mark.parametrize(("name", "wrong"), [("elbo", OwnAverage), ("iwae", OwnWeight), ("iwae", NoDirectTerm)])
def test_wrong_score_functions_are_told_apart(name, wrong):
    draws = draws_of(name, wrong(), "bits")
    assert deviations(draws["guide"], exact("bits", *BOUNDS[name][1:])["guide"]) > 2 * LIMIT


@pytest.mark.row("1.9", "1.10")
def test_quadrature_agrees_with_the_closed_form():
    """The oracle itself: for the linear model the ELBO's gradient is elementary."""
    guide, model, x = NORMAL["guide"], NORMAL["model"], NORMAL["x"]
    m = guide["base"] + sum(a * b for a, b in zip(guide["slope"], x, strict=True))
    s, scale, noise = (math.exp(v) for v in (guide["log_scale"], model["log_scale"], model["log_noise"]))
    residual = [a - w * m - b for a, w, b in zip(x, model["weight"], model["bias"], strict=True)]
    by_mean = (
        sum(w * r for w, r in zip(model["weight"], residual, strict=True)) / noise**2 - (m - model["loc"]) / scale**2
    )
    spread = sum(w * w for w in model["weight"]) / noise**2 + 1 / scale**2
    expected = torch.tensor([by_mean, by_mean * x[0], by_mean * x[1], 1 - s**2 * spread])
    torch.testing.assert_close(exact("normal", elbo, 1)["guide"], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gradient", ["reparameterized", "dreg", "score", "vimco"])
@pytest.mark.parametrize("kind", ["bits", "normal"])
def test_piwae_has_one_target_for_the_model_and_one_for_the_guide(kind, gradient):
    if kind == "bits" and gradient in ("reparameterized", "dreg"):
        with pytest.raises(StructureError, match="cannot be reparameterized"):
            gradient_draws(PIWAE(4, 2, gradient=gradient), kind, 2)
        return
    draws = gradient_draws(PIWAE(4, 2, gradient=gradient), kind, ROWS)
    for_model, for_guide = exact(kind, iwae, 4), exact(kind, iwae, 2)
    assert deviations(draws["value"], for_model["value"]) < LIMIT
    assert deviations(draws["model"], for_model["model"]) < LIMIT
    assert deviations(draws["guide"], for_guide["guide"]) < LIMIT
    if gradient != "score":  # too noisy to tell two targets apart
        assert deviations(draws["guide"], for_model["guide"]) > LIMIT
    assert deviations(draws["model"], for_guide["model"]) > LIMIT


@pytest.mark.parametrize("kind", ["bits", "normal"])
def test_covariances_estimate_the_thermodynamic_gradient(kind):
    """With many particles normalized weights are exact, and so is the gradient; for two they are not, by far."""

    truth = exact_thermodynamic(kind, [0.0, 0.25], [0.25, 0.75])
    many = gradient_draws(TVO(4000, 2, first=0.25), kind, 400)
    for part in ("value", "model", "guide"):
        assert deviations(many[part], truth[part]) < LIMIT, part
    few = gradient_draws(TVO(2, 2, first=0.25), kind, ROWS)
    assert deviations(few["guide"], truth["guide"]) > 2 * LIMIT
