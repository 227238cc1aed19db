"""The linear beta-VAE: its optimum is reverse water-filling, and training by gradient gets there."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.datasets import load_digits

from inference.studies.linear import LinearVAE, covariance_eigenvalues, staircase, transition, water_filling_curve
from models.ppca import reverse_water_filling
from tests import oracles

LAMBDA = [3.0, 1.1, 0.4, 0.05]


@pytest.mark.row("3.27")
@pytest.mark.parametrize("level", [0.02, 0.2, 0.7, 2.0, 5.0])
def test_water_filling_is_the_least_of_distortion_and_weighted_rate(level):
    """D + 2 s R, direction by direction, by a search that knows nothing of water."""

    def cost(log_error, variance):
        return math.exp(log_error) + level * (math.log(variance) - log_error)  # 2 s times 1/2 log(variance / error)

    def best(variance):
        options = {"method": "bounded", "options": {"xatol": 1e-10}}
        return math.exp(minimize_scalar(cost, bounds=(-9, math.log(variance)), args=(variance,), **options).x)

    errors = [best(variance) for variance in LAMBDA]
    found = reverse_water_filling(torch.tensor(LAMBDA), level)
    assert found.active == sum(e < v * (1 - 1e-4) for e, v in zip(errors, LAMBDA, strict=True))
    assert found.distortion == pytest.approx(sum(errors), rel=1e-5)
    rate = 0.5 * sum(math.log(v / e) for v, e in zip(LAMBDA, errors, strict=True))
    assert found.rate == pytest.approx(rate, abs=1e-5)
    few = reverse_water_filling(torch.tensor(LAMBDA), level, latent_dim=1)  # what no latent codes is lost whole
    assert few.distortion == pytest.approx(errors[0] + sum(LAMBDA[1:]), rel=1e-5)


def test_a_level_of_nothing_is_refused():
    with pytest.raises(ValueError, match="positive"):
        reverse_water_filling(torch.tensor(LAMBDA), 0.0)


def test_the_water_level_is_the_optimum_of_the_linear_beta_vae():
    """At the closed-form parameters no change of the beta-VAE's own closed-form objective gains anything."""
    rng, noise, beta = np.random.default_rng(0), 0.6, 2.0
    directions, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    covariance = directions @ np.diag(LAMBDA) @ directions.T
    level = beta * noise**2
    gain = np.sqrt(np.clip(np.array(LAMBDA[:3]) - level, 0, None))
    weight = directions[:, :3] * gain

    def parts(weight, encoder, variance):
        """Rate and squared error of z|x ~ N(E x, diag(variance)) for x of that covariance."""
        rate = 0.5 * (np.trace(encoder @ covariance @ encoder.T) + (variance - 1 - np.log(variance)).sum())
        residual = np.eye(4) - weight @ encoder
        return rate, np.trace(residual @ covariance @ residual.T) + (variance * (weight**2).sum(0)).sum()

    def best_encoder(weight):
        precision = weight.T @ weight / level + np.eye(3)  # the posterior of noise beta s^2
        return np.linalg.solve(precision, weight.T / level), 1 / np.diag(precision)

    def objective(weight):
        rate, error = parts(weight, *best_encoder(weight))
        return beta * rate + error / (2 * noise**2)

    rate, error = parts(weight, *best_encoder(weight))
    exact = reverse_water_filling(torch.tensor(LAMBDA), level, latent_dim=3)
    assert (rate, error) == pytest.approx((exact.rate, exact.distortion), rel=1e-10)
    assert exact.active == 2
    for _ in range(200):
        other = weight + 0.1 * rng.normal(size=weight.shape)
        assert objective(other) > objective(weight)


def test_rate_distortion_and_gap_of_a_linear_vae_are_in_closed_form():
    torch.manual_seed(0)
    x = torch.randn(30, 5)
    vae = LinearVAE.untrained(5, 2, scale=0.7)
    q = vae.guide.core(x).base_dist
    loc, scale = q.loc.detach().numpy(), q.scale.detach().numpy()
    kl = [oracles.diagonal_kl(m, s) for m, s in zip(loc, scale, strict=True)]
    assert vae.rate(x) == pytest.approx(np.mean(kl), abs=1e-10)
    p = vae.model.likelihood
    oracle = oracles.LinearModel(p.weight.detach().numpy(), p.loc.detach().numpy(), 0.7)
    elbo = np.mean(
        [oracles.ppca_elbo(x[i : i + 1].numpy(), oracle, loc[i : i + 1], np.diag(scale[i] ** 2))[0] for i in range(30)]
    )
    assert -vae.distortion(x) / (2 * 0.49) - 2.5 * math.log(2 * math.pi * 0.49) - vae.rate(x) == pytest.approx(
        elbo, abs=1e-10
    )
    assert vae.kl_to_posterior(x) == pytest.approx(oracles.ppca_log_evidence(x.numpy(), oracle).mean() - elbo, abs=1e-8)


