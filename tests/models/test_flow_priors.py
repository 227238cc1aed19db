"""Priors made of flows: densities, exact inverses, costs in network calls, and flows as models of data."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import norm

from inference.objectives import IWAE
from inference.particles import generate
from models.flow_prior import AutoregressivePrior, CouplingPrior, FlowPrior, InverseAutoregressivePrior, SplinePrior
from models.flows import AutoregressiveLayer, PlanarLayer, pull, push
from models.latent import LatentVariableModel
from models.priors import StandardNormal
from tests.prior_cases import FLOWS, mass, pair, perturbed

# --- flows -------------------------------------------------------------------------------------------------------


def fitted(kind):
    """A prior of two latents after some steps of maximum likelihood on a ring."""
    prior = kind((2,), hidden=(16,))
    angle = 2 * math.pi * torch.rand(256)
    ring = torch.stack([angle.cos(), angle.sin()], -1) * 2 + 0.3 * torch.randn(256, 2)
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = -prior().log_prob(ring).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    return prior


@pytest.mark.row("4.32", "4.33", "5.4")
@pytest.mark.parametrize("kind", FLOWS)
def test_a_trained_flow_prior_is_a_density_and_its_maps_invert(kind):
    prior = fitted(kind)
    assert mass(prior, 8.0, 301) == pytest.approx(1, abs=1e-3)
    with torch.no_grad():
        noise = torch.randn(30, 2)
        z, log_det = noise, torch.zeros(30)
        for layer in prior.layers:
            z, step = push(layer(), z)
            log_det = log_det + step
        back = z
        for layer in reversed(prior.layers):
            back, _ = pull(layer(), back)
    assert torch.allclose(back, noise, atol=1e-8)
    assert (z - noise).abs().max() > 0.1
    whole = lambda v: [v := push(layer(), v)[0] for layer in prior.layers][-1]  # noqa: E731
    for i in range(10):
        jacobian = torch.autograd.functional.jacobian(whole, noise[i])
        assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(log_det[i].item(), abs=1e-6)
    expected = norm.logpdf(noise).sum(-1) - log_det.numpy()  # log p(f(z)) + log |det J_f|, f from z to noise
    assert np.allclose(prior().log_prob(z).detach(), expected, atol=1e-8)


@pytest.mark.row("4.35", "5.4")
@pytest.mark.parametrize("kind", FLOWS)
def test_an_untrained_flow_prior_gives_the_bound_of_the_standard_normal(kind):
    x = torch.randn(6, 3)
    model, guide = pair(kind((2,)), x)
    standard = LatentVariableModel(StandardNormal((2,)), model.likelihood)
    bounds = []
    for one in (model, standard, LatentVariableModel(perturbed(kind((2,))), model.likelihood)):
        torch.manual_seed(1)
        bounds.append(IWAE(4)(one, guide, x))
    assert torch.allclose(bounds[0], bounds[1], atol=1e-10)
    assert not torch.allclose(bounds[2], bounds[1], atol=1e-3)
    torch.manual_seed(1)
    one = generate(model, torch.zeros(4, 3))[0]["z"]
    torch.manual_seed(1)
    assert torch.allclose(one, generate(standard, torch.zeros(4, 3))[0]["z"], atol=1e-10)


@pytest.mark.row("4.33", "4.34")
@pytest.mark.parametrize(
    ("kind", "to_score", "to_draw"),
    [
        (CouplingPrior, 1, 1),
        (SplinePrior, 1, 1),
        (AutoregressivePrior, 1, 5),
        (InverseAutoregressivePrior, 5, 1),
    ],
)
def test_network_calls(kind, to_score, to_draw):
    prior = perturbed(kind((5,), transforms=3, hidden=(8,)))
    calls = []
    for layer in prior.layers:
        getattr(layer, "layer", layer).hyper.register_forward_hook(lambda *_: calls.append(1))
    prior().log_prob(torch.randn(4, 5))
    assert len(calls) == 3 * to_score
    calls.clear()
    prior().sample((4,))
    assert len(calls) == 3 * to_draw


@pytest.mark.row("4.34")
def test_the_scoring_map_of_an_autoregressive_prior_is_triangular():
    (layer,) = perturbed(AutoregressivePrior((5,), transforms=1)).layers
    jacobian = torch.autograd.functional.jacobian(lambda z: pull(layer(), z)[0], torch.randn(5))
    assert torch.equal(jacobian, jacobian.tril())
    assert (jacobian.tril(-1) != 0).any()


def test_any_layers_make_a_prior():
    prior, grid = FlowPrior((1,), [PlanarLayer(1), PlanarLayer(1)]), torch.linspace(-5, 5, 101)
    assert torch.allclose(prior().log_prob(grid[:, None]), dist.Normal(0.0, 1.0).log_prob(grid), atol=1e-10)
    assert mass(perturbed(prior), 20.0, 8001) == pytest.approx(1, abs=1e-6)


# --- a flow as a model of data -----------------------------------------------------------------------------------


@pytest.mark.row("4.7", "4.8")
def test_a_flow_is_what_becomes_of_an_autoencoder_without_noise():
    """Encoder f and decoder g = f^-1, both with noise s: as s goes to zero, row by row of VAE against flow."""
    layers = [perturbed(AutoregressiveLayer(2, backwards=b, hidden=(8,)), 0.2) for b in (False, True)]
    x, noise = torch.tensor([0.7, -0.4]), torch.randn(5000, 2)
    noise = torch.cat([noise, -noise])

    def encode(x):
        log_det = torch.zeros(x.shape[:-1])
        for layer in layers:
            x, step = push(layer(), x)
            log_det = log_det + step
        return x, log_det

    def decode(z):
        for layer in reversed(layers):
            z, _ = pull(layer(), z)
        return z

    with torch.no_grad():
        z, log_det = encode(x)
        evidence = norm.logpdf(z).sum() + log_det.item()
        assert torch.allclose(decode(z), x, atol=1e-8)  # decoder and encoder are each other's inverse
        spreads, gaps = [], []
        for scale in (0.04, 0.02):
            seen = x + scale * noise
            codes, log_det = encode(seen)
            spreads.append(codes.std(0))  # the encoder becomes a function
            log_q = norm.logpdf(noise).sum(-1) - 2 * math.log(scale) - log_det.numpy()
            log_likelihood = norm.logpdf(x, decode(codes), scale).sum(-1)
            log_weight = norm.logpdf(codes).sum(-1) + log_likelihood - log_q
            assert np.allclose(log_weight, norm.logpdf(codes).sum(-1) + log_det.numpy(), atol=1e-8)
            gaps.append(evidence - log_weight.mean())
        assert torch.allclose(spreads[0] / spreads[1], torch.tensor(2.0), rtol=0.02)
        assert abs(gaps[0]) > 1e-5
        assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.05)  # the bound becomes the likelihood
