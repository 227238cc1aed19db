"""Gradients through draws of a mixture, against derivatives of exact expectations."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from guides.mixture import NormalMixture, ReparameterizedMixture
from models.nets import Linear


def mixture(logits, loc, log_scale):
    return ReparameterizedMixture(dist.Categorical(logits=logits), dist.Normal(loc, log_scale.exp()).to_event(1))


def parameters(dim, components=3):
    return torch.randn(components), torch.randn(components, dim), 0.3 * torch.randn(components, dim) - 0.2


def expectation(logits, loc, log_scale, linear, quadratic):
    """E[a'z + z'Bz]."""
    of_component = loc @ linear + torch.einsum("cd,de,ce->c", loc, quadratic, loc)
    return logits.softmax(0) @ (of_component + (2 * log_scale).exp() @ quadratic.diagonal())


@pytest.mark.parametrize("dim", [1, 3])
def test_gradients_are_those_of_the_expectation(dim):
    values, linear, quadratic = parameters(dim), torch.randn(dim), torch.randn(dim, dim)
    leaves = [value.requires_grad_() for value in values]
    exact = torch.autograd.grad(expectation(*leaves, linear, quadratic), leaves)
    count = 100_000
    own = [value.detach().expand(count, *value.shape).clone().requires_grad_() for value in values]
    z = mixture(*own).rsample()
    score = z @ linear + torch.einsum("nd,de,ne->n", z, quadratic, z)
    found = torch.autograd.grad(score.sum(), own)
    for one, truth in zip(found, exact, strict=True):
        error = one.std(0) / count**0.5
        assert ((one.mean(0) - truth).abs() < 5 * error).all()
        assert (truth.abs() > 5 * error).any()  # a derivative of zero would be noticed


def test_density_is_the_mixtures():
    logits, loc, log_scale = parameters(3)
    z = torch.randn(20, 3)
    parts = stats.norm.logpdf(z.numpy()[:, None], loc.numpy(), log_scale.exp().numpy()).sum(-1)
    by_hand = logsumexp(parts + torch.log_softmax(logits, 0).numpy(), axis=1)
    assert np.allclose(mixture(logits, loc, log_scale).log_prob(z), by_hand, atol=1e-12)


def test_equal_components_move_as_one():
    loc, log_scale = torch.randn(2, requires_grad=True), torch.zeros(2)
    made = mixture(torch.zeros(4), loc.expand(4, 2), log_scale.expand(4, 2))
    (gradient,) = torch.autograd.grad(made.rsample().sum(), loc)
    assert torch.allclose(gradient, torch.ones(2), atol=1e-12)


def test_tails_in_single_precision():
    """Far out, distribution functions round to one; their derivatives must not."""
    values = parameters(2)
    z = torch.tensor([[6.0, 5.0], [-6.0, 5.5], [0.1, 0.2]])
    gradients = []
    for dtype in (torch.float64, torch.float32):
        leaves = [value.detach().to(dtype).requires_grad_() for value in values]
        motion = mixture(*leaves)._motion(z.to(dtype))
        gradients.append([torch.autograd.grad(motion[i].sum(), leaves, retain_graph=True) for i in range(3)])
    for double, single in zip(*gradients, strict=True):
        for one, other in zip(double, single, strict=True):
            assert torch.allclose(one, other.double(), rtol=1e-3, atol=1e-4)


def test_without_gradients_nothing_is_computed_for_them():
    core = NormalMixture((3,), (4,), Linear, components=2)
    with torch.no_grad():
        assert not core(torch.randn(5, 4)).rsample().requires_grad
    with pytest.raises(ValueError, match="components must be at least 1, got 0"):
        NormalMixture((3,), (4,), Linear, components=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_density_of_shared_components_is_that_of_torch_even_where_they_are_sharp(dtype):
    loc, scale = 4 * torch.randn(50, 6), 0.01 + torch.rand(50, 6)
    logits, z = torch.randn(50), 4 * torch.randn(20, 6)
    z[:10] = loc[:10] + scale[:10] * torch.randn(10, 6)
    loc, scale, logits, z = (value.to(dtype).requires_grad_() for value in (loc, scale, logits, z))
    parts = dist.Normal(loc, scale).to_event(1)
    ours = ReparameterizedMixture(dist.Categorical(logits=logits), parts)
    double = dist.Normal(loc.double(), scale.double()).to_event(1)
    exact = dist.MixtureSameFamily(dist.Categorical(logits=logits.double()), double).log_prob(z.double())
    tolerance = {"rtol": 1e-10 if dtype == torch.float64 else 1e-6, "atol": 1e-10 if dtype == torch.float64 else 1e-6}
    for found in (ours.log_prob(z), ours.expand((20,)).log_prob(z), ours.expand((3, 20)).log_prob(z)[1]):
        torch.testing.assert_close(found.double(), exact, **tolerance)
        gradients = torch.autograd.grad(found.sum(), (loc, scale, logits, z), retain_graph=True)
        truth = torch.autograd.grad(exact.sum(), (loc, scale, logits, z), retain_graph=True)
        for one, other in zip(gradients, truth, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9 if dtype == torch.float64 else 1e-3, atol=1e-4)
