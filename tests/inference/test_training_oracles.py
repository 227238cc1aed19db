"""What training reaches, against closed forms: probabilistic PCA, the linear autoencoder, the best blind guide."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_digits, load_iris
from torch import nn

from guides.amortized import Amortized
from guides.exact import ExactPosterior
from guides.gaussian import DiagonalNormal, Unconditional
from inference.engine import SVI, SharedOptimizer
from inference.objectives import ELBO
from inference.particles import encode
from inference.schedules import cosine
from models.latent import LatentVariableModel
from models.likelihoods import FixedGaussian
from models.nets import Linear
from models.ppca import PPCA
from models.priors import StandardNormal
from tests import brute_force, oracles
from tests.pairs import as_oracle


def fit(model, guide, x, objective, steps, learning_rate=0.02, programs=None):
    """Full-batch Adam, the step size falling to zero along a cosine."""
    parameters = {p: None for program in programs or (model, guide) for p in program.parameters()}
    optimizer = SharedOptimizer(parameters, torch.optim.Adam, learning_rate)
    svi = SVI(model, guide, optimizer, objective)
    for step in range(steps):
        optimizer.set_learning_rate(learning_rate * cosine(step / steps))
        svi.step(x)


def mean_log_evidence(model, x):
    return oracles.ppca_log_evidence(x.numpy(), as_oracle(model)).mean()


GUIDES = {
    "exact": lambda model: ExactPosterior(model),
    # W is free up to a rotation; where its columns are orthogonal the posterior is diagonal, and nothing is lost.
    "linear": lambda model: DiagonalNormal(model.prior.event_shape, model.likelihood.event_shape, Linear),
}


@pytest.mark.row("0.6", "1.6", "3.12")
@pytest.mark.parametrize("guide", GUIDES)
def test_svi_reaches_maximum_likelihood_on_iris(guide):
    _check_maximum_likelihood(standardized(load_iris().data), 2, GUIDES[guide], steps=2000, learning_rate=0.03)


@pytest.mark.slow
@pytest.mark.row("0.6")
def test_svi_reaches_maximum_likelihood_on_digits():
    _check_maximum_likelihood(standardized(load_digits().data), 5, GUIDES["linear"], steps=2500, learning_rate=0.02)


def standardized(rows):
    """Centred, and in units of the standard deviation of all numbers; one unit for all keeps the model's optimum."""
    x = torch.tensor(rows)
    x = x - x.mean(0)
    return x / x.std()


def _check_maximum_likelihood(x, latent_dim, make_guide, steps, learning_rate):
    best, target = oracles.ppca_maximum(x.numpy(), latent_dim)
    model = PPCA(x.shape[1:], latent_dim)
    guide = Amortized(make_guide(model))
    assert mean_log_evidence(model, x) < target - 1
    fit(model, guide, x, ELBO(1 if latent_dim > 2 else 4, "analytic"), steps, learning_rate)
    reached = mean_log_evidence(model, x)
    assert target - 0.02 < reached <= target + 1e-9
    with torch.no_grad():
        posterior = model.posterior(x)
        q = encode(guide, x)["z"]
        gap = torch.distributions.kl_divergence(_full(q), posterior).mean()
    assert gap < 0.05
    # The noise is that of the discarded directions.
    assert model.likelihood.scale.item() == pytest.approx(best.scale, rel=0.02)


def _full(q):
    if isinstance(q, torch.distributions.MultivariateNormal):
        return q
    return torch.distributions.MultivariateNormal(q.mean, scale_tril=torch.diag_embed(q.stddev))


# --- autoencoders ------------------------------------------------------------------------------------------------


class PointGuide(nn.Module):
    """One point for each datum: the encoder of an autoencoder, the limit of a guide whose scale goes to zero."""

    def __init__(self, data_dim, latent_dim):
        super().__init__()
        self.net = nn.Linear(data_dim, latent_dim)

    def forward(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Delta(self.net(x)).to_event(1))


