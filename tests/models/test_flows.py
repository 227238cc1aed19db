"""Flows: normalized, invertible, and clean of what the libraries' caches leave behind."""

import copy
import itertools
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as pyro_transforms
from torch import nn

from models.flows import (
    AutoregressiveLayer,
    CouplingLayer,
    Flow,
    PlanarLayer,
    PyroLayer,
    SylvesterLayer,
    pull,
    push,
    spline_layer,
)
from models.likelihoods import FixedGaussian

OURS = {
    "planar": PlanarLayer,
    "sylvester": SylvesterLayer,
    "coupling": partial(CouplingLayer, hidden=(6,)),
    "spline": partial(spline_layer, hidden=(6,), bins=4),
    "autoregressive": partial(AutoregressiveLayer, hidden=(6,)),
}
PYRO = {
    "pyro coupling": lambda dim, context_dim: PyroLayer(pyro_transforms.affine_coupling(dim, hidden_dims=[8])),
    "pyro autoregressive": lambda dim, context_dim: PyroLayer(pyro_transforms.affine_autoregressive(dim, [8])),
    "pyro conditional coupling": lambda dim, context_dim: PyroLayer(
        pyro_transforms.conditional_affine_coupling(dim, context_dim, hidden_dims=[8])
    ),
}
LAYERS = OURS | PYRO


