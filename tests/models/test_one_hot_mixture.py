"""A mixture with a one-hot latent is the mixture: the same joint at one-hot vectors, and linear in between."""

import pytest
import torch
from pyro import poutine

from guides.amortized import Amortized
from guides.discrete import OneHotCategoricals
from guides.relaxed import concrete
from inference.objectives import ELBO
from inference.particles import generate, particles
from models.nets import Linear
from models.one_hot_mixture import one_hot_gmm


def started(covariance="full"):
    model = one_hot_gmm((3,), 4, covariance)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return model, torch.randn(6, 3)


def log_joint(model, z, x):
    trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x)
    trace.compute_log_prob()
    return trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
def test_the_joint_is_the_mixtures_and_linear_in_between(covariance):
    model, x = started(covariance)
    expected = model.mixture.log_joint(x)
    for state in range(4):
        z = torch.nn.functional.one_hot(torch.full((6, 1), state), 4).double()
        assert torch.allclose(log_joint(model, z, x), expected[:, state], atol=1e-9)
    soft = torch.rand(6, 1, 4).softmax(2)
    assert torch.allclose(log_joint(model, soft, x), (soft.squeeze(1) * expected).sum(1), atol=1e-9)


def test_drawn_one_hots_give_the_bound_of_their_categorical():
    model, x = started()
    guide = Amortized(OneHotCategoricals((1, 4), (3,), Linear, model))
    with torch.no_grad():
        q = guide.core(x).base_dist.probs.squeeze(1)
        expected = (q * (model.mixture.log_joint(x) - q.log())).sum(1)
        draws = particles(model, guide, x, 2000).log_weight
    error = draws.std(0) / 2000**0.5
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()
    assert ((draws.mean(0) - model.log_evidence(x).detach()).abs() > 5 * error).any()
    assert torch.allclose(model.log_evidence(x), model.mixture.log_evidence(x))


def test_relaxed_draws_reach_the_guide_by_their_path():
    model, x = started()
    guide = Amortized(concrete((1, 4), (3,), Linear, model))
    ELBO()(model, guide, x).sum().backward()
    assert all(p.grad.abs().max() > 1e-4 for p in guide.parameters())
    assert all(p.grad.abs().max() > 1e-4 for p in model.parameters())
    with torch.no_grad():
        latents, p_x, drawn = generate(model.eval(), x)
    state = latents["z"].squeeze(1).argmax(1)
    assert torch.allclose(p_x.mean, model.mixture.loc[state])
    assert drawn.shape == x.shape
