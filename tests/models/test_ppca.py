"""Probabilistic PCA against block conditioning, scipy and scikit-learn."""

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from sklearn.datasets import load_iris
from sklearn.decomposition import PCA

from guides.amortized import Amortized
from guides.exact import ExactPosterior
from inference.em import EMError, EMSettings, fit
from models.likelihoods import optimal_scale
from models.ppca import PPCA, maximum_likelihood
from models.tractable import DegenerateError
from tests import oracles
from tests.pairs import as_oracle


def random_model(event_shape=(2, 3), latent_dim=2):
    model = PPCA(event_shape, latent_dim)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
        model.likelihood.log_scale.fill_(-0.4)
    return model


def iris():
    return torch.tensor(load_iris().data).double()


@pytest.mark.row("0.1")
@pytest.mark.parametrize("latent_dim", [1, 2, 6, 9])
def test_evidence_is_the_marginal_gaussian(latent_dim):
    model, x = random_model(latent_dim=latent_dim), torch.randn(7, 2, 3)
    expected = oracles.ppca_log_evidence(x.flatten(1).numpy(), as_oracle(model))
    assert np.allclose(model.log_evidence(x).detach(), expected, atol=1e-9)
    assert np.allclose(model.covariance().detach(), oracles.ppca_covariance(as_oracle(model)), atol=1e-12)


@pytest.mark.row("0.5", "1.8", "2.12", "4.2")
@pytest.mark.parametrize("latent_dim", [1, 2, 6, 9])
def test_posterior_is_gaussian_conditioning(latent_dim):
    model, x = random_model(latent_dim=latent_dim), torch.randn(7, 2, 3)
    loc, covariance = oracles.ppca_posterior(x.flatten(1).numpy(), as_oracle(model))
    posterior = model.posterior(x)
    assert posterior.batch_shape == (7,)
    assert np.allclose(posterior.loc.detach(), loc, atol=1e-9)
    assert np.allclose(posterior.covariance_matrix.detach(), covariance, atol=1e-9)
    # Tipping and Bishop write the precision as M / sigma^2.
    m = model.likelihood.weight.T @ model.likelihood.weight + model.likelihood.scale**2 * torch.eye(latent_dim)
    assert torch.allclose(posterior.precision_matrix, m / model.likelihood.scale**2, atol=1e-8)


@pytest.mark.row("0.3", "0.5", "1.5", "4.2")
def test_the_bound_is_tight_at_the_posterior_and_nowhere_else():
    model, x = random_model(), torch.randn(7, 2, 3)
    rows, oracle = x.flatten(1).numpy(), as_oracle(model)
    posterior, log_evidence = model.posterior(x), model.log_evidence(x).detach().numpy()
    loc, covariance = posterior.loc.detach().numpy(), posterior.covariance_matrix[0].detach().numpy()
    assert np.allclose(oracles.ppca_elbo(rows, oracle, loc, covariance), log_evidence, atol=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(20):
        root = rng.normal(size=(2, 2))
        other_loc, other = loc + rng.normal(size=loc.shape), root @ root.T + 0.1 * np.eye(2)
        gap = [oracles.gaussian_kl(m, other, n, covariance) for m, n in zip(other_loc, loc, strict=True)]
        assert np.allclose(oracles.ppca_elbo(rows, oracle, other_loc, other), log_evidence - gap, atol=1e-9)
        assert min(gap) > 1e-3


@pytest.mark.row("0.5", "4.2")
def test_the_program_scores_joint_probabilities_of_bayes_theorem():
    model, x = random_model(), torch.randn(7, 2, 3)
    guide = Amortized(ExactPosterior(model))
    q = poutine.trace(guide).get_trace(x)
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(x)
    q.compute_log_prob()
    p.compute_log_prob()
    ratio = p.nodes["z"]["log_prob"] + p.nodes["x"]["log_prob"] - q.nodes["z"]["log_prob"]
    assert torch.allclose(ratio, model.log_evidence(x), atol=1e-9)  # the weight has no variance left


def test_the_exact_guide_owns_no_parameters_and_passes_no_gradient():
    model, x = random_model(), torch.randn(7, 2, 3)
    guide = Amortized(ExactPosterior(model))
    assert list(guide.parameters()) == []
    assert guide.core.event_shape == (2,)
    assert guide.core.context_shape == (2, 3)
    assert not guide(x).requires_grad
    before = guide.core(x).mean
    with torch.no_grad():
        model.likelihood.net.output.bias.add_(1)
    assert not torch.allclose(guide.core(x).mean, before)  # it follows the model


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_maximum_likelihood_is_the_closed_form_and_scikit_learns(latent_dim):
    model, x = PPCA((4,), latent_dim), iris()
    expected, log_likelihood = oracles.ppca_maximum(x.numpy(), latent_dim)
    before = model.log_evidence(x).mean().item()
    solution = model.maximum_likelihood(x)
    assert before < log_likelihood - 1
    assert model.log_evidence(x).mean().item() == pytest.approx(log_likelihood, abs=1e-9)
    assert np.allclose(model.covariance().detach(), oracles.ppca_covariance(expected), atol=1e-9)
    assert solution.scale.item() == pytest.approx(expected.scale, abs=1e-9)
    pca = PCA(latent_dim).fit(x.numpy())
    # scikit-learn divides by N - 1; everything else agrees.
    assert np.allclose(model.covariance().detach() * 150 / 149, pca.get_covariance(), atol=1e-9)
    assert not np.allclose(model.covariance().detach(), pca.get_covariance(), rtol=1e-3)


def test_maximum_likelihood_with_fewer_data_than_dimensions():
    x = torch.randn(5, 9)
    expected, log_likelihood = oracles.ppca_maximum(x.numpy(), 2)
    model = PPCA((9,), 2)
    model.maximum_likelihood(x)
    assert model.log_evidence(x).mean().item() == pytest.approx(log_likelihood, abs=1e-9)
    assert model.likelihood.scale.item() == pytest.approx(expected.scale, abs=1e-9)


def test_maximum_likelihood_is_a_maximum():
    model, x = PPCA((4,), 2), iris()
    model.maximum_likelihood(x)
    best = model.log_evidence(x).mean()
    best.backward()
    assert all(parameter.grad.abs().max() < 1e-9 for parameter in model.parameters())
    for _ in range(50):
        other = PPCA((4,), 2)
        with torch.no_grad():
            for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs + 0.05 * torch.randn_like(theirs))
        assert other.log_evidence(x).mean() < best


