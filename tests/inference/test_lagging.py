"""Encoders that lag behind, and collapse where a decoder needs no latent: exact on linear models and on tables."""

import numpy as np
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

from guides.enumerated import amortized, uniform
from inference.ascent import ascend
from inference.diagnostics import surgery
from inference.em import free_energy
from models.nets import Linear
from models.ppca import PPCA
from models.tabular import TabularVAE

OUTER, RATE = 12, 0.05


def data():
    rng = np.random.default_rng(0)
    return torch.tensor(rng.normal(size=(80, 1)) @ rng.normal(size=(1, 4)) + 0.7 * rng.normal(size=(80, 4)))


def started(x):
    model = PPCA((4,), 1)
    model.initialize(x, torch.Generator().manual_seed(0))
    return model, Encoder()


def climb(model, objective):
    """One gradient step of a program's parameters."""
    parameters = list(model.parameters())
    for p, g in zip(parameters, torch.autograd.grad(objective(), parameters), strict=True):
        p.data.add_(RATE * g)


class Encoder(torch.nn.Module):
    """q(z|x) = N(x weight + bias, exp(log_scale)^2): the posterior of the linear model is among them."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 1), (1,)))
        self.log_scale = torch.nn.Parameter(torch.zeros(1))


def elbo(model, q, x):
    """The bound of the linear model, nats per datum, in closed form."""
    p, loc, square = model.likelihood, x @ q.weight + q.bias, (2 * q.log_scale).exp()
    residual = (x - p.loc - loc @ p.weight.T).square().sum(1) + square * p.weight.square().sum()
    variance = p.scale.square()
    fit = -0.5 * (4 * torch.log(2 * torch.pi * variance) + residual / variance)
    return (fit - 0.5 * (square + loc.square().squeeze(1) - 1 - 2 * q.log_scale)).mean()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def gem_trace(x):
    """Generalized EM: the exact E step, then a gradient step on the expected log-joint."""
    model, _ = started(x)
    trace = []
    for _ in range(OUTER):
        statistics, _ = model.e_step(x)
        climb(model, lambda statistics=statistics: model.expected_log_joint(statistics) / len(x))
        trace.append(flat(model))
    return torch.stack(trace)


def vae_trace(x, inner):
    """A network as q, which takes ``inner`` steps on the bound before each of the model's; 0 for as many as it needs.

    Also KL(q || posterior) before each step of the model, nats per datum.
    """
    model, guide = started(x)
    trace, gaps = [], []
    bound = lambda: elbo(model, guide, x)  # noqa: E731
    for _ in range(OUTER):
        if inner:
            for _ in range(inner):
                climb(guide, bound)
        else:
            ascend(guide.parameters(), bound, 150)
        gaps.append(float((model.log_evidence(x).mean() - bound()).detach()))
        climb(model, bound)
        trace.append(flat(model))
    return torch.stack(trace), np.array(gaps)


@pytest.mark.row("1.24")
def test_an_encoder_that_catches_up_before_each_step_makes_the_model_follow_generalized_em():
    x = data()
    gem = gem_trace(x)
    assert (gem[-1] - gem[0]).abs().max() > 0.1, "the model stood still"
    converged, no_gap = vae_trace(x, 0)
    assert torch.allclose(converged, gem, atol=1e-5)
    assert no_gap.max() < 1e-8
    lagging = {inner: vae_trace(x, inner) for inner in (1, 4, 16)}
    assert (lagging[1][0] - gem).abs().max() > 1e-2
    gaps = np.stack([lagging[inner][1] for inner in (1, 4, 16)])
    assert np.all(np.diff(gaps, axis=0) < 0), "more inner steps leave a smaller divergence at every step of the model"
    distance = [float((lagging[inner][0][-1] - gem[-1]).norm()) for inner in (1, 4, 16)]
    assert distance == sorted(distance, reverse=True)


def table(rows):
    """Zeros and ones ``(N, 2)`` of four kinds, as often as ``rows`` says."""
    kinds = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    return kinds.repeat_interleave(torch.tensor(rows), 0)


@pytest.mark.row("1.20", "3.19")
def test_a_universal_decoder_that_ignores_the_latent_pays_the_entropy_and_tells_nothing():
    """P(y|z) = Pop(y) and Q = P: the bound is -H(y), I(y; z) = 0; a decoder that uses z has both terms, as a control.

    Two independent pixels, so that a product of Bernoullis is universal for this population.
    """
    x = table([18, 6, 9, 3])  # P(first) = 1/3, P(second) = 1/4
    population = np.array([18, 6, 9, 3]) / 36
    entropy = -(population * np.log(population)).sum()
    model = TabularVAE((2,), 3)
    guide = uniform(model, (2,))
    with torch.no_grad():
        model.pixel_logits.copy_(torch.logit(torch.tensor([1 / 3, 1 / 4])).expand(3, 2))
    bound = -TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x) / len(x)
    assert bound == pytest.approx(-entropy, abs=1e-9)
    assert float(model.log_evidence(x).mean().detach()) == pytest.approx(bound, abs=1e-9)  # no better bound exists
    parts = surgery(model, guide.eval(), x)
    assert abs(parts.mutual_information) < 1e-3
    assert abs(parts.kl) < 1e-12
    seeing = amortized(model, (2,), Linear)
    with torch.no_grad():
        seeing.core.net.output.weight.copy_(torch.tensor([[6.0, 0.0], [-6.0, 0.0], [0.0, 0.0]]))
    q = seeing.core(x).probs.detach()
    below = float(free_energy(model, model.statistics(x, q)).detach()) / len(x)
    assert below < bound - 0.1, "a q that looks at x costs its KL and gains nothing"
    assert surgery(model, seeing.eval(), x).mutual_information > 0.1
