"""Relaxed and straight-through draws: their gradients against quadrature, their scores against enumeration."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from scipy.special import expit, logit
from torch.distributions import kl_divergence

from guides.discrete import OneHotCategoricals
from guides.relaxed import MeanPathBits, MeanPathOneHots, RelaxedBits, RelaxedOneHotCategoricals, RelaxedOneHots
from models.discrete import Bits, OneHots, UniformOneHots, joint
from models.nets import Linear

ALPHA, COUNT = 0.3, 200_000
TEMPERATURES = (2.0, 1.0, 0.5, 0.1)


def gain(z):
    return (2 * z - 1) ** 3 + z + z**4


def slope(z):
    return 6 * (2 * z - 1) ** 2 + 1 + 4 * z**3


def by_quadrature(integrand):
    """The mean of a function of ALPHA plus logistic noise; the kink of a hard draw is an end of two intervals."""
    density = lambda s: expit(s - ALPHA) * expit(ALPHA - s)  # noqa: E731
    halves = [(-60, -1), (-1, 0), (0, 1), (1, 60)]
    return sum(quad(lambda s: integrand(s) * density(s), *h, epsabs=1e-11, limit=400)[0] for h in halves)


def relaxed_gradient(temperature):
    def integrand(s):
        y = expit(s / temperature)
        return slope(y) * y * (1 - y) / temperature

    return by_quadrature(integrand)


def straight_through_gradient(temperature):
    def integrand(s):
        y = expit(s / temperature)
        return slope(float(s > 0)) * y * (1 - y) / temperature

    return by_quadrature(integrand)


EXACT = float(expit(ALPHA) * expit(-ALPHA)) * (gain(1) - gain(0))


def concrete_density(y, temperature):
    """Of the sigmoid of (ALPHA + logistic noise) over the temperature (Maddison et al. 2017, appendix B)."""
    odds = np.exp(ALPHA)
    above = temperature * odds * y ** (-temperature - 1) * (1 - y) ** (-temperature - 1)
    return above / (odds * y**-temperature + (1 - y) ** -temperature) ** 2


@pytest.mark.row("5.3")
@pytest.mark.parametrize("kind", ["bits", "two classes"])
@pytest.mark.parametrize("temperature", [2.0, 1.0, 0.5])
def test_relaxed_draws_have_the_concrete_density_which_integrates_to_one(kind, temperature):
    total, _ = quad(concrete_density, 0, 1, args=(temperature,), points=(1e-6, 0.01, 0.5, 0.99, 1 - 1e-6), limit=400,
                    epsabs=1e-11)  # fmt: skip
    assert total == pytest.approx(1, abs=1e-8)
    logits, t = torch.tensor(ALPHA), torch.tensor(temperature)
    made = (
        RelaxedBits(logits, t, False) if kind == "bits" else RelaxedOneHots(torch.stack([logits, logits * 0]), t, False)
    )
    y = made.rsample((5000,))
    y = (y if kind == "bits" else y[:, 0]).numpy()
    # The distribution function: P(Y < y) = P(noise < temperature logit(y) - ALPHA).
    assert stats.kstest(y, lambda v: expit(temperature * logit(v) - ALPHA)).pvalue > 1e-4
    assert stats.kstest(y, lambda v: expit(temperature * logit(v))).pvalue < 1e-4
    grid = np.array([0.1, 0.4, 0.8])
    slope = (expit(temperature * logit(grid + 1e-6) - ALPHA) - expit(temperature * logit(grid - 1e-6) - ALPHA)) / 2e-6
    assert np.allclose(concrete_density(grid, temperature), slope, rtol=1e-6)


def draws(kind, temperature, hard):
    """Draws of the gradient in ALPHA: of a bit, and of the first of two classes."""
    alpha = torch.full((COUNT,), ALPHA, requires_grad=True)
    temperature = torch.tensor(temperature)
    if kind == "bits":
        z = RelaxedBits(alpha, temperature, hard).rsample()
    else:
        z = RelaxedOneHots(torch.stack([alpha, torch.zeros(COUNT)], -1), temperature, hard).rsample()[:, 0]
    return torch.autograd.grad(gain(z).sum(), alpha)[0]


def test_the_quadrature_is_right():
    """Against differences of the relaxed expectation, and at low temperature against what the means tend to."""
    for temperature in TEMPERATURES:

        def value(shift, t=temperature):
            return by_quadrature(lambda s: gain(expit((s + shift) / t)))

        difference = (8 * (value(1e-3) - value(-1e-3)) - (value(2e-3) - value(-2e-3))) / 12e-3
        assert abs(difference - relaxed_gradient(temperature)) < 1e-7
    halfway = float(expit(ALPHA) * expit(-ALPHA)) * (slope(0) + slope(1)) / 2
    assert abs(straight_through_gradient(0.003) - halfway) < 1e-3


@pytest.mark.row("4.20", "5.3")
@pytest.mark.parametrize("kind", ["bits", "two classes"])
def test_relaxed_draws_have_the_binary_concrete_density_which_integrates_to_one(kind):
    """Maddison et al. (2017), written out; the draws against its integral."""
    temperature = 0.7

    def density(y):
        odds = np.exp(ALPHA)
        bottom = (odds * y**-temperature + (1 - y) ** -temperature) ** 2
        return temperature * odds * (y * (1 - y)) ** (-temperature - 1) / bottom

    assert quad(density, 0, 0.5)[0] + quad(density, 0.5, 1)[0] == pytest.approx(1.0, abs=1e-8)
    at = torch.tensor(0.3)
    by_pyro = dist.RelaxedBernoulli(torch.tensor(temperature), logits=torch.tensor(ALPHA)).log_prob(at).exp()
    assert density(0.3) == pytest.approx(float(by_pyro))
    alpha = torch.full((COUNT,), ALPHA)
    if kind == "bits":
        y = RelaxedBits(alpha, torch.tensor(temperature), False).rsample()
    else:
        y = RelaxedOneHots(torch.stack([alpha, torch.zeros(COUNT)], -1), torch.tensor(temperature), False).rsample()[
            :, 0
        ]
    cumulative = lambda y, alpha=ALPHA: expit(temperature * np.log(y / (1 - y)) - alpha)  # noqa: E731
    assert cumulative(0.3) == pytest.approx(quad(density, 0, 0.3)[0], abs=1e-8)
    assert stats.kstest(y.numpy(), cumulative).pvalue > 1e-3
    assert stats.kstest(y.numpy(), lambda y: cumulative(y, ALPHA + 0.05)).pvalue < 1e-3


@pytest.mark.row("0.31", "4.20", "5.3")
@pytest.mark.parametrize("kind", ["bits", "two classes"])
@pytest.mark.parametrize("hard", [False, True], ids=["relaxed", "straight-through"])
def test_gradients_have_the_mean_that_quadrature_says(kind, hard):
    bias, variance = [], []
    for temperature in TEMPERATURES:
        expected = straight_through_gradient(temperature) if hard else relaxed_gradient(temperature)
        found = draws(kind, temperature, hard)
        error = float(found.std()) / COUNT**0.5
        assert abs(float(found.mean()) - expected) < 4 * error
        assert abs(EXACT - expected) > 8 * error or not hard  # the exact gradient is another one
        bias.append(abs(expected - EXACT))
        variance.append(float(found.var()))
    assert variance == sorted(variance)
    if hard:  # the mean of the slopes at the ends is no difference quotient, however cold
        assert abs(straight_through_gradient(0.003) - EXACT) > 0.3
    else:
        assert bias == sorted(bias, reverse=True)
        assert abs(relaxed_gradient(0.003) - EXACT) < 1e-3 < bias[-1] < bias[0] / 10


@pytest.mark.row("0.35")
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_straight_through_is_one_hot_forwards_and_a_softmax_backwards(temperature, dtype):
    logits = torch.randn(50, 5, dtype=dtype, requires_grad=True)
    made = [RelaxedOneHots(logits, torch.tensor(temperature, dtype=dtype), hard) for hard in (True, False)]
    torch.manual_seed(1)
    hard = made[0].rsample()
    torch.manual_seed(1)
    p = made[1].rsample().detach()
    assert torch.equal(hard, torch.eye(5, dtype=dtype)[p.argmax(-1)])
    u = torch.randn(50, 5, dtype=dtype)
    (found,) = torch.autograd.grad((hard * u).sum(), logits)
    expected = (p * u - p * (p * u).sum(-1, keepdim=True)) / temperature  # (diag p - p p') u
    assert torch.allclose(found, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.row("0.35")
@pytest.mark.parametrize("kind", ["bits", "classes"])
def test_the_gradient_of_the_mean_is_exact_backwards_and_hard_forwards(kind):
    """sg(hard - soft) + soft with soft the probabilities: (diag p - p p') u, whatever was drawn."""
    logits = torch.randn(50, 5, requires_grad=True)
    torch.manual_seed(1)
    hard = (MeanPathBits if kind == "bits" else MeanPathOneHots)(logits).rsample()
    torch.manual_seed(1)
    assert torch.equal(hard, (Bits if kind == "bits" else OneHots)(logits).sample())
    u = torch.randn(50, 5)
    (found,) = torch.autograd.grad((hard * u).sum(), logits)
    p = (logits.sigmoid() if kind == "bits" else logits.softmax(-1)).detach()
    expected = p * (1 - p) * u if kind == "bits" else p * u - p * (p * u).sum(-1, keepdim=True)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["bits", "two classes"])