def test_curve_and_staircase_are_those_of_the_levels():
    x = torch.tensor(LAMBDA).sqrt() * torch.cat([torch.eye(4), -torch.eye(4)]) * 2.0  # covariance diag(LAMBDA)
    assert torch.allclose(covariance_eigenvalues(x), torch.tensor(LAMBDA).double())
    stairs = staircase(x, 0.1, 40.0, scale=0.5, latent_dim=3)
    assert [left for _, left in stairs] == [3, 2, 1, 0, 0]
    assert [beta for beta, _ in stairs] == pytest.approx([0.1, 1.6, 4.4, 12.0, 40.0])
    curve = water_filling_curve(x, latent_dim=4)
    assert curve[0] == pytest.approx((0.0, sum(LAMBDA)))
    rates, errors = zip(*curve, strict=True)
    assert list(rates) == sorted(rates)
    assert list(errors) == sorted(errors, reverse=True)


VARIANCES = np.array([9.0, 4.2, 2.3, 1.1, 0.63, 0.31, 0.12, 0.05])


def with_variances(variances):
    """Data with exactly these variances in random directions."""
    rng, size = np.random.default_rng(4), len(variances)
    directions, _ = np.linalg.qr(rng.normal(size=(size, size)))
    noise = rng.normal(size=(120, size))
    white = np.linalg.qr(noise - noise.mean(0))[0] * math.sqrt(120)
    return torch.tensor(white * np.sqrt(variances) @ directions.T)


@pytest.mark.parametrize("ratio", [1.02, 1.005])
def test_the_last_unit_is_found_just_above_its_transition(ratio):
    """Where the objective is flat: the rate of the unit, 0.5 log(ratio), is all there is."""
    row = transition(with_variances(VARIANCES), [VARIANCES[0] / (ratio * 0.25)], 0.5, 6, 1500)[0]
    assert row["rate"] == pytest.approx(0.5 * math.log(ratio), rel=0.02)
    assert row["distortion"] == pytest.approx(VARIANCES[1:].sum() + VARIANCES[0] / ratio, rel=1e-4)


@pytest.mark.parametrize(("scale", "betas"), [(0.5, [0.35, 1.0, 2.0, 6.0, 14.0, 40.0]), (1.0, [0.08, 0.4, 3.0])])
def test_training_ends_at_the_optimum_wherever_the_variances_lie(scale, betas):
    """From all latents in use to none."""
    variances, x = VARIANCES, with_variances(VARIANCES)
    for row, beta in zip(transition(x, betas, scale, 6, 1500), betas, strict=True):
        coded = variances[:6][variances[:6] > beta * scale**2]
        assert row["active"] == len(coded)
        assert row["rate"] == pytest.approx(0.5 * np.log(coded / (beta * scale**2)).sum(), rel=1e-3, abs=1e-3)
        lost = variances.sum() - coded.sum() + beta * scale**2 * len(coded)
        assert row["distortion"] == pytest.approx(lost, rel=1e-3)


@pytest.mark.slow
@pytest.mark.row("3.22")
def test_trained_linear_vaes_have_the_exact_transition():
    x, scale = torch.tensor(load_digits().data[:900] / 16), 0.2
    x = x - x.mean(0)
    eigenvalues = covariance_eigenvalues(x)
    # Water levels in the middle of wide gaps: no variance within 5 % of one, or the count would be a matter of taste.
    gaps = [k for k in range(1, 12) if eigenvalues[k - 1] / eigenvalues[k] > 1.11]
    actives = [gaps[1], gaps[len(gaps) // 2], gaps[-1]]
    betas = [float((eigenvalues[k - 1] * eigenvalues[k]).sqrt()) / scale**2 for k in actives]
    untrained = transition(x, betas[:1], scale, 12, 0)[0]
    assert untrained["distortion"] > 1.05 * untrained["exact_distortion"]
    for active, row in zip(actives, transition(x, betas, scale, 12, 1500), strict=True):
        assert row["active"] == row["exact_active"] == active
        assert row["rate"] == pytest.approx(row["exact_rate"], rel=1e-3)
        assert row["distortion"] == pytest.approx(row["exact_distortion"], rel=1e-3)
        assert row["nll"] <= -row["elbo"]
