"""How much gradient estimators scatter, held against enumerated and closed-form variances."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from inference.baselines import ScoreFunction, learning_signal
from inference.objectives import ELBO, IWAE
from inference.particles import particles
from tests.estimation import deviations, exact, programs
from tests.gradient_cases import LIMIT, ROWS, draws_of, elbo


def one_bit(baseline, logit=0.4, gain=1.3, count=100_000):
    """Draws of the ELBO's gradient in the logit of q for one bit, and its exact mean and variance, by enumeration."""

    class Constant(ScoreFunction):
        def baseline(self, objective, draws, signal, x):
            return signal.new_tensor(baseline)

    logits = torch.full((count,), logit, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(gain * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    x = torch.ones(count)
    ELBO(gradient=Constant()).bound(model, guide, x).sum().backward()
    p = 1 / (1 + math.exp(-logit))
    states = torch.tensor([0.0, 1.0])
    probability = torch.tensor([1 - p, p])
    signal = dist.Normal(gain * states, 1.0).log_prob(torch.tensor(1.0)) - math.log(2) - probability.log()
    terms = (signal - baseline) * (states - p)
    mean = (probability * terms).sum()
    best = (probability * signal * (states - p) ** 2).sum() / (p * (1 - p))
    return logits.grad, float(mean), float((probability * terms**2).sum() - mean**2), float(best)


@pytest.mark.row("0.31", "5.7")
def test_score_functions_have_the_enumerated_variance_and_a_best_baseline():
    draws, mean, variance, best = one_bit(0.0)
    variances = {}
    for baseline in (0.0, best, best - 0.5, best + 0.5):
        draws, mean_here, variance, _ = one_bit(baseline)
        assert mean_here == pytest.approx(mean, abs=1e-12)
        assert abs(float(draws.mean()) - mean) < LIMIT * math.sqrt(variance / len(draws)) + 1e-12
        assert float(draws.var()) == pytest.approx(variance, rel=0.05, abs=1e-12)
        variances[baseline] = variance
    assert variances[best] == min(variances.values())
    assert variances[0.0] > 1.5 * variances[best]


def test_baselines_lower_the_variance_of_the_score_function():
    spread = {g: draws_of("iwae", g, "bits")["guide"].var(0).sum() for g in ("score", "score_average", "vimco")}
    assert spread["vimco"] < spread["score_average"] < spread["score"]


@pytest.mark.parametrize(("gradient", "arithmetic"), [("vimco", False), ("vimco_arithmetic", True)])
def test_the_signal_of_vimco_is_that_of_equation_10(gradient, arithmetic):
    """L(h) - log (1/K) (sum of the other weights + what stands for this one), by hand (Mnih and Rezende 2016)."""
    model, guide, x = programs("bits", 40)
    objective = IWAE(4, gradient=gradient)
    draws = particles(model, guide, x, 4)
    log_w = draws.log_weight.detach()
    signal, weight = learning_signal(objective, draws)
    found = signal - objective.gradient.baseline(objective, draws, signal, x)
    assert weight == 1.0
    bound = (log_w.exp().mean(0)).log()
    for j in range(4):
        others = log_w[[i for i in range(4) if i != j]]
        stand_in = others.exp().mean(0) if arithmetic else others.mean(0).exp()
        expected = bound - ((others.exp().sum(0) + stand_in) / 4).log()
        torch.testing.assert_close(found[j], expected, rtol=1e-10, atol=1e-12)
        without = bound - (others.exp().sum(0) / 3).log()  # the bound of the others alone is another baseline
        assert arithmetic == torch.allclose(found[j], without, atol=1e-9)


def test_a_normalized_variance_divides_the_gradient_of_the_guide_and_nothing_else():
    """Mnih and Gregor (2014, section 2.3.3): by the signal's running standard deviation, but by no less than 1."""
    model, guide, x = programs("bits", ROWS)
    objective = ELBO(1, gradient="nvil_normalized")
    objective.prepare((3,))
    estimator = objective.gradient
    variances = []
    for _ in range(3):
        draws = particles(model, guide, x)
        signal, _ = learning_signal(objective, draws)
        centred = (signal - estimator.baseline(objective, draws, signal, x)).detach()
        variances.append(float(centred.var(correction=0)))
        estimator.remember(signal, centred)
    weights = [0.1 * 0.9**2, 0.1 * 0.9, 0.1]
    average = sum(w * v for w, v in zip(weights, variances, strict=True)) / sum(weights)
    assert float(estimator.scale()) == pytest.approx(max(1.0, average) ** 0.5, rel=1e-9)
    estimator.variance.fill_(6.25 * float(estimator.weight))
    assert float(estimator.scale()) == pytest.approx(2.5)
    objective.bound(model, guide, x).sum().backward()
    found = {
        name: torch.cat([p.grad.reshape(ROWS, -1) for p in program.parameters()], -1)
        for name, program in (("model", model), ("guide", guide))
    }
    truth = exact("bits", elbo, 1)
    assert deviations(found["model"], truth["model"]) < LIMIT
    assert deviations(found["guide"], truth["guide"] / 2.5) < LIMIT
    assert deviations(found["guide"], truth["guide"]) > 2 * LIMIT
    estimator.variance.zero_()
    assert float(estimator.scale()) == 1.0


@pytest.fixture
def at_the_posterior():
    """One row of the model for each of many data, and a guide at the exact posterior of each, as its own parameters."""
    count = 100_000
    model, _, x = programs("normal", count)
    precision = torch.tensor(model.log_scale[0].item()).mul(-2).exp()
    weight, noise = model.weight[0].detach(), model.log_noise[0].detach().exp()
    posterior_precision = precision + weight.square().sum() / noise**2
    pull = precision * model.loc[0].detach() + (weight * (x[0] - model.bias[0].detach())).sum() / noise**2
    loc = (pull / posterior_precision).expand(count).clone().requires_grad_()
    log_scale = (-0.5 * posterior_precision.log()).expand(count).clone().requires_grad_()

    class Posterior(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.loc, self.log_scale = torch.nn.Parameter(loc), torch.nn.Parameter(log_scale)

        def forward(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()))

    return model, Posterior(), x


@pytest.mark.row("1.10", "5.7")
@pytest.mark.parametrize(
    "objective", [ELBO(gradient="stl"), ELBO(3, gradient="stl"), ELBO(3, gradient="dreg"), IWAE(5, gradient="dreg")]
)
def test_path_derivatives_vanish_at_the_exact_posterior(objective, at_the_posterior):
    model, guide, x = at_the_posterior
    objective.bound(model, guide, x).sum().backward()
    assert max(p.grad.abs().max() for p in guide.parameters()) < 1e-10


@pytest.mark.row("1.10", "2.13", "5.7")
def test_the_full_gradient_keeps_the_noise_of_the_score_at_the_exact_posterior(at_the_posterior):
    model, guide, x = at_the_posterior
    ELBO().bound(model, guide, x).sum().backward()
    variance = float(guide.log_scale[0].detach().mul(2).exp())
    assert float(guide.loc.grad.var()) == pytest.approx(1 / variance, rel=0.05)
    assert float(guide.log_scale.grad.var()) == pytest.approx(2, rel=0.05)


@pytest.mark.row("2.13", "5.7")
def test_a_closed_form_kl_leaves_the_noise_of_the_reconstruction(at_the_posterior):
    """Variance w^4 s_q^2 / s^4 for one pixel; here the squared weights add up over pixels."""
    model, guide, x = at_the_posterior
    ELBO(kl="analytic").bound(model, guide, x).sum().backward()
    curvature = float((model.weight[0].square().sum() / model.log_noise[0].mul(2).exp()).detach())
    variance = float(guide.log_scale[0].detach().mul(2).exp())
    assert float(guide.loc.grad.var()) == pytest.approx(curvature**2 * variance, rel=0.05)