def test_the_gradient_of_the_mean_has_the_bias_that_two_states_say(kind):
    alpha = torch.full((COUNT,), ALPHA, requires_grad=True)
    z = MeanPathBits(alpha).rsample()
    if kind == "two classes":
        z = MeanPathOneHots(torch.stack([alpha, torch.zeros(COUNT)], -1)).rsample()[:, 0]
    found = torch.autograd.grad(gain(z).sum(), alpha)[0]
    p = float(expit(ALPHA))
    expected = p * (1 - p) * (p * slope(1) + (1 - p) * slope(0))
    error = float(found.std()) / COUNT**0.5
    assert abs(float(found.mean()) - expected) < 4 * error
    assert abs(EXACT - expected) > 8 * error


@pytest.mark.row("0.31", "4.19")
def test_there_is_no_path_through_a_drawn_one_hot():
    logits, u = torch.randn(3, requires_grad=True), torch.tensor([1.0, -2.0, 3.0])
    assert not OneHots(logits).has_rsample
    assert not OneHots(logits).sample((100,)).requires_grad
    (exact,) = torch.autograd.grad(logits.softmax(0) @ u, logits)
    assert exact.abs().min() > 0.01


def test_straight_through_draws_are_those_of_the_discrete_distribution():
    logits = torch.randn(1000, 6)
    torch.manual_seed(1)
    drawn = OneHots(logits).sample()
    torch.manual_seed(1)
    assert torch.equal(RelaxedOneHots(logits, torch.tensor(0.7), True).rsample(), drawn)


