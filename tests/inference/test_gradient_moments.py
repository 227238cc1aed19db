import numpy as np
import pyro.infer
import pytest
import torch

from inference.gradient_moments import (
    Moments,
    Reference,
    blocks_of,
    draw_gradient,
    exact_reference,
    long_run,
    measure,
    squared_distance,
    squared_length,
)
from inference.objectives import ELBO, IWAE
from inference.studies.estimators import exact_gradient
from inference.studies.testbeds import bits_testbed, linear_testbed
from tests import oracles


def linear():
    return linear_testbed(torch.randn(7, 5), 2)


def bits(steps=0):
    return bits_testbed((torch.rand(8, 6) < 0.4).double(), steps, 4, bits=3)


def reference(testbed, target="ELBO"):
    return exact_reference(exact_gradient(testbed.exact[target], testbed))


def test_the_closed_form_of_the_linear_testbed():
    testbed = linear()
    p, q, x = testbed.model.likelihood, testbed.guide.core(testbed.x), testbed.x
    known = oracles.LinearModel(p.weight.detach().numpy(), p.loc.detach().numpy(), float(p.scale.detach()))
    expected = [
        float(oracles.ppca_elbo(x[i : i + 1].numpy(), known, q.mean[i : i + 1].detach().numpy(),
                                torch.diag(q.variance[i]).detach().numpy())[0])
        for i in range(7)
    ]  # fmt: skip
    assert np.allclose(testbed.exact["ELBO"]().detach().numpy(), expected, atol=1e-10)


def test_the_enumeration_of_the_bits_testbed():
    testbed = bits()
    states = oracles.binary_table(3)
    q = torch.sigmoid(testbed.guide.core.net(testbed.x)).detach().numpy()
    p = testbed.model.likelihood(torch.as_tensor(states, dtype=torch.float64)).mean.detach().numpy()
    for i, datum in enumerate(testbed.x.numpy()):
        probabilities = np.prod(np.where(states == 1, q[i], 1 - q[i]), axis=1)
        log_joint = np.log(np.where(datum == 1, p, 1 - p)).sum(1) - 3 * np.log(2)
        expected = (probabilities * (log_joint - np.log(probabilities))).sum()
        assert float(testbed.exact["ELBO"]()[i].detach()) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("make", [linear, bits])
def test_tempered_sums_lie_between_the_bound_and_the_evidence_and_agree_with_many_draws(make):
    """The left sum is at most log p(x) and at least the ELBO; normalized weights of many draws come close to it."""
    from inference.particles import particles
    from inference.thermodynamic import TVO

    testbed = make()
    exact, elbo = testbed.exact["TVO"]().detach(), testbed.exact["ELBO"]().detach()
    with torch.no_grad():
        draws = particles(testbed.model, testbed.guide, testbed.x, 20_000)
    evidence = draws.log_weight.logsumexp(0) - np.log(20_000)
    close = TVO(20_000).combine(draws.log_weight)
    assert (exact > elbo).all()
    assert (exact < evidence + 0.02).all()
    assert torch.allclose(close, exact, atol=0.25 * float((evidence - elbo).min()))
    assert not torch.allclose(elbo, exact, atol=float((evidence - elbo).min()) * 0.25)


@pytest.mark.parametrize("make", [linear, bits])
def test_the_wake_target_is_the_mean_of_log_q_under_the_posterior_and_pulls_the_guide_alone(make):
    testbed = make()
    exact = testbed.exact["wake"]().detach()
    if make is linear:
        z = testbed.model.posterior(testbed.x).sample((20_000,))
        log_q = testbed.guide.core(testbed.x).log_prob(z).detach()
        found, error = log_q.mean(0), log_q.std(0) / 20_000**0.5
    else:
        q = testbed.guide.core(testbed.x)
        states = torch.as_tensor(oracles.binary_table(3), dtype=torch.float64).unsqueeze(1)
        posterior = testbed.model.likelihood(states).log_prob(testbed.x).softmax(0)
        found, error = (posterior * q.log_prob(states)).sum(0).detach(), 1e-12
    assert ((found - exact).abs() < 5 * error).all()
    own = testbed.guide.core(testbed.x).sample((2000,))
    assert ((testbed.guide.core(testbed.x).log_prob(own).mean(0) - exact).abs() > 5 * error).any()
    gradient = exact_gradient(testbed.exact["wake"], testbed)
    assert not gradient["model"].any()
    assert gradient["guide"].any()


def test_all_guides_of_the_bits_have_the_same_parameters():
    testbed = bits()
    own = [id(p) for p in testbed.guide.parameters()]
    for guide in testbed.guides.values():
        assert [id(p) for p in guide.parameters()] == own


def test_bits_are_trained_along_the_exact_gradient():
    torch.manual_seed(0)
    start = bits()
    torch.manual_seed(0)
    end = bits(steps=50)
    assert torch.equal(start.x, end.x)
    assert end.exact["ELBO"]().mean().detach() > start.exact["ELBO"]().mean().detach() + 0.1


# --- Moments -----------------------------------------------------------------------------------------------------