@pytest.mark.parametrize("latent_dim", [4, 5])
def test_no_noise_left_is_refused(latent_dim):
    with pytest.raises(ValueError, match=f"latent_dim must be below the rank .* got latent_dim {latent_dim}"):
        maximum_likelihood(torch.randn(20, 4), latent_dim)
    with pytest.raises(ValueError, match="latent_dim must be below the rank"):
        maximum_likelihood(torch.randn(20, 1) * torch.randn(1, 4), 1)


@pytest.mark.row("3.18")
def test_optimal_scale_of_the_linear_model_is_the_root_mean_discarded_eigenvalue():
    model, x = PPCA((4,), 2), iris()
    model.maximum_likelihood(x)
    discarded = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[:2]
    posterior = model.posterior(x)
    # Four points with the posterior's mean and covariance: expectations of quadratics are exact sums over them.
    root = np.sqrt(2) * posterior.scale_tril.mT
    points = posterior.loc + torch.cat([root, -root], dim=1).transpose(0, 1)
    reconstruction = model.likelihood(points).mean
    assert optimal_scale(x, reconstruction).item() == pytest.approx(np.sqrt(discarded.mean()), rel=1e-9)
    assert optimal_scale(x, model.likelihood(posterior.loc).mean).item() < 0.8 * np.sqrt(discarded.mean())


@pytest.mark.row("3.18")
def test_a_learned_scale_reaches_the_root_mean_discarded_eigenvalue():
    model, x = PPCA((4,), 2), iris()
    discarded = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[:2]
    assert model.likelihood.scale.item() > 2 * np.sqrt(discarded.mean())
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -model.log_evidence(x).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert model.likelihood.scale.item() == pytest.approx(np.sqrt(discarded.mean()), rel=1e-3)
    assert model.log_evidence(x).mean().item() == pytest.approx(oracles.ppca_maximum(x.numpy(), 2)[1], abs=1e-5)


@pytest.mark.row("0.12", "1.1")
def test_generated_data_have_the_models_covariance():
    model, count = random_model(), 20_000
    with torch.no_grad():
        trace = poutine.trace(poutine.uncondition(model)).get_trace(torch.zeros(count, 2, 3))
    x = trace.nodes["x"]["value"].flatten(1)
    oracle = as_oracle(model)
    centred = x.numpy() - oracle.loc
    products = centred[:, :, None] * centred[:, None, :]
    standard_error = products.std(0) / np.sqrt(count)
    signal_only = oracle.weight @ oracle.weight.T
    assert (np.abs(products.mean(0) - signal_only) > 4 * standard_error).any()  # forgetting the noise shows
    assert (np.abs(products.mean(0) - oracles.ppca_covariance(oracle)) < 4 * standard_error).all()
    assert (np.abs(centred.mean(0)) < 4 * centred.std(0) / np.sqrt(count)).all()


