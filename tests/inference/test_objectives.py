"""Bounds against Pyro's estimators at the same noise, against enumeration and quadrature, and as parts of scripts."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from torch import nn

from guides.amortized import Amortized
from guides.exact import ExactPosterior
from guides.gaussian import DiagonalNormal
from inference.objectives import ELBO, IWAE
from inference.particles import StructureError
from models.latent import LatentVariableModel
from models.likelihoods import Bernoulli
from models.nets import MLP, Linear
from models.priors import StandardNormal
from tests import oracles
from tests.pairs import as_oracle, linear
from tests.programs import (
    HierarchicalGuide,
    HierarchicalModel,
    SubsampledGuide,
    SubsampledModel,
    TableGuide,
    TableModel,
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