@pytest.mark.row("5.7")
@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
def test_an_unbiased_estimator_is_found_unbiased_and_its_moments_are_numpys(kl):
    testbed = linear()
    model, guide, x = testbed.model, testbed.guide, testbed.x
    found = measure(ELBO(2, kl=kl), model, guide, x, 400)
    for block in ("model", "guide"):
        bias, error = found.bias_along(block, reference(testbed))
        assert 0 < error < 0.2  # so that missing half of the gradient would be seen
        assert abs(bias) < 5 * error
        squared, error = found.squared_bias(block, reference(testbed))
        assert 0 < error < 0.04
        assert abs(squared) < 5 * error
    torch.manual_seed(3)
    found = measure(ELBO(2, kl=kl), model, guide, x, 20, batches=10)
    torch.manual_seed(3)
    blocks = blocks_of(model, guide)
    draws = [draw_gradient(ELBO(2, kl=kl), model, guide, x, blocks)["guide"].numpy() for _ in range(21)][1:]
    assert np.allclose(found.mean("guide"), np.mean(draws, axis=0), atol=1e-12)
    assert np.allclose(found.batches["guide"], np.reshape(draws, (10, 2, -1)).mean(1), atol=1e-12)
    assert found.total_variance("guide") == pytest.approx(np.var(draws, axis=0, ddof=1).sum(), rel=1e-9)


@pytest.mark.row("5.7", "0.31", "4.19")
def test_a_wrong_estimator_is_found_out():
    """Pyro's RenyiELBO gives guides of discrete latents a gradient of exactly zero: all of it is missing."""
    testbed = bits()
    renyi = pyro.infer.RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    wrong = measure(renyi, testbed.model, testbed.guide, testbed.x, 50)
    assert wrong.bias_along("guide", reference(testbed))[0] == -1.0
    assert wrong.squared_bias("guide", reference(testbed))[0] == pytest.approx(1.0, abs=1e-12)
    assert wrong.signal_to_noise("guide") is None
    right = measure(ELBO(4, gradient="loo"), testbed.model, testbed.guide, testbed.x, 600)
    for value, error in (f("guide", reference(testbed)) for f in (right.bias_along, right.squared_bias)):
        assert error < 0.19
        assert abs(value) < 5 * error


def test_a_bias_across_the_gradient_is_seen_by_the_square_alone():
    """An error at right angles to the gradient, as large as it is: along it there is nothing to see."""
    truth = {"guide": torch.tensor([3.0, 0.0, 0.0])}
    draws = torch.tensor([3.0, 0.0, 3.0]) + torch.randn(20, 3)
    moments = Moments({"guide": draws}, {"guide": torch.ones(3)}, 20, 1.0, 1)
    along, error = moments.bias_along("guide", exact_reference(truth))
    assert abs(along) < 5 * error < 1
    squared, error = moments.squared_bias("guide", exact_reference(truth))
    assert abs(squared - 1) < 5 * error < 1


def test_squared_lengths_and_distances_have_no_bias_and_errors_that_cover_it():
    """Over repetitions: the mean is the truth, the plain square is not, and the spread is no more than is said."""
    truth, other = torch.zeros(30), torch.full((30,), 0.1)
    lengths, distances, plain = [], [], []
    for _ in range(300):
        first, second = truth + torch.randn(20, 30), other + torch.randn(10, 30)
        lengths.append(squared_length(second))
        distances.append(squared_distance(first, second))
        plain.append(float((first.mean(0) - second.mean(0)).square().sum()))
    for found in (lengths, distances):
        values, errors = np.array(found).T
        spread = values.std(ddof=1)
        assert abs(values.mean() - 0.3) < 5 * spread / 300**0.5
        assert 0.8 * spread < np.sqrt(np.mean(errors**2)) < 2.5 * spread
    assert np.mean(plain) > 3
    exact = squared_distance(torch.randn(20, 30) * 1e-9 + other, truth.unsqueeze(0))
    assert exact[0] == pytest.approx(0.3)


def test_signal_to_noise_is_that_of_the_moments_and_none_where_it_is_noise():
    mean, scale = torch.tensor([3.0, -1.0, 0.0]), torch.tensor([2.0, 1.0, 0.0])
    batches = mean + scale * torch.randn(20, 3) / 2000**0.5  # means of 2000 draws each
    moments = Moments({"guide": batches}, {"guide": scale.square()}, 40_000, 1.0, 1)
    assert moments.signal_to_noise("guide") == pytest.approx((10 / 5) ** 0.5, rel=0.02)
    noise = Moments({"guide": torch.randn(20, 3)}, {"guide": torch.full((3,), 5.0)}, 100, 1.0, 1)
    assert noise.signal_to_noise("guide") is None


def test_a_long_run_stands_for_the_exact_gradient():
    testbed = linear()
    exact = reference(testbed)
    run = long_run(ELBO(4), testbed.model, testbed.guide, testbed.x, 1200)
    for block in ("model", "guide"):
        distance, error = squared_distance(run.rows[block], exact.rows[block])
        length = exact.squared_length(block)
        assert abs(distance) < 5 * error < 0.2 * length
        assert run.squared_length(block) == pytest.approx(length, rel=0.2)
        assert exact.origin[block] == "exact"
    lost = Reference({"guide": torch.randn(20, 5)}, {"guide": "noise"})
    assert lost.squared_length("guide") is None
    assert Moments({"guide": torch.randn(20, 5)}, {}, 20, 1.0, 1).squared_bias("guide", lost) is None


def test_more_particles_keep_more_for_the_backward_pass():
    testbed = linear()
    few, many = (measure(IWAE(k), testbed.model, testbed.guide, testbed.x, 3).saved_bytes for k in (2, 64))
    assert many > 8 * few


def test_of_a_batch_that_is_a_part_of_all_data_the_batch_alone_is_counted():
    testbed = linear()
    many = torch.cat([testbed.x, torch.randn(20_000, *testbed.x.shape[1:])])
    alone, part = (
        measure(IWAE(2), testbed.model, testbed.guide, x, 3).saved_bytes for x in (testbed.x, many[: len(testbed.x)])
    )
    assert alone == part > 0