def test_the_divergence_is_the_categorical_one_and_not_that_of_relaxed_densities():
    logits, temperature = torch.tensor([0.5, 0.0, -1.0]), torch.tensor(0.5)
    q, p = RelaxedOneHots(logits, temperature, True), OneHots(torch.zeros(3))
    assert float(kl_divergence(q, p)) == pytest.approx(0.1458, abs=5e-5)
    z = q.sample((COUNT,))
    estimate = q.log_prob(z) - p.log_prob(z)
    assert abs(float(estimate.mean()) - 0.1458) < 5 * float(estimate.std()) / COUNT**0.5
    relaxed_q = dist.RelaxedOneHotCategorical(temperature, logits=logits)
    z = relaxed_q.sample((COUNT,))
    of_densities = relaxed_q.log_prob(z) - dist.RelaxedOneHotCategorical(temperature, logits=torch.zeros(3)).log_prob(z)
    assert abs(float(of_densities.mean()) - 0.443) < 0.02


def test_plates_and_particles_expand_it():
    made = joint(RelaxedOneHots(torch.randn(4, 2, 3), torch.tensor(0.5), False), 2)
    wide = made.expand((5, 4))
    assert wide.rsample().shape == (5, 4, 2, 3)
    assert not torch.equal(wide.rsample()[0], wide.rsample()[1])
    assert kl_divergence(wide, UniformOneHots((2, 3))().expand((5, 4))).shape == (5, 4)


