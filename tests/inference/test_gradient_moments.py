import numpy as np
import pyro.infer
import pytest
import torch

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference.gradient_moments import blocks_of, draw_gradient, exact_reference, long_run, measure
from inference.objectives import ELBO, IWAE
from inference.studies.estimators import exact_gradient
from inference.studies.testbeds import BitGuide, BitModel, enumerated_elbo, linear_elbo
from models.nets import Linear
from models.ppca import PPCA
from tests import oracles


def linear_pair():
    model = PPCA((5,), 2)
    guide = Amortized(DiagonalNormal((2,), (5,), Linear))
    return model, guide, torch.randn(7, 5)


def bit_pair():
    return BitModel((6,), 3), BitGuide((6,), 3), (torch.rand(4, 6) < 0.4).double()


def test_the_closed_form_of_the_linear_testbed():
    model, guide, x = linear_pair()
    p, q = model.likelihood, guide.core(x)
    known = oracles.LinearModel(p.weight.detach().numpy(), p.loc.detach().numpy(), float(p.scale.detach()))
    expected = [
        float(oracles.ppca_elbo(x[i : i + 1].numpy(), known, q.mean[i : i + 1].detach().numpy(),
                                torch.diag(q.variance[i]).detach().numpy())[0])
        for i in range(7)
    ]  # fmt: skip
    assert np.allclose(linear_elbo(model, guide, x).detach().numpy(), expected, atol=1e-10)


def test_the_enumeration_of_the_bits_testbed():
    model, guide, x = bit_pair()
    states = oracles.binary_table(3)
    q = torch.sigmoid(guide.encoder(x)).detach().numpy()
    p = torch.sigmoid(model.decoder(torch.as_tensor(states, dtype=x.dtype))).detach().numpy()
    for i, datum in enumerate(x.numpy()):
        probabilities = np.prod(np.where(states == 1, q[i], 1 - q[i]), axis=1)
        log_joint = np.log(np.where(datum == 1, p, 1 - p)).sum(1) - 3 * np.log(2)
        expected = (probabilities * (log_joint - np.log(probabilities))).sum()
        assert float(enumerated_elbo(model, guide, x)[i].detach()) == pytest.approx(expected, abs=1e-10)


@pytest.mark.row("5.7")
@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
def test_an_unbiased_estimator_is_found_unbiased_and_its_moments_are_numpys(kl):
    model, guide, x = linear_pair()
    reference = exact_reference(exact_gradient(linear_elbo, model, guide, x))
    found = measure(ELBO(2, kl=kl), model, guide, x, 400, reference.directions)
    for block in ("model", "guide"):
        bias, error = found.bias(block, reference)
        assert 0 < error < 0.2  # so that missing half of the gradient would be seen
        assert abs(bias) < 5 * error
    torch.manual_seed(3)
    found = measure(ELBO(2, kl=kl), model, guide, x, 20, reference.directions)
    torch.manual_seed(3)
    blocks = blocks_of(model, guide)
    draws = [draw_gradient(ELBO(2, kl=kl), model, guide, x, blocks)["guide"].numpy() for _ in range(21)][1:]
    assert np.allclose(found.mean["guide"], np.mean(draws, axis=0), atol=1e-12)
    assert found.total_variance("guide") == pytest.approx(np.var(draws, axis=0, ddof=1).sum(), rel=1e-9)
    signal = np.abs(np.mean(draws, axis=0)) / np.std(draws, axis=0, ddof=1)
    assert found.signal_to_noise("guide") == pytest.approx(signal.mean(), rel=1e-9)


@pytest.mark.row("5.7", "0.31", "4.19")
def test_a_wrong_estimator_is_found_out():
    """Pyro's RenyiELBO gives guides of discrete latents a gradient of exactly zero: all of it is missing."""
    model, guide, x = bit_pair()
    reference = exact_reference(exact_gradient(enumerated_elbo, model, guide, x))
    renyi = pyro.infer.RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    wrong = measure(renyi, model, guide, x, 50, reference.directions)
    assert wrong.bias("guide", reference)[0] == -1.0
    right = measure(ELBO(2, gradient="score"), model, guide, x, 800, reference.directions)
    bias, error = right.bias("guide", reference)
    assert error < 0.19
    assert abs(bias) < 5 * error


def test_a_long_run_stands_for_the_exact_gradient():
    model, guide, x = linear_pair()
    exact = exact_reference(exact_gradient(linear_elbo, model, guide, x))
    run = long_run(ELBO(4), model, guide, x, 1200)
    for block in ("model", "guide"):
        length, error = run.lengths[block]
        assert abs(length - exact.lengths[block][0]) < 5 * error + 0.01 * exact.lengths[block][0]
        assert float(run.directions[block] @ exact.directions[block]) > 0.99


def test_more_particles_keep_more_for_the_backward_pass():
    model, guide, x = linear_pair()
    few, many = (measure(IWAE(k), model, guide, x, 3).saved_bytes for k in (2, 64))
    assert many > 8 * few
