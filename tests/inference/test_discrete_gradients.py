"""Discrete draws: no path through them, what Pyro makes of it, relaxations and what they cost."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn.functional import one_hot

from inference.gradients import with_gradient
from inference.objectives import IWAE
from inference.particles import StructureError
from tests.estimation import deviations, programs
from tests.gradient_cases import LIMIT, LikelihoodOnly, assert_right, draws_of


@pytest.mark.row("0.31", "4.19")
def test_there_is_no_path_through_an_argmax():
    logits = torch.tensor([0.5, 0.0, -1.0], requires_grad=True)
    gain = torch.tensor([1.0, -2.0, 3.0])
    noise = dist.Gumbel(0.0, 1.0).sample((100, 3))
    draws = one_hot((logits + noise).argmax(-1), 3).to(gain)
    assert not draws.requires_grad
    exact_gradient = torch.autograd.grad((logits.softmax(0) * gain).sum(), logits)[0]
    assert exact_gradient.abs().min() > 0.1


@pytest.mark.row("0.31", "5.7")
def test_pyros_renyi_bound_has_no_gradient_through_discrete_draws_and_ours_does():
    model, guide, x = programs("bits", 50)
    pyros = pyro.infer.RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    pyros.loss_and_grads(model, guide, x)
    assert all(p.grad is None or not p.grad.any() for p in guide.parameters())
    with pytest.raises(StructureError, match=r"\['z'\] cannot be reparameterized.*objective.gradient=score"):
        IWAE(2).bound(model, guide, x)
    assert_right(draws_of("iwae", "vimco", "bits"), "iwae", "bits")


def relaxed(temperature, count):
    logits = torch.full((count,), 0.3, requires_grad=True)

    def program(x, obs):
        with pyro.plate("data", count, dim=-1):
            z = pyro.sample("z", dist.RelaxedBernoulli(temperature=torch.tensor(temperature), logits=logits))
            if obs:
                pyro.sample("x", dist.Normal((2 * z - 1) ** 3 + z, 1.0), obs=x)

    return lambda x: program(x, True), lambda x: program(x, False), logits


def score_of_bit(z):
    return dist.Normal((2 * z - 1) ** 3 + z, 1.0).log_prob(torch.tensor(1.4))


@pytest.mark.row("0.31", "5.7")
def test_relaxed_bits_have_the_biased_gradient_that_quadrature_says():
    """The mean is that of the relaxation, whose bias falls with the temperature while the variance rises."""
    u = (torch.arange(400_000) + 0.5) / 400_000
    alpha = torch.tensor(0.3, requires_grad=True)
    discrete = alpha.sigmoid() * (score_of_bit(torch.tensor(1.0)) - score_of_bit(torch.tensor(0.0)))
    truth = float(torch.autograd.grad(discrete, alpha)[0])
    bias, variance = [], []
    for temperature in (2.0, 0.5, 0.1):
        relaxation = score_of_bit(((alpha + u.logit()) / temperature).sigmoid()).mean()
        expected = torch.autograd.grad(relaxation, alpha)[0]
        model, guide, logits = relaxed(temperature, 200_000)
        LikelihoodOnly().bound(model, guide, torch.full((200_000,), 1.4)).sum().backward()
        assert deviations(logits.grad.unsqueeze(-1), expected) < LIMIT
        bias.append(abs(float(expected) - truth))
        variance.append(float(logits.grad.var()))
    assert deviations(logits.grad.unsqueeze(-1) + bias[0], truth) > LIMIT
    assert bias[0] > bias[1] > bias[2]
    assert variance[0] < variance[1] < variance[2]


def test_straight_through_is_discrete_forwards_and_a_softmax_backwards():
    logits = torch.tensor([0.5, 0.0, -1.0], requires_grad=True)
    soft = logits.softmax(0)
    value = with_gradient(one_hot(torch.tensor(1), 3).to(soft), soft)
    assert torch.equal(value, torch.tensor([0.0, 1.0, 0.0]))
    u = torch.tensor([1.0, -2.0, 3.0])
    p = soft.detach()
    (value * u).sum().backward()
    torch.testing.assert_close(logits.grad, (p.diag() - p.outer(p)) @ u, rtol=0, atol=1e-12)
