"""Bounds against Pyro's estimators at the same noise, against enumeration and quadrature, and as parts of scripts."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from scipy.stats import norm
from torch import nn

from guides.amortized import Amortized
from guides.exact import ExactPosterior
from guides.gaussian import DiagonalNormal, Unconditional
from inference.engine import SVI, SharedOptimizer
from inference.objectives import ELBO, IWAE
from inference.particles import StructureError, particles
from models.latent import LatentVariableModel
from models.likelihoods import Bernoulli
from models.nets import MLP, Linear
from models.ppca import PPCA
from models.priors import StandardNormal
from tests import brute_force, oracles
from tests.programs import (
    HierarchicalGuide,
    HierarchicalModel,
    SubsampledGuide,
    SubsampledModel,
    TableGuide,
    TableModel,
    at,
    gradients,
)


def composed():
    net = lambda i, o: MLP(i, o, (6,))  # noqa: E731
    model = LatentVariableModel(StandardNormal((2,)), Bernoulli((5,), (2,), net))
    return model, Amortized(DiagonalNormal((2,), (5,), net)), torch.randint(0, 2, (4, 5)).double()


def hierarchical():
    return HierarchicalModel(), HierarchicalGuide(), torch.randn(4, 5)


def subsampled():
    return SubsampledModel(batch=3), SubsampledGuide(batch=3), torch.randn(10, 3)


def linear(data_dim=3, latent_dim=2):
    model = PPCA((data_dim,), latent_dim)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
        model.likelihood.log_scale.fill_(-0.4)
    return model


def as_oracle(model):
    p = model.likelihood
    return oracles.LinearModel(p.weight.detach().numpy(), p.loc.detach().numpy(), p.scale.item())


def at_the_same_noise(*runs, seed=1):
    found = []
    for run in runs:
        pyro.set_rng_seed(seed)
        found.append(run())
    return found


PYROS = {"monte_carlo": pyro.infer.Trace_ELBO, "analytic": pyro.infer.TraceMeanField_ELBO}


@pytest.mark.row("1.10", "2.13")
@pytest.mark.parametrize("kl", PYROS)
@pytest.mark.parametrize("num_particles", [1, 2, 5])
@pytest.mark.parametrize("programs", [composed, hierarchical, subsampled])
def test_elbo_is_pyros_in_value_and_gradient(programs, num_particles, kl):
    model, guide, x = programs()
    ours = ELBO(num_particles, kl, max_plate_nesting=1)
    theirs = PYROS[kl](num_particles, max_plate_nesting=1, vectorize_particles=True)
    mine, other = at_the_same_noise(
        lambda: ours.differentiable_loss(model, guide, x), lambda: theirs.differentiable_loss(model, guide, x)
    )
    elsewhere = at_the_same_noise(lambda: ours.loss(model, guide, x), seed=2)[0]
    assert abs(mine - elsewhere) > 1e-3  # the noise matters
    assert torch.allclose(mine, other, rtol=1e-10, atol=1e-10)
    found, expected = gradients(mine, model, guide), gradients(other, model, guide)
    assert expected.abs().max() > 1e-2
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("objective", [ELBO(3), ELBO(3, "analytic"), IWAE(3)], ids=["mc", "analytic", "iwae"])
def test_an_objective_is_a_bound_and_its_loss_the_negative(objective):
    model, guide, x = composed()
    bound, loss, grad = at_the_same_noise(
        lambda: objective(model, guide, x),
        lambda: objective.loss(model, guide, x),
        lambda: gradients(objective.differentiable_loss(model, guide, x), model, guide),
    )
    assert bound.shape == (4,)
    assert bound.requires_grad
    assert not loss.requires_grad
    assert torch.allclose(loss, -bound.sum(), atol=1e-12)
    assert torch.allclose(gradients(bound.sum(), model, guide), -grad, atol=1e-12)
    stepped = at_the_same_noise(lambda: objective.loss_and_grads(model, guide, x))[0]
    added = torch.cat([p.grad.flatten() for program in (model, guide) for p in program.parameters()])
    assert torch.allclose(stepped, loss, atol=1e-12)
    assert torch.allclose(added, grad, atol=1e-12)


def test_a_bound_in_closed_form_has_the_right_sign():
    model, x = linear(), torch.randn(6, 3)
    exact = Amortized(ExactPosterior(model))
    log_p = torch.tensor(oracles.ppca_log_evidence(x.numpy(), as_oracle(model)))
    for objective in (ELBO(2), IWAE(3)):
        assert torch.allclose(objective(model, exact, x), log_p, atol=1e-9)
        assert torch.allclose(objective.loss(model, exact, x), -log_p.sum(), atol=1e-9)


def test_without_data_an_objective_is_a_module():
    """Pyro's way to hand a loss to torch's own optimizers, to Lightning or to DDP."""
    model, guide, x = composed()
    module = ELBO(2, "analytic")(model, guide)
    assert isinstance(module, nn.Module)
    names = {name for name, _ in module.named_parameters()}
    assert names == {f"model.{n}" for n, _ in model.named_parameters()} | {
        f"guide.{n}" for n, _ in guide.named_parameters()
    }
    loss, expected = at_the_same_noise(lambda: module(x), lambda: ELBO(2, "analytic").loss(model, guide, x))
    assert torch.allclose(loss, expected, atol=1e-12)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    loss.backward()
    optimizer.step()
    after = at_the_same_noise(lambda: module(x))[0]
    assert after < loss


def test_nested_plates_are_found_once_and_the_random_numbers_left_alone():
    model, guide, x = composed()
    guessing, told = ELBO(3), ELBO(3, max_plate_nesting=1)
    first, second = at_the_same_noise(lambda: guessing(model, guide, x), lambda: told(model, guide, x))
    assert guessing.nesting == 1
    assert torch.equal(first, second)


def test_bad_options_say_what_is_accepted():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        IWAE(0)
    with pytest.raises(ValueError, match="'analytic' or 'monte_carlo', got 'exact'"):
        ELBO(kl="exact")
    model, guide, x = composed()
    with pytest.raises(StructureError, match="first argument"):
        ELBO().loss(model, guide, x=x)


def test_discrete_guides_are_refused_for_their_gradient_would_be_zero():
    oracle = oracles.tiny_discrete_vae()
    model, guide = TableModel(oracle), TableGuide(oracles.random_tables(4, 8))
    for objective in (ELBO(2), IWAE(5)):
        with pytest.raises(StructureError, match=r"\['z'\] cannot be reparameterized.*objective=trace_elbo"):
            objective.loss_and_grads(model, guide, torch.tensor(oracle.data()[:4]))


def test_a_kl_without_closed_form_is_refused_by_name():
    def guide(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.StudentT(5.0, torch.zeros(4, 2), 1).to_event(1))

    model, _, x = composed()
    with pytest.raises(StructureError, match="no closed-form KL between StudentT and Normal at site 'z'"):
        ELBO(kl="analytic")(model, guide, x)
    assert ELBO()(model, guide, x).isfinite().all()


# --- the right numbers -------------------------------------------------------------------------------------------


@pytest.mark.row("0.10", "1.7", "2.13")
def test_single_sample_elbos_average_to_the_elbo():
    model, count = linear(), 100_000
    x = torch.randn(1, 3)
    guide = Amortized(DiagonalNormal((2,), (3,), Linear))
    loc, log_scale = (t.detach()[0].numpy() for t in guide.core.net(x).chunk(2, -1))
    exact = oracles.ppca_elbo(x.numpy(), as_oracle(model), loc[None], np.diag(np.exp(2 * log_scale)))[0]
    spread = {}
    for kl in PYROS:
        with torch.no_grad():
            found = ELBO(1, kl)(model, guide, x.expand(count, 3))
        assert found.shape == (count,)
        spread[kl], error = found.var().item(), found.std().item() / count**0.5
        evidence = oracles.ppca_log_evidence(x.numpy(), as_oracle(model))[0]
        assert abs(found.mean() - evidence) > 4 * error  # it is the bound that is estimated, not log p
        assert abs(found.mean() - exact) < 4 * error
    assert spread["analytic"] < spread["monte_carlo"]


@pytest.mark.row("2.13")
def test_which_kl_has_less_variance_depends_on_the_guide():
    """At the exact posterior the sampled log-ratio is constant, and it is the closed form that adds variance."""
    model, x = linear(), torch.randn(1, 3)
    exact = Amortized(ExactPosterior(model))
    sampled, closed = (ELBO(1, kl)(model, exact, x.expand(1000, 3)).var() for kl in ("monte_carlo", "analytic"))
    assert sampled < 1e-20
    assert closed > 0.1


@pytest.mark.row("0.6", "3.12")
def test_the_loss_is_the_formula_on_the_slide():
    model, guide, x = composed()
    pyro.set_rng_seed(5)
    loss = ELBO(1, "analytic").loss(model, guide, x)
    pyro.set_rng_seed(5)
    with torch.no_grad():
        loc, log_scale = guide.core.net(x).chunk(2, -1)
        z = loc + log_scale.exp() * torch.randn(4, 2)
        logits = model.likelihood.net(z)
        reconstruction = (x * logits - logits.exp().log1p()).sum()
        kl = -0.5 * (1 + 2 * log_scale - loc**2 - (2 * log_scale).exp()).sum()
    assert abs(loss - (-reconstruction + kl)) < 1e-10


# --- importance weighting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("datum", [0, 21, 63])
def test_iwae_is_the_sum_over_all_tuples_of_states(datum):
    oracle, states = oracles.tiny_discrete_vae(bits=2), 4
    x = oracle.data()[datum : datum + 1]
    q = oracles.random_tables(1, states, seed=datum)
    log_weights = (oracle.log_joint(x) - np.log(q))[0]
    bounds = []
    for k in (1, 2, 3, 4):
        tuples = torch.tensor(list(itertools.product(range(states), repeat=k)))  # (S^K, K)
        guide = at(TableGuide(np.repeat(q, len(tuples), axis=0)), z=tuples.T if k > 1 else tuples[:, 0])
        draws = particles(TableModel(oracle), guide, torch.tensor(x).expand(len(tuples), -1), k)
        probability = draws.log_q.sum(0).exp()
        assert abs(probability.sum() - 1) < 1e-12
        bound = (probability * IWAE(k).from_particles(draws)).sum().item()
        assert abs(bound - oracles.iwae_by_enumeration(log_weights, q[0], k)) < 1e-10
        bounds.append(bound)
        if k == 1:
            assert abs(bound - oracle.elbo(x, q)[0]) < 1e-10
    assert np.all(np.diff(bounds) > 1e-6)
    assert bounds[-1] < oracle.log_evidence(x)[0]


def test_iwae_on_a_gaussian_is_its_quadrature():
    """z ~ N(0, 1), x ~ N(2 z, 1/4), under a guide that is too narrow and off centre."""
    x, loc, scale, count = 1.2, 0.1, 0.4, 200_000

    def model(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(2 * z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(loc, scale))

    log_weight = lambda z: norm.logpdf(z) + norm.logpdf(x, 2 * z, 0.5) - norm.logpdf(z, loc, scale)  # noqa: E731
    exact = [brute_force.iwae_by_quadrature(log_weight, loc, scale, k) for k in (1, 2, 3)]
    log_p = norm.logpdf(x, 0, math.sqrt(4 + 0.25))
    assert exact[0] < exact[1] < exact[2] < log_p
    for k, expected in zip((1, 2, 3), exact, strict=True):
        found = IWAE(k)(model, guide, torch.full((count // k,), x))
        error = found.std().item() / math.sqrt(count // k)
        others = [e for e in [*exact, log_p] if e != expected]
        assert min(abs(found.mean().item() - other) for other in others) > 4 * error
        assert abs(found.mean().item() - expected) < 4 * error


def test_iwae_rises_to_log_p():
    model, x = linear(), torch.randn(1, 3)
    guide = Amortized(Unconditional((2,), (3,)))
    log_p = oracles.ppca_log_evidence(x.numpy(), as_oracle(model))[0]
    with torch.no_grad():
        bounds = [IWAE(k)(model, guide, x.expand(20_000 // k, 3)).mean().item() for k in (1, 10, 100, 2000)]
    assert np.all(np.diff(bounds) > 0)
    assert log_p - bounds[0] > 1
    assert abs(bounds[-1] - log_p) < 0.1


def test_a_subsampled_iwae_stays_below_log_p_where_pyros_does_not():
    full, batch, k, repeats = 1000, 5, 50, 300
    data = 1.4 * torch.randn(full)
    log_p = norm.logpdf(data.numpy(), 0, math.sqrt(2)).sum()

    def model(x):
        with pyro.plate("data", full, subsample_size=batch, dim=-1) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", full, subsample_size=batch, dim=-1) as index:
            pyro.sample("z", dist.Normal(0.5 * x[index], 1.0))  # the posterior's scale is sqrt(1/2)

    def scored(objective):
        found = torch.tensor([-float(objective.loss(model, guide, data)) for _ in range(repeats)])
        return found.mean().item(), found.std().item() / math.sqrt(repeats)

    renyi = pyro.infer.RenyiELBO(alpha=0, num_particles=k, max_plate_nesting=1, vectorize_particles=True)
    mean, error = scored(renyi)
    assert mean - 5 * error > log_p  # the trap is real: the scale N / M is inside its logarithm
    mean, error = scored(IWAE(k))
    assert mean - 5 * error < log_p
    # Against the very data of each minibatch, whose choice is then no source of noise, it is a bound and a tight one.
    with torch.no_grad():
        own = torch.stack([_own_gap(model, guide, data, k) for _ in range(repeats)])
    assert own.mean() > -5 * own.std() / math.sqrt(repeats)
    assert own.mean() < 0.02


def _own_gap(model, guide, data, k):
    """log p(x) minus the bound, for each datum of one random batch, averaged over the batch."""
    trace = pyro.poutine.trace(guide).get_trace(data)
    index = trace.nodes["data"]["value"]
    fixed = pyro.poutine.replay(guide, trace=_only(trace, "data"))
    bound = IWAE(k)(model, fixed, data)
    return (torch.tensor(norm.logpdf(data[index].numpy(), 0, math.sqrt(2))) - bound).mean()


def _only(trace, name):
    kept = trace.copy()
    for other in [n for n in kept.nodes if n != name]:
        kept.remove_node(other)
    return kept


@pytest.mark.row("0.11", "1.17")
@pytest.mark.parametrize("objective", [ELBO(), ELBO(kl="analytic"), IWAE(1)], ids=["mc", "analytic", "iwae"])
def test_all_minibatches_average_to_the_full_data(objective):
    x, noise = torch.randn(6, 3), torch.randn(6, 2)
    model, guide = SubsampledModel(batch=2), SubsampledGuide(batch=2, noise=noise)
    whole = (SubsampledModel(batch=6), SubsampledGuide(batch=6, noise=noise))
    for mine, theirs in zip((model, guide), whole, strict=True):
        theirs.load_state_dict(mine.state_dict())
    losses, slopes = [], []
    for pair in itertools.combinations(range(6), 2):
        loss = objective.differentiable_loss(model, guide, x, subsample=torch.tensor(pair))
        losses.append(loss.detach())
        slopes.append(gradients(loss, model, guide))
    full = objective.differentiable_loss(*whole, x, subsample=torch.arange(6))
    assert len(losses) == 15
    assert torch.stack(losses).std() > 1  # they are no copies of one another
    assert abs(torch.stack(losses).mean() - full) < 1e-10
    assert torch.allclose(torch.stack(slopes).mean(0), gradients(full, *whole), atol=1e-10)
    # The scale is N / M = 3: a batch alone, without it, is that much smaller.
    with torch.no_grad():
        alone = objective(model, guide, x, subsample=torch.tensor([0, 1])).sum()
    assert abs(-3 * alone - losses[0]) < 1e-10


# --- in other people's scripts -----------------------------------------------------------------------------------


class StockVAE(nn.Module):
    """Pyro's tutorial in small: an nn.Module registered by pyro.module, model and guide its methods."""

    def __init__(self, data_dim=8, latent_dim=2):
        super().__init__()
        self.latent_dim = latent_dim
        self.decoder, self.encoder = nn.Linear(latent_dim, data_dim), nn.Linear(data_dim, 2 * latent_dim)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(x.shape[0], self.latent_dim), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