@pytest.mark.row("4.21")
def test_a_soft_embedding_moves_logits_and_vectors_and_hardens_as_it_cools():
    logits, vectors = torch.randn(6, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    for temperature, close in ((1.0, False), (0.001, True)):
        torch.manual_seed(2)
        weights = RelaxedOneHots(logits, torch.tensor(temperature), False).rsample()
        z = weights @ vectors
        nearest = vectors[weights.argmax(-1)]
        assert torch.allclose(z, nearest, atol=1e-3) == close
    torch.manual_seed(2)
    z = RelaxedOneHots(logits, torch.tensor(1.0), False).rsample() @ vectors
    for gradient in torch.autograd.grad(z.square().sum(), (logits, vectors)):
        assert gradient.isfinite().all()
        assert (gradient.abs() > 1e-12).all()


@pytest.mark.parametrize("hard", [False, True])
def test_in_evaluation_mode_it_is_the_discrete_guide(hard):
    core = RelaxedOneHotCategoricals((2, 3), (4,), Linear, hard=hard)
    other = OneHotCategoricals((2, 3), (4,), Linear)
    other.load_state_dict(core.state_dict())  # no temperature in it: that follows from progress
    x = torch.randn(100, 4)
    assert core(x).has_rsample
    core.eval()
    assert not core(x).has_rsample
    assert core(x).has_enumerate_support
    torch.manual_seed(1)
    drawn = core(x).sample()
    torch.manual_seed(1)
    assert torch.equal(other(x).sample(), drawn)
    assert ((drawn == 0) | (drawn == 1)).all()


def test_the_temperature_falls_to_its_minimum():
    core = RelaxedOneHotCategoricals((2, 3), (4,), Linear, temperature=2.0, minimum=0.5, rate=3.0)
    tensor = core.temperature
    for progress, expected in ((0.0, 2.0), (0.2, 2 * 0.5488116361), (0.9, 0.5)):
        core.at(progress)
        assert core.temperature is tensor
        assert float(tensor) == pytest.approx(expected)
        assert core.info() == {"train/temperature": float(tensor)}


def test_the_temperature_falls_along_a_line():
    core = RelaxedOneHotCategoricals((2, 3), (4,), Linear, temperature=2.0, minimum=0.5, rate=2.0, schedule="linear")
    for progress, expected in ((0.0, 2.0), (0.25, 1.25), (0.5, 0.5), (1.0, 0.5)):
        core.at(progress)
        assert float(core.temperature) == pytest.approx(expected)
    with pytest.raises(ValueError, match="schedule must be 'exponential' or 'linear'"):
        RelaxedOneHotCategoricals((2, 3), (4,), Linear, schedule="cosine")


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"minimum": 0.0}, {"minimum": 2.0}, {"rate": -1.0}])
def test_temperatures_that_cannot_be(options):
    with pytest.raises(ValueError, match=r"accepted: a temperature above 0|rate must be 0 or above"):
        RelaxedOneHotCategoricals((2, 3), (4,), Linear, **options)


def test_a_step_never_waits_for_the_device():
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    core = RelaxedOneHotCategoricals((2, 3), (4,), Linear)
    with pyro.validation_enabled(False), FakeTensorMode(allow_non_fake_inputs=True):
        made = core(torch.zeros(5, 4))
        total = made.log_prob(made.rsample()).sum()
        with pytest.raises(DataDependentOutputException):  # as any wait on the way would have been
            total.item()
