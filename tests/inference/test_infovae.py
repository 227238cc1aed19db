"""Maximum mean discrepancies against their closed form, and what InfoVAE makes of them."""

import math

import numpy as np
import pytest
import torch

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference.diagnostics import surgery
from inference.infovae import InfoVAE, imq, mmd2, rbf
from inference.objectives import ELBO
from inference.particles import StructureError, particles
from models import likelihoods
from models.latent import LatentVariableModel
from models.nets import MLP
from models.priors import StandardNormal
from tests.programs import HierarchicalGuide, HierarchicalModel


def gaussian_kernel_mean(loc, variance, bandwidth):
    """E exp(-(a - b)^2 / 2h^2) for a - b ~ N(loc, diag variance)."""
    total = bandwidth**2 + variance
    return float(np.prod(np.sqrt(bandwidth**2 / total) * np.exp(-(loc**2) / (2 * total))))


def closed_form_mmd2(loc, scale, bandwidth):
    """MMD^2 of N(loc, diag scale^2) and N(0, I) under the Gaussian kernel."""
    same = gaussian_kernel_mean(0 * loc, 2 * scale**2, bandwidth)
    prior = gaussian_kernel_mean(0 * loc, 2 + 0 * scale, bandwidth)
    return same + prior - 2 * gaussian_kernel_mean(loc, scale**2 + 1, bandwidth)


@pytest.mark.row("0.15")
@pytest.mark.parametrize("bandwidth", [0.5, 1.5])
def test_the_estimator_has_the_mean_of_the_closed_form(bandwidth):
    loc, scale = np.array([0.4, -0.2]), np.array([0.7, 1.3])
    first = torch.tensor(loc) + torch.tensor(scale) * torch.randn(4000, 8, 2)
    found = mmd2(first, torch.randn(4000, 6, 2), rbf, bandwidth)
    expected = closed_form_mmd2(loc, scale, bandwidth)
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean()) - expected) < 4 * error
    # the biased estimate, which counts each draw against itself, would be told apart
    diagonal = (1 - gaussian_kernel_mean(0 * loc, 2 * scale**2, bandwidth)) / 8
    assert diagonal > 8 * error


def test_equal_laws_have_none_on_average_and_a_negative_estimate_is_none():
    found = mmd2(torch.randn(4000, 10, 3), torch.randn(4000, 10, 3))
    assert abs(float(found.mean())) < 4 * float(found.std()) / math.sqrt(4000)
    assert (found < 0).any()


@pytest.mark.parametrize("kernel", [rbf, imq])
def test_the_double_sum_by_hand(kernel):
    a, b = torch.randn(4, 3), torch.randn(5, 3)

    def k(x, y):
        distance = float((x - y).square().sum())
        return math.exp(-distance / (2 * 1.3**2)) if kernel is rbf else 2 * 1.3**2 / (2 * 1.3**2 + distance)

    within_a = sum(k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / 12
    within_b = sum(k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j) / 20
    across = sum(k(x, y) for x in a for y in b) / 20
    assert float(mmd2(a, b, kernel, 1.3)) == pytest.approx(within_a + within_b - 2 * across, abs=1e-12)


def composed(hidden=(8,), latent_dim=2):
    net = lambda i, o: MLP(i, o, hidden)  # noqa: E731
    model = LatentVariableModel(StandardNormal((latent_dim,)), likelihoods.FixedGaussian((3,), (latent_dim,), net, 0.5))
    return model, Amortized(DiagonalNormal((latent_dim,), (3,), net))


@pytest.mark.row("0.15")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
def test_the_bound_is_the_elbo_with_other_weights_and_the_discrepancy(kl, count):
    (model, guide), x = composed(), torch.randn(7, 3)
    objective = InfoVAE(alpha=0.4, scale=5.0, bandwidth=0.8, particles=count, kl=kl)
    torch.manual_seed(0)
    bound = objective.bound(model, guide, x)
    torch.manual_seed(0)
    draws = particles(model, guide, x, count)
    divergence = draws.analytic_kl() if kl == "analytic" else draws.log_q - draws.log_prior
    z = draws.latents["z"].value.reshape(count, 7, 2)
    prior = torch.randn(draws.latents["z"].value.shape).reshape(count, 7, 2)
    discrepancy = torch.stack([mmd2(z[k], prior[k], rbf, 0.8) for k in range(count)]).mean()
    expected = (draws.log_likelihood - 0.6 * divergence).mean(0) - 4.4 * discrepancy
    torch.testing.assert_close(bound, expected)


def test_without_weights_it_is_the_elbo():
    (model, guide), x = composed(), torch.randn(7, 3)
    torch.manual_seed(0)
    found = InfoVAE(alpha=0.0, scale=1.0, gradient="stl").bound(model, guide, x)
    torch.manual_seed(0)
    torch.testing.assert_close(found, ELBO(gradient="stl").bound(model, guide, x))


def test_what_it_cannot_compare_is_refused():
    (model, guide), x = composed(), torch.randn(7, 3)
    with pytest.raises(StructureError, match="at least 2 data"):
        InfoVAE().bound(model, guide, x[:1])
    with pytest.raises(StructureError, match=r"one latent site.*\['top', 'bottom'\]"):
        InfoVAE().bound(HierarchicalModel(), HierarchicalGuide(), torch.randn(4, 5))
    with pytest.raises(StructureError, match="depends on the draws of the whole batch"):
        InfoVAE(gradient="score").bound(model, guide, x)
    with pytest.raises(ValueError, match="kernel must be one of rbf, imq"):
        InfoVAE(kernel="laplace")
    with pytest.raises(ValueError, match="bandwidth must be 0 or above"):
        InfoVAE(bandwidth=-1.0)


def trained(scale, alpha, x, steps=120):
    torch.manual_seed(0)
    model, guide = composed((16,))
    objective = InfoVAE(alpha, scale, kl="analytic")
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (-objective.bound(model, guide, x).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        z = particles(model, guide, x, 20).latents["z"].value
        return float(mmd2(z, torch.randn_like(z), rbf, 2**0.5).mean()), surgery(model, guide, x).mutual_information


@pytest.mark.row("0.15")
def test_a_larger_weight_lowers_the_discrepancy_and_keeps_the_information():
    """Four clusters: freed from its KL the guide wanders off, and the discrepancy calls it back, not the clusters."""
    corners = torch.tensor([[2.0, 0, 1], [-2, 0, 1], [0, 2, -1], [0, -2, -1]])
    x = corners.repeat(20, 1) + 0.3 * torch.randn(80, 3)
    discrepancy, information = zip(*(trained(scale, 0.9, x) for scale in (0.1, 30.0)), strict=True)
    _, plain_information = trained(1.0, 0.0, x)
    assert discrepancy[1] < 0.5 * discrepancy[0]
    assert information[1] > plain_information - 0.05