@pytest.mark.row("0.16", "1.25", "1.26")
def test_the_linear_autoencoder_is_the_limit_and_finds_the_principal_subspace():
    x, latent_dim, scale = torch.tensor(load_iris().data), 2, 1e-4
    x = x - x.mean(0)
    eigenvalues, vectors = np.linalg.eigh(np.cov(x.numpy().T, bias=True))
    principal, discarded = vectors[:, -latent_dim:], eigenvalues[:-latent_dim].sum()
    model = LatentVariableModel(StandardNormal((2,)), FixedGaussian((4,), (2,), Linear, scale=scale))
    guide = PointGuide(4, 2)

    def decoder():
        return model.likelihood.net.output.weight.detach().numpy()

    def mse():
        with torch.no_grad():
            return (model.likelihood.net(guide.net(x)) - x).square().sum(1).mean().item()

    assert brute_force.principal_angles(decoder(), principal).max() > 0.1
    assert mse() > 2 * discarded
    # The noise of the likelihood goes to zero, and the prior's share of the bound with it; nothing is random any more.
    parameters = [*model.parameters(), *guide.parameters()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=1000, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = scale**2 / len(x) * ELBO().differentiable_loss(model, guide, x)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert brute_force.principal_angles(decoder(), principal).max() < 1e-3
    assert mse() == pytest.approx(discarded, rel=1e-4)
    # Its codes are nothing like the prior; those of the linear VAE in all follow it.
    codes = guide.net(x).detach().numpy()
    autoencoder = oracles.gaussian_kl(codes.mean(0), np.cov(codes.T, bias=True))
    best, _ = oracles.ppca_maximum(x.numpy(), latent_dim)
    means, covariance = oracles.ppca_posterior(x.numpy(), best)
    vae = oracles.gaussian_kl(means.mean(0), np.cov(means.T, bias=True) + covariance)
    assert vae < 1e-10
    assert autoencoder > 0.05


# --- blind guides ------------------------------------------------------------------------------------------------


@pytest.fixture
def linear():
    model = PPCA((3,), 2)
    with torch.no_grad():
        model.likelihood.weight.copy_(torch.tensor([[1.0, 0.8], [0.3, 0.9], [-0.5, 0.6]]))
        model.likelihood.log_scale.fill_(-0.6)
    return model


@pytest.mark.row("1.3", "5.6", "0.5", "4.2")
def test_what_a_guide_loses_that_does_not_see_the_datum(linear):
    x, oracle = torch.randn(20, 3), as_oracle(linear)
    means, covariance = oracles.ppca_posterior(x.numpy(), oracle)
    log_p = oracles.ppca_log_evidence(x.numpy(), oracle).mean()
    precision, centre = np.linalg.inv(covariance), means.mean(0)
    scale, shape_gap = brute_force.best_diagonal_normal(precision)
    place_gap = 0.5 * np.einsum("ni,ij,nj->n", means - centre, precision, means - centre).mean()

    def bound(loc, variance):
        return oracles.ppca_elbo(x.numpy(), oracle, loc, variance).mean()

    blind = bound(np.tile(centre, (20, 1)), np.diag(scale**2))
    assert abs(log_p - blind - shape_gap - place_gap) < 1e-10  # the formula, by the closed-form bound
    core = Unconditional((2,), (3,))

    def reached():
        loc = np.tile(core.loc.detach().numpy(), (20, 1))
        return bound(loc, np.diag((2 * core.log_scale).exp().detach().numpy()))

    assert blind - reached() > 0.1
    fit(linear, Amortized(core), x, ELBO(50, "analytic"), 800, 0.05, programs=(core,))
    assert abs(reached() - blind) < 2e-3
    # Amortized, what is left is what the diagonal shape costs; with the full covariance nothing is.
    encoder = DiagonalNormal((2,), (3,), Linear)
    fit(linear, Amortized(encoder), x, ELBO(50, "analytic"), 1200, 0.05, programs=(encoder,))
    with torch.no_grad():
        loc, log_scale = encoder.net(x).chunk(2, -1)
    amortized = np.mean([bound_of(x[i], oracle, loc[i].numpy(), (2 * log_scale[i]).exp().numpy()) for i in range(20)])
    assert abs(log_p - amortized - shape_gap) < 2e-3
    exact = bound(means, covariance)
    assert abs(log_p - exact) < 1e-10
    assert place_gap > 0.5 > shape_gap > 0.05


def bound_of(x, oracle, loc, variance):
    return oracles.ppca_elbo(x.numpy()[None], oracle, loc[None], np.diag(variance))[0]


@pytest.mark.row("0.9", "1.9", "4.5")
@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
def test_pathwise_gradients_average_to_those_of_the_closed_form(linear, kl):
    """d/d loc = W^T (x - W loc - mu) / s^2 - loc and, for the scale, 1 - scale^2 (1 + |W_d|^2 / s^2)."""
    x, count = torch.tensor([0.4, -1.0, 0.7]), 20_000
    loc, log_scale = torch.tensor([0.3, -0.8]), torch.tensor([-0.2, 0.4])
    own = [t.expand(count, 2).clone().requires_grad_() for t in (loc, log_scale)]

    def guide(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(own[0], own[1].exp()).to_event(1))

    bound = ELBO(1, kl)(linear, guide, x.expand(count, 3))
    found = torch.cat(torch.autograd.grad(bound.sum(), own), 1)  # (count, 4): one gradient for each draw
    w, mu, noise = as_oracle(linear)
    expected = np.concatenate(
        [
            w.T @ (x.numpy() - w @ loc.numpy() - mu) / noise**2 - loc.numpy(),
            1 - np.exp(2 * log_scale.numpy()) * (1 + (w**2).sum(0) / noise**2),
        ]
    )
    # The same, by differences of the closed-form bound.
    start, step = torch.cat([loc, log_scale]).numpy(), 1e-5
    bound_at = lambda v: bound_of(x, as_oracle(linear), v[:2], np.exp(2 * v[2:]))  # noqa: E731
    slopes = [(bound_at(start + step * e) - bound_at(start - step * e)) / (2 * step) for e in np.eye(4)]
    assert np.allclose(slopes, expected, atol=1e-6)
    error = (found.std(0) / math.sqrt(count)).numpy()
    assert np.any(np.abs(found.mean(0).numpy() - 0.9 * expected) > 4 * error)
    assert np.all(np.abs(found.mean(0).numpy() - expected) < 4 * error)


@pytest.mark.row("0.9")
def test_with_a_fixed_covariance_the_divergence_pulls_the_mean_to_zero():
    model = LatentVariableModel(StandardNormal((2,)), FixedGaussian((3,), (2,), Linear))
    with torch.no_grad():
        model.likelihood.net.output.weight.zero_()  # only the divergence is left
    core = Unconditional((2,), (3,))
    with torch.no_grad():
        core.loc.copy_(torch.tensor([0.7, -1.2]))
    bound = ELBO(1, "analytic")(model, Amortized(core), torch.zeros(1, 3)).sum()
    assert torch.allclose(torch.autograd.grad(-bound, core.loc)[0], core.loc, atol=1e-12)


# --- in turns ----------------------------------------------------------------------------------------------------


@pytest.mark.row("1.6", "4.3", "4.4")
def test_blocks_in_turns_change_their_own_parameters_alone():
    x = standardized(load_iris().data)
    _, target = oracles.ppca_maximum(x.numpy(), 2)
    model = PPCA((4,), 2)
    guide = Amortized(DiagonalNormal((2,), (4,), Linear))
    objective, steps, rate = ELBO(4, "analytic"), 1000, 0.04
    blocks = {name: SharedOptimizer(p.parameters(), torch.optim.Adam, rate) for name, p in programs(model, guide)}
    engines = {name: SVI(model, guide, optimizer, objective) for name, optimizer in blocks.items()}

    def state(program):
        return torch.cat([p.detach().flatten() for p in program.parameters()]).clone()

    for step in range(steps):
        for name, program in programs(guide=guide, model=model):
            blocks[name].set_learning_rate(rate * cosine(step / steps))
            other = model if program is guide else guide
            before, fixed = (state(program), state(other)) if step < 3 else (None, None)
            engines[name].step(x)
            if step < 3:
                assert torch.equal(state(other), fixed)
                assert not torch.equal(state(program), before)
        if step == 0:
            assert mean_log_evidence(model, x) < target - 1
    assert target - 0.02 < mean_log_evidence(model, x) <= target


def programs(model, guide):
    return [("guide", guide), ("model", model)]


def test_a_block_steps_along_its_own_gradient_and_not_along_what_the_other_left():
    """After steps on the guide alone, the model's gradient is that of this step, not a sum over all of them."""
    x = torch.randn(10, 4)
    model, guide = PPCA((4,), 2), Amortized(DiagonalNormal((2,), (4,), Linear))
    objective = ELBO(1, "analytic")
    guide_svi = SVI(model, guide, SharedOptimizer(guide.parameters(), torch.optim.SGD, 1e-3), objective)
    model_svi = SVI(model, guide, SharedOptimizer(model.parameters(), torch.optim.SGD, 1e-3), objective)
    for _ in range(5):
        guide_svi.step(x)
    before = [p.detach().clone() for p in model.parameters()]
    pyro.set_rng_seed(4)
    model_svi.step(x)
    after = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    pyro.set_rng_seed(4)
    slopes = torch.autograd.grad(objective.differentiable_loss(model, guide, x), list(model.parameters()))
    for start, end, slope in zip(before, after, slopes, strict=True):
        assert torch.allclose(end, start - 1e-3 * slope, atol=1e-12)