@pytest.mark.row("1.1")
def test_the_prior_predictive_is_forward_simulation():
    model = random_model()
    with torch.no_grad():
        pyro.set_rng_seed(1)
        trace = poutine.trace(poutine.uncondition(model)).get_trace(torch.zeros(5, 2, 3))
        pyro.set_rng_seed(1)
        z = torch.randn(5, 2)
        p = model.likelihood
        x = (z @ p.weight.T + p.loc).view(5, 2, 3) + p.scale * torch.randn(5, 2, 3)
    assert torch.allclose(trace.nodes["z"]["value"], z)
    assert torch.allclose(trace.nodes["x"]["value"], x)


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_an_iteration_of_em_is_that_of_tipping_and_bishop(latent_dim):
    """Their equations 27 and 28 take mu for the sample mean, where the general M step stays once it is there."""
    model, x = PPCA((4,), latent_dim), iris()
    model.initialize(x, torch.Generator().manual_seed(0))
    weight, variance = model.likelihood.weight.detach().numpy().copy(), float(model.likelihood.scale.detach()) ** 2
    centred = x.numpy() - x.numpy().mean(0)
    sample = centred.T @ centred / len(x)
    for _ in range(5):
        inverse = np.linalg.inv(weight.T @ weight + variance * np.eye(latent_dim))
        moved = sample @ weight @ np.linalg.inv(variance * np.eye(latent_dim) + inverse @ weight.T @ sample @ weight)
        variance = np.trace(sample - sample @ weight @ inverse @ moved.T) / 4
        assert np.abs(moved - weight).max() > 1e-3
        weight = moved
        model.m_step(model.e_step(x)[0])
        assert np.allclose(model.likelihood.weight.detach(), weight, atol=1e-9)
        assert float(model.likelihood.scale.detach()) ** 2 == pytest.approx(variance, rel=1e-9)
        assert np.allclose(model.likelihood.loc.detach(), x.numpy().mean(0), atol=1e-9)


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_em_ends_at_the_closed_form(latent_dim):
    model, x = PPCA((4,), latent_dim), iris()
    result = fit(model, x, EMSettings(iterations=3000, tolerance=1e-13))
    expected, log_likelihood = oracles.ppca_maximum(x.numpy(), latent_dim)
    assert result.history[0].free_energy < log_likelihood - 1
    assert result.free_energy == pytest.approx(log_likelihood, abs=1e-8)
    assert np.allclose(model.covariance().detach(), oracles.ppca_covariance(expected), atol=1e-4)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.ones(1, 3), "below the rank.* 1 data"),
        (torch.ones(9, 3), "below the rank.* 9 data"),
        (torch.stack([torch.arange(9.0)] * 3, 1), "below the rank of the data.* latent_dim 2"),
        (torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 1.0]]).repeat(4, 1), "below the rank"),
    ],
)
def test_degenerate_data_give_one_message(x, says):
    with pytest.raises((DegenerateError, EMError), match=says):
        fit(PPCA((3,), 2), x.double())


def test_an_m_step_that_leaves_no_noise_says_so():
    model, x = PPCA((3,), 1), torch.arange(9.0).unsqueeze(1).expand(9, 3)
    with torch.no_grad():
        model.likelihood.log_scale.fill_(-30.0)
    model.likelihood.weight.data.fill_(1.0)
    statistics, _ = model.e_step(x)
    with pytest.raises(DegenerateError, match=r"no noise is left around the 1 latents.*latent_dim"):
        model.m_step(statistics)


def test_a_constant_column_is_no_trouble():
    x = torch.cat([iris(), torch.ones(150, 1)], 1)
    model = PPCA((5,), 2)
    assert fit(model, x, EMSettings(iterations=3000, tolerance=1e-12)).converged
    assert model.log_evidence(x).mean().item() == pytest.approx(oracles.ppca_maximum(x.numpy(), 2)[1], abs=1e-6)
    with pytest.raises(ValueError, match="row 1"):
        fit(model, torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]).repeat(1, 2)[:, :5])
