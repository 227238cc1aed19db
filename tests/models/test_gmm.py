"""Gaussian mixtures against scipy, quadrature, scikit-learn and Pyro's enumeration; the tabular VAE against tables."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from scipy.integrate import quad
from scipy.stats import multivariate_normal
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as SklearnMixture

from guides.enumerated import Enumerated, FreeCategorical, SummedOut, amortized, exact, uniform
from inference.em import EMSettings, fit
from models.gmm import COVARIANCES, GaussianMixture, IndependentNormals, _second_by_component, _second_by_pairs
from models.nets import MLP
from models.tabular import TabularVAE
from models.tractable import DegenerateError
from tests import oracles

SKLEARN_WORD = {"diagonal": "diag"}


def three_clouds(size=150):
    rng = np.random.default_rng(0)
    centers = rng.normal(scale=3, size=(3, 3))
    mixing = np.eye(3) + 0.4 * rng.normal(size=(3, 3, 3))
    label = rng.integers(3, size=size)
    return centers[label] + np.einsum("nij,nj->ni", mixing[label], rng.normal(size=(size, 3)))


def random_mixture(covariance="full", size=3, components=3):
    model = GaussianMixture((size,), components, covariance)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
        model.shift.normal_()
    return model


def empty_guide(x):
    return None


@pytest.mark.row("2.2")
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_densities_are_scipys(covariance):
    model, x = random_mixture(covariance), torch.randn(9, 3)
    rows = [
        np.log(weight) + multivariate_normal(mean, matrix).logpdf(x.numpy())
        for weight, mean, matrix in zip(
            model.weights.detach().numpy(), model.loc.detach().numpy(), model.covariances.detach().numpy(), strict=True
        )
    ]
    expected = np.stack(rows, 1)
    assert np.allclose(model.log_joint(x).detach(), expected, atol=1e-9)
    evidence = np.logaddexp.reduce(expected, axis=1)
    assert np.allclose(model.log_evidence(x).detach(), evidence, atol=1e-9)
    assert np.allclose(model.posterior(x).probs.detach(), np.exp(expected - evidence[:, None]), atol=1e-9)


@pytest.mark.row("2.2")
def test_a_mixture_in_one_dimension_integrates_to_one():
    model = random_mixture(size=1)
    with torch.no_grad():
        total, _ = quad(lambda v: float(model.log_evidence(torch.tensor([[v]])).exp()), -20, 20, epsabs=1e-10)
    assert total == pytest.approx(1, abs=1e-8)


@pytest.mark.row("0.22", "3.13")
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_em_is_scikit_learns_iterate_by_iterate(covariance):
    x = three_clouds()
    size, dimension = x.shape
    start, spread = x[:3], np.full(3, 4.0)
    precisions = {
        "full": np.stack([np.eye(3) / 4] * 3),
        "tied": np.eye(3) / 4,
        "diagonal": np.full((3, 3), 1 / 4),
        "spherical": 1 / spread,
    }[covariance]
    for iterations in range(1, 11):
        theirs = SklearnMixture(
            3,
            covariance_type=SKLEARN_WORD.get(covariance, covariance),
            weights_init=np.full(3, 1 / 3),
            means_init=start,
            precisions_init=precisions,
            reg_covar=0,
            tol=0,
            max_iter=iterations,
            init_params="random",
            random_state=0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            theirs.fit(x)
        model = GaussianMixture((dimension,), 3, covariance)
        with torch.no_grad():
            model.loc.copy_(torch.tensor(start))
            model.log_scale.fill_(np.log(2))
        result = fit(model, torch.tensor(x), EMSettings(iterations=iterations, restarts=0, tolerance=0))
        bounds = [step.log_evidence for step in result.history if step.kind == "E"]
        assert size * bounds[-1] == pytest.approx(size * theirs.lower_bound_, abs=1e-8 * size)
        full = theirs.covariances_
        if covariance == "tied":
            full = np.stack([full] * 3)
        elif covariance == "diagonal":
            full = np.stack([np.diag(row) for row in full])
        elif covariance == "spherical":
            full = np.stack([value * np.eye(3) for value in full])
        assert np.allclose(model.weights.detach(), theirs.weights_, atol=1e-9)
        assert np.allclose(model.loc.detach(), theirs.means_, atol=1e-8)
        assert np.allclose(model.covariances.detach(), full, atol=1e-8)
    assert len(set(np.round(bounds, 6))) > 5, "EM stood still, so that the comparison says nothing"


@pytest.mark.row("2.9", "5.2", "3.13")
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_enumeration_by_guide_or_by_model_is_the_evidence(covariance):
    model, x = random_mixture(covariance), torch.randn(7, 3)
    evidence = float(model.log_evidence(x).sum().detach())
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    assert -elbo.loss(model, exact(model), x) == pytest.approx(evidence, abs=1e-8)
    assert -elbo.loss(config_enumerate(model, "parallel"), empty_guide, x) == pytest.approx(evidence, abs=1e-8)
    assert -elbo.loss(config_enumerate(model, "parallel"), SummedOut(model), x) == pytest.approx(evidence, abs=1e-8)
    for guide in (uniform(model, (3,)), amortized(model, (3,), MLP)):
        q = guide.core(x).probs.detach().numpy()
        gap = oracles.discrete_kl(q, model.posterior(x).probs.detach().numpy()).sum()
        assert gap > 0.1
        assert -elbo.loss(model, guide, x) == pytest.approx(evidence - gap, abs=1e-8)


@pytest.mark.row("3.13")
def test_the_gradient_under_the_exact_posterior_is_that_of_the_evidence():
    model, x = random_mixture(), torch.randn(7, 3)
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, exact(model), x)
    through_guide = torch.autograd.grad(loss, list(model.parameters()))
    direct = torch.autograd.grad(-model.log_evidence(x).sum(), list(model.parameters()))
    for one, other in zip(through_guide, direct, strict=True):
        assert torch.allclose(one, other, atol=1e-8)


@pytest.mark.parametrize("make", [exact, lambda model: uniform(model, (3,)), SummedOut])
def test_in_evaluation_mode_a_guide_draws_states(make):
    model, x = random_mixture(), torch.randn(2000, 3)
    guide = make(model).eval()
    trace = poutine.trace(guide).get_trace(x)
    site = trace.nodes["z"]
    assert site["value"].shape == (2000,)
    assert not site["infer"].get("enumerate")
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(x)
    assert torch.allclose(
        replayed.nodes["x"]["fn"].log_prob(x) + model.weights.log()[site["value"]],
        model.log_joint(x).gather(1, site["value"][:, None])[:, 0],
    )


def test_images_take_diagonal_covariances_only():
    model = GaussianMixture((1, 2, 3), 2, "diagonal")
    x = torch.randn(5, 1, 2, 3)
    assert model.component(torch.tensor([0, 1])).event_shape == (1, 2, 3)
    assert -TraceEnum_ELBO(max_plate_nesting=1).loss(model, exact(model), x) == pytest.approx(
        float(model.log_evidence(x).sum().detach())
    )
    with pytest.raises(ValueError, match="diagonal or spherical"):
        GaussianMixture((1, 2, 3), 2, "full")


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_ridge_is_the_maximum_of_the_penalized_likelihood(covariance):
    model, x = GaussianMixture((3,), 2, covariance, ridge=3.0), torch.tensor(three_clouds(40))
    result = fit(model, x, EMSettings(tolerance=0, iterations=2000))
    assert result.converged
    penalized = model.log_evidence(x).sum() + model.log_prior()
    assert float(penalized.detach()) / 40 == pytest.approx(result.free_energy, abs=1e-8)
    for gradient in torch.autograd.grad(penalized, list(model.parameters())):
        assert gradient.abs().max() < 1e-3
    one_point = GaussianMixture((3,), 1, covariance, ridge=3.0)
    fit(one_point, torch.ones(1, 3))
    assert torch.allclose(one_point.covariances[0], 3 * torch.eye(3))


@pytest.mark.parametrize("options", [{"covariance": "round"}, {"components": 0}, {"ridge": -1.0}, {"ridge": np.nan}])
def test_bad_options_get_one_message(options):
    with pytest.raises(ValueError):
        GaussianMixture((2,), **options)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.ones(1, 2), "constant"),
        (torch.ones(9, 2), "constant"),
        (torch.stack([torch.arange(9.0), torch.ones(9)], 1), r"columns \[1\]"),
        (torch.tensor([[0.0, 1.0], [2.0, 5.0]]), "2 distinct rows"),
        (torch.tensor([[0.0, 1.0], [2.0, 5.0]]).repeat(9, 1), "2 distinct rows"),
    ],
)
def test_data_without_a_likeliest_start_get_one_message(x, says):
    with pytest.raises(DegenerateError, match=says):
        GaussianMixture((2,), 3).initialize(x.double())


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("at", [0.0, 1e4])
def test_a_component_on_one_point_is_singular(covariance, at):
    model = GaussianMixture((2,), 2, covariance)
    x = torch.full((5, 2), at)
    q = torch.full((5, 2), 0.5)
    with pytest.raises(DegenerateError, match=r"singular covariance.*ridge"):
        model.m_step(model.statistics(x, q))


def test_an_empty_component_is_named():
    model, x = GaussianMixture((2,), 2), torch.randn(9, 2)
    q = torch.tensor([[1.0, 0.0]]).expand(9, 2)
    with pytest.raises(DegenerateError, match="component 1 of 2 is empty"):
        model.m_step(model.statistics(x, q))


@pytest.mark.row("0.29", "5.2")
def test_the_tabular_vae_is_its_table():
    table = oracles.tiny_discrete_vae()
    model = TabularVAE((6,), 8)
    with torch.no_grad():
        model.logits.copy_(torch.tensor(table.prior).log())
        model.pixel_logits.copy_(torch.tensor(table.pixel_logits))
    x = torch.tensor(table.data())
    assert np.allclose(model.log_evidence(x).detach(), table.log_evidence(table.data()), atol=1e-9)
    assert np.allclose(model.posterior(x).probs.detach(), table.posterior(table.data()), atol=1e-9)
    assert float(model.log_evidence(x).logsumexp(0).detach()) == pytest.approx(0, abs=1e-9)
    q = oracles.random_tables(len(x), 8)
    guide = Enumerated(FreeCategorical(len(x), 8))
    with torch.no_grad():
        guide.core.logits.copy_(torch.tensor(q).log())
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    assert -elbo.loss(model, guide, x) == pytest.approx(table.elbo(table.data(), q).sum(), abs=1e-8)
    assert -elbo.loss(model, exact(model), x) == pytest.approx(table.log_evidence(table.data()).sum(), abs=1e-8)


def test_programs_put_nothing_into_the_global_store():
    model = random_mixture()
    poutine.trace(model).get_trace(torch.randn(2, 3))
    assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_moments_are_the_same_by_pairs_and_by_component(dtype):
    x, q = torch.randn(40, 7, dtype=dtype), torch.rand(40, 3, dtype=dtype)
    expected = torch.einsum("nk,ni,nj->kij", q.double(), x.double(), x.double())
    row, column = np.tril_indices(7)
    for second in (_second_by_pairs(x, q), _second_by_component(x, q)):
        assert torch.allclose(second.double(), expected[:, row, column], atol=1e-4 if dtype == torch.float32 else 1e-10)


def test_normals_that_sum_squares_first_are_normals():
    loc, scale, x = torch.randn(5, 1, 3, 2), torch.rand(5, 1, 3, 2) + 0.1, torch.randn(7, 3, 2)
    plain, ours = dist.Normal(loc, scale).to_event(2), IndependentNormals(dist.Normal(loc, scale), 2)
    assert torch.allclose(ours.log_prob(x), plain.log_prob(x), atol=1e-12)  # (5, 7)
    wide = ours.expand((5, 7))
    assert isinstance(wide, IndependentNormals)
    assert torch.allclose(wide.log_prob(x), plain.log_prob(x), atol=1e-12)
    with pytest.raises(ValueError):
        ours.log_prob(x * torch.nan)