def perturbed(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            parameter.add_(0.4 * torch.randn_like(parameter) / fan_in**0.5)
    return layer


@pytest.fixture(params=LAYERS)
def layer(request):
    return perturbed(LAYERS[request.param](3, 2))


def standard(dim, batch=()):
    return dist.Normal(torch.zeros(*batch, dim), 1.0).to_event(1)


@pytest.mark.row("4.32", "4.33")
def test_inverse_and_determinant(layer):
    context, x = torch.randn(20, 2), 2 * torch.randn(20, 3)
    y, log_det = push(layer(context), x)
    back, log_det_back = pull(layer(context), y)
    assert (y - x).abs().max() > 0.1
    assert torch.allclose(back, x, atol=1e-8)
    assert torch.allclose(log_det_back, log_det, atol=1e-8)
    for i in range(20):
        transform = layer(context[i])
        jacobian = torch.autograd.functional.jacobian(lambda v, t=transform: push(t, v)[0], x[i])
        assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(log_det[i].item(), abs=1e-6)


@pytest.mark.row("4.32")
@pytest.mark.parametrize("name", OURS)
def test_density_integrates_to_one(name):
    layers = [perturbed(OURS[name](2, 0)) for _ in range(2)]
    flow = Flow(standard(2), [layer() for layer in layers])
    grid = torch.linspace(-10, 10, 501)
    z = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        density = flow.log_prob(z).exp().reshape(501, 501)
    mass = torch.trapezoid(torch.trapezoid(density, grid), grid)
    assert mass.item() == pytest.approx(1, abs=1e-3)
    assert (density - standard(2).log_prob(z).exp().reshape(501, 501)).abs().max() > 0.01


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_starts_as_the_identity(name, context_dim):
    layer = OURS[name](3, context_dim)
    context = torch.randn(5, 2) if context_dim else None
    base, z = standard(3, (5,)), torch.randn(5, 3)
    flow = Flow(base, [layer(context)])
    assert torch.allclose(flow.log_prob(z), base.log_prob(z), atol=1e-12)
    torch.manual_seed(1)
    draw = flow.rsample()
    torch.manual_seed(1)
    assert torch.allclose(draw, base.rsample(), atol=1e-12)


def test_gradients_of_foreign_values(layer):
    context, z = torch.randn(2, 2), torch.randn(2, 3, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def score(z, *parameters):
        made = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (context,))
        return Flow(standard(3), [made]).log_prob(z)

    if isinstance(layer, PyroLayer):
        pytest.skip("Pyro's own derivative")
    assert torch.autograd.gradcheck(score, (z, *values), atol=1e-6)


def test_a_draw_scores_as_any_other_value(layer):
    context = torch.randn(4, 2)
    flow = Flow(standard(3, (4,)), [layer(context)])
    z = flow.rsample((2,))
    known, found = flow.log_prob(z), flow.log_prob(z.clone())
    assert torch.allclose(known, found, atol=1e-8)
    parameters = list(layer.parameters())
    first = torch.autograd.grad(known.sum(), parameters, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(found.sum(), parameters, allow_unused=True)
    for one, other in zip(first, second, strict=True):
        other = torch.zeros_like(one) if other is None else other
        assert torch.allclose(one, other, atol=1e-7)


def test_no_old_graph_is_met(layer):
    context = torch.randn(4, 2)
    flow = Flow(standard(3, (4,)), [layer(context)])
    z = flow.sample()
    for _ in range(2):
        flow.log_prob(z).sum().backward(retain_graph=True)
    gradient = next(layer.parameters()).grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    for _ in range(2):  # a second step, on the same data object
        Flow(standard(3, (4,)), [layer(context)]).log_prob(z).sum().backward()
    copied = copy.deepcopy(layer)  # Pyro's modules could not be copied after use
    assert torch.equal(Flow(standard(3), [copied(context)]).log_prob(z), flow.log_prob(z))


def test_expanding_repeats(layer):
    context = torch.randn(4, 2)
    flow = Flow(standard(3, (4,)), [layer(context)])
    wide = flow.expand((5, 4))
    z = wide.sample()
    assert z.shape == (5, 4, 3)
    assert torch.allclose(wide.log_prob(z), flow.log_prob(z), atol=1e-8)
    assert torch.allclose(wide.log_prob(z.clone())[2], flow.log_prob(z[2]), atol=1e-8)
    assert not torch.equal(z[0], z[1])


def count_calls(network):
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.row("4.34")
def test_autoregressive_jacobian_is_triangular_and_scoring_is_sequential():
    dim = 5
    layer = perturbed(AutoregressiveLayer(dim))
    calls = count_calls(layer.hyper)
    flow = Flow(standard(dim), [layer()])
    z = flow.rsample()
    flow.log_prob(z)
    assert len(calls) == 1
    flow.log_prob(z.clone())
    assert len(calls) == 1 + dim
    jacobian = torch.autograd.functional.jacobian(lambda v: layer()(v), torch.randn(dim))
    assert torch.equal(jacobian, jacobian.tril())
    assert (jacobian.tril(-1) != 0).any()
    backwards = perturbed(AutoregressiveLayer(dim, backwards=True))
    jacobian = torch.autograd.functional.jacobian(lambda v: backwards()(v), torch.randn(dim))
    assert torch.equal(jacobian, jacobian.triu())


@pytest.mark.row("4.33", "4.34")
@pytest.mark.parametrize("make", [CouplingLayer, spline_layer])
def test_a_coupling_is_one_call_either_way(make):
    layer = perturbed(make(5))
    calls = count_calls(layer.hyper)
    flow = Flow(standard(5), [layer()])
    flow.log_prob(flow.rsample())
    assert len(calls) == 1
    flow.log_prob(torch.randn(5))
    assert len(calls) == 2
    transform, x = layer(), torch.randn(5)
    kept = layer.kept
    assert torch.equal(transform(x)[kept], x[kept])


def test_steep_maps_are_inverted():
    for scale, name in itertools.product((3.0, 30.0), ("planar", "sylvester")):
        layer = OURS[name](3, 0)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(scale * torch.randn_like(parameter))
        x = 3 * torch.randn(500, 3)
        y, _ = push(layer(), x)
        again, _ = push(layer(), pull(layer(), y)[0])
        assert torch.allclose(again, y, atol=1e-8)


@pytest.mark.parametrize("make", [CouplingLayer, spline_layer, AutoregressiveLayer])
def test_one_dimension_is_refused(make):
    with pytest.raises(
        ValueError, match="at least 2 dimensions, got 1; accepted with 1: guide=planar, or prior=mixture"
    ):
        make(1)


class Linear(nn.Module):
    """z -> A z, as a decoder."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, z):
        return z @ self.matrix.T


class Inverse(nn.Module):
    """The decoder that undoes the transforms of a flow."""

    def __init__(self, transforms):
        super().__init__()
        self.transforms = transforms

    def forward(self, z):
        for transform in reversed(self.transforms):
            z, _ = pull(transform, z)
        return z


def bound_per_draw(x, scale, decoder, transforms, noise):
    """The log-weights of q(z|x) = f(N(x, s^2)) against p(z) = N(0, I), p(x|z) = N(f^-1(z), s^2)."""
    base = dist.Normal(x, scale).to_event(1)
    q = Flow(base, transforms)
    z = x + scale * noise
    for transform in transforms:
        z, _ = push(transform, z)
    likelihood = FixedGaussian((2,), (2,), lambda *_: decoder, scale=scale)
    return likelihood(z).log_prob(x) + standard(2).log_prob(z) - q.log_prob(z)


@pytest.mark.row("4.8")
def test_a_flow_is_a_vae_with_a_deterministic_pair():
    layers = [perturbed(CouplingLayer(2, odd=odd)) for odd in (True, False)]
    transforms = [layer() for layer in layers]
    x, noise = torch.randn(2), torch.randn(20_000, 2)
    noise = torch.cat([noise, -noise])  # odd terms cancel: the gap is of second order in the scale
    data_flow = Flow(standard(2), [transform.inv for transform in reversed(transforms)])
    with torch.no_grad():
        exact = data_flow.log_prob(x)
        gaps = []
        for scale in (0.04, 0.02):
            weights = bound_per_draw(x, scale, Inverse(transforms), transforms, noise)
            assert torch.allclose(weights, data_flow.log_prob(x + scale * noise), atol=1e-10)
            gaps.append((exact - weights.mean()).item())
    assert abs(gaps[0]) > 1e-5
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.05)


@pytest.mark.row("4.8")
def test_the_gap_of_a_linear_flow():
    scale, lower = 0.3, torch.tensor([[1.5, 0.0], [0.4, 0.7]])
    transform = dist.transforms.LowerCholeskyAffine(torch.zeros(2), lower)
    inverse = Linear(torch.linalg.inv(lower))
    nodes = torch.cartesian_prod(torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0]))  # exact for quadratics
    x = torch.randn(2)
    bound = bound_per_draw(x, scale, inverse, [transform], nodes).mean()
    evidence = standard(2).log_prob(lower @ x) + torch.linalg.slogdet(lower)[1]
    gap = scale**2 * (lower @ lower.T).trace() / 2
    assert (evidence - bound).item() == pytest.approx(gap.item(), abs=1e-10)