def two_patterns(count=60):
    pattern = torch.cat([torch.ones(4), torch.zeros(4)])
    return torch.stack([pattern if i % 2 else 1 - pattern for i in range(count)])


@pytest.mark.parametrize("objective", [ELBO(2), ELBO(kl="analytic"), IWAE(5)], ids=["mc", "analytic", "iwae"])
def test_objectives_train_a_stock_program_under_plain_svi(objective):
    pyro.set_rng_seed(0)
    vae, x = StockVAE(), two_patterns()
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.05}), loss=objective)
    start = svi.evaluate_loss(x) / len(x)
    assert start > math.log(2) + 1
    losses = [svi.step(x) / len(x) for _ in range(300)]
    assert isinstance(losses[0], float)
    end = svi.evaluate_loss(x) / len(x)
    assert end < 1.5  # the entropy of the two patterns is log 2 = 0.69; blind to them it is 8 log 2 = 5.5


def test_objectives_train_parameters_of_the_global_store():
    x = 2 + torch.randn(200)

    def model(x):
        mean = pyro.param("mean", torch.tensor(0.0))
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(mean, 0.6))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(x.shape[0]))
        scale = pyro.param("scale", torch.ones(x.shape[0]), constraint=dist.constraints.positive)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(loc, scale))

    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss=ELBO(5, "analytic"))
    for _ in range(600):
        svi.step(x)
    assert abs(pyro.param("mean").item() - x.mean().item()) < 0.1
    assert abs(pyro.param("scale").mean().item() - 0.48) < 0.05  # 1 / sqrt(1 / 0.6^2 + 1 / 0.8^2)


