"""A net from one latent: quadrature is the oracle that EM would need, and that training does without."""

from functools import partial

import pytest
import torch
from torch import nn

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference.diagnostics import elbo_terms
from inference.engine import SVI, SharedOptimizer
from inference.evaluate import log_evidence
from inference.objectives import ELBO
from models.latent import LatentVariableModel
from models.likelihoods import FixedGaussian
from models.nets import MLP
from models.priors import StandardNormal


def curve(count=80):
    """Noisy points on a bend in the plane, each of one latent."""
    t = torch.randn(count)
    return torch.stack([t, 0.5 * t.square() - 0.5], 1) + 0.4 * torch.randn(count, 2)


def pair(seed=0):
    torch.manual_seed(seed)
    net = partial(MLP, hidden=(8,))
    model = LatentVariableModel(StandardNormal((1,)), FixedGaussian((2,), (1,), net, scale=0.4))
    return model, Amortized(DiagonalNormal((1,), (2,), net))


def log_joint(model, x, nodes=801, limit=8.0):
    """log p(x, z) on a grid of z, ``(nodes, N)``; the grid ``(nodes, 1)``; the log of its step."""
    z = torch.linspace(-limit, limit, nodes).unsqueeze(-1)
    log_p = model.likelihood(z.unsqueeze(1)).log_prob(x) + model.prior().log_prob(z).unsqueeze(1)
    return log_p, z, (z[1] - z[0]).log()


def by_quadrature(model, x, **grid):
    """log p(x), ``(N,)`` nats; the trapezoid rule, whose ends weigh nothing."""
    log_p, _, log_step = log_joint(model, x, **grid)
    return log_p.logsumexp(0) + log_step


@pytest.mark.row("1.2")
def test_the_posterior_by_quadrature_explains_the_gap_and_gives_the_gradient_of_em():
    (model, guide), x = pair(), curve(12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.7 * torch.randn_like(parameter))  # bent, so that no posterior is normal
    log_p, z, log_step = log_joint(model, x)
    evidence = log_p.logsumexp(0) + log_step
    posterior = (log_p - evidence).exp() * log_step.exp()  # (nodes, N)
    mean = (posterior * z).sum(0)
    skew = (posterior * (z - mean) ** 3).sum(0) / (posterior * (z - mean) ** 2).sum(0) ** 1.5
    assert skew.abs().max() > 0.3  # of a normal, zero
    assert not hasattr(model, "posterior")

    with torch.no_grad():
        log_q = guide.core(x).log_prob(z.unsqueeze(1))
        kl = (log_q.exp() * (log_q - log_p + evidence)).sum(0) * log_step.exp()  # KL(q || p(z|x)), (N,)
        other = (posterior * (log_p - evidence - log_q)).sum(0)  # the divergence the other way
        draws = torch.stack([elbo_terms(model, guide, x, 50).elbo for _ in range(40)])
        error = draws.std(0) / 40**0.5
        assert ((evidence - kl - draws.mean(0)).abs() < 5 * error).all()
        assert ((evidence - other - draws.mean(0)).abs() > 5 * error).any()
        sampled = log_evidence(model, guide, x, 20000).log_p
        assert torch.allclose(sampled, evidence, atol=0.05)

    parameters = list(model.parameters())
    direct = torch.autograd.grad(evidence.sum(), parameters, retain_graph=True)
    of_em = torch.autograd.grad(
        (posterior.detach() * log_p).sum(), parameters, retain_graph=True
    )  # E_post of log p(x, z)
    of_guide = torch.autograd.grad((log_q.exp() * log_p).sum() * log_step.exp(), parameters)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(direct, of_em, strict=True))
    assert max(float((a - b).abs().max()) for a, b in zip(direct, of_guide, strict=True)) > 0.1


@pytest.mark.slow
@pytest.mark.row("2.5")
def test_training_by_the_bound_comes_near_the_maximum_of_the_likelihood():
    torch.manual_seed(1)
    x = curve()
    best, _ = pair()
    optimizer = torch.optim.Adam(best.parameters(), lr=0.02)
    start = float(by_quadrature(best, x).mean().detach())
    for _ in range(500):
        optimizer.zero_grad()
        (-by_quadrature(best, x, nodes=121, limit=5.0).mean()).backward()
        optimizer.step()
    maximum = float(by_quadrature(best, x).mean().detach())

    model, guide = pair()
    shared = SharedOptimizer(nn.ModuleList([model, guide]).parameters(), torch.optim.Adam, 0.01)
    svi = SVI(model, guide, shared, ELBO(particles=4, kl="analytic"))
    for _ in range(1500):
        svi.step(x)
    reached = float(by_quadrature(model, x).mean().detach())
    assert maximum > start + 0.5
    assert maximum - 0.05 < reached < maximum + 0.02, (start, reached, maximum)