@pytest.mark.row("5.1", "5.2")
@pytest.mark.parametrize(
    "loss",
    [
        pyro.infer.Trace_ELBO(),
        pyro.infer.TraceMeanField_ELBO(),
        pyro.infer.TraceGraph_ELBO(),
        pyro.infer.TraceEnum_ELBO(strict_enumeration_warning=False),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_pyros_objectives_train_our_programs(loss):
    model, guide, x = composed()
    before = _elbo(model, guide, x)
    svi = SVI(model, guide, shared_adam(model, guide), loss)
    for _ in range(200):
        svi.step(x)
    assert _elbo(model, guide, x) > before + 0.5


def test_enumeration_trains_a_discrete_guide():
    oracle = oracles.tiny_discrete_vae()
    x = torch.tensor(oracle.data())
    table = oracles.random_tables(64, 8)
    model, guide = TableModel(oracle), TableGuide(table, enumerate="parallel")
    svi = SVI(model, guide, shared_adam(guide), pyro.infer.TraceEnum_ELBO(max_plate_nesting=1))
    evidence, start = oracle.log_evidence(oracle.data()).sum(), oracle.elbo(oracle.data(), table).sum()
    assert evidence - start > 10
    for _ in range(500):
        loss = svi.step(x)
    assert abs(evidence + loss) < 0.1


def shared_adam(*programs, lr=0.05):
    return SharedOptimizer([p for program in programs for p in program.parameters()], torch.optim.Adam, lr)


def _elbo(model, guide, x):
    pyro.set_rng_seed(7)
    with torch.no_grad():
        return ELBO(200, "analytic")(model, guide, x).mean().item()
