"""Two layers of latents: scored by hand, in either order of inference."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from guides.gaussian import DiagonalNormal
from guides.hierarchical import BottomUp, Ladder, TopDown, merged
from inference.particles import StructureError, decode, encode, generate, particles
from models.hierarchical import TwoLayerModel
from models.likelihoods import FixedGaussian
from models.nets import MLP, Linear
from models.ppca import PPCA
from models.priors import LearnedNormal

X, Z1, Z2, N, K = 5, 3, 2, 4, 3
GUIDES = {
    "bottom_up": partial(BottomUp, hidden=(6,)),
    "top_down": partial(TopDown, features=4, hidden=(6,)),
    "ladder": partial(Ladder, features=4, hidden=(6,)),
}


def two_layer(skip=False):
    middle = DiagonalNormal((Z1,), (Z2,), partial(MLP, hidden=(6,)))
    likelihood = FixedGaussian((X,), (Z1 + Z2 * skip,), Linear, scale=0.7)
    model = TwoLayerModel(LearnedNormal((Z2,)), middle, likelihood, skip)
    with torch.no_grad():
        model.top.loc.normal_()
        model.top.log_scale.normal_()
    return model


def log_normal(value, loc, scale):
    return stats.norm.logpdf(*(tensor.detach().numpy() for tensor in (value, loc, scale))).sum(-1)


def log_diagonal(value, core, context):
    loc, log_scale = core.net(context).chunk(2, dim=-1)
    return log_normal(value, loc, log_scale.exp())


def log_q_by_hand(name, guide, model, x, z1, z2):
    if name == "bottom_up":
        return log_diagonal(z1, guide.first, x) + log_diagonal(z2, guide.second, z1)
    if name == "top_down":
        features = guide.encoder(x).tanh()
        both = torch.cat([features.expand(K, N, 4), z2], -1)
        return log_diagonal(z2, guide.second, features.expand(K, N, 4)) + log_diagonal(z1, guide.first, both)
    loc, log_scale, features = guide.encoder(x).split([Z1, Z1, 4], dim=-1)
    top, other_log_scale = model.middle.net(z2).chunk(2, dim=-1)
    precision, other = (-2 * log_scale).exp(), (-2 * other_log_scale).exp()
    mean = (precision * loc + other * top) / (precision + other)
    return log_diagonal(z2, guide.second, features.tanh().expand(K, N, 4)) + log_normal(
        z1, mean, (precision + other) ** -0.5
    )


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", GUIDES)
def test_every_term_by_hand(name, skip):
    model, x = two_layer(skip), torch.randn(N, X)
    guide = GUIDES[name]((X,), Linear, model)
    draws = particles(model, guide, x, K)
    z1, z2 = draws.latents["z1"].value, draws.latents["z2"].value
    assert z1.shape == (K, N, Z1)
    assert z2.shape == (K, N, Z2)
    prior = log_normal(z2, model.top.loc, model.top.log_scale.exp()) + log_diagonal(z1, model.middle, z2)
    decoded = model.likelihood.net(torch.cat([z1, z2], -1) if skip else z1)
    assert np.allclose(draws.log_prior.detach(), prior, atol=1e-10)
    assert np.allclose(draws.log_q.detach(), log_q_by_hand(name, guide, model, x, z1, z2), atol=1e-10)
    assert np.allclose(draws.log_likelihood.detach(), log_normal(x, decoded, torch.tensor(0.7)), atol=1e-10)


@pytest.mark.parametrize("name", ["top_down", "ladder"])
def test_the_closed_form_kl_is_the_mean_log_ratio(name):
    model, x = two_layer(), torch.randn(1, X)
    guide, count = GUIDES[name]((X,), Linear, model), 100_000
    with torch.no_grad():
        draws = particles(model, guide, x, count)
        kl = draws.analytic_kl()  # conditional on z2: it varies with the draws as well
        ratio = draws.log_q - draws.log_prior
    error = (ratio - kl).std() / count**0.5
    assert (ratio.mean() - kl.mean()).abs() < 5 * error
    assert kl.mean() > 20 * error


def test_no_closed_form_kl_against_the_models_order():
    model, x = two_layer(), torch.randn(N, X)
    guide = GUIDES["bottom_up"]((X,), Linear, model)
    with pytest.raises(StructureError, match=r"sample its latents in the model's order; use objective.kl=monte_carlo"):
        particles(model, guide, x).analytic_kl()


def test_merging_is_multiplying_densities():
    one, other = (torch.distributions.Normal(torch.randn(1), torch.rand(1) + 0.3) for _ in range(2))
    grid = torch.linspace(-10, 10, 4001)
    product = (one.log_prob(grid) + other.log_prob(grid)).exp()
    product = product / torch.trapezoid(product, grid)
    assert torch.allclose(merged(one, other).log_prob(grid[:, None]).exp(), product, atol=1e-10)


@pytest.mark.parametrize("skip", [False, True])
def test_generation_and_decoding(skip):
    model, like = two_layer(skip), torch.zeros(6, X)
    latents, p_x, x = generate(model, like)
    assert {name: z.shape for name, z in latents.items()} == {"z2": (6, Z2), "z1": (6, Z1)}
    assert x.shape == like.shape
    assert torch.equal(decode(model, latents, like).mean, p_x.mean)
    assert list(encode(GUIDES["ladder"]((X,), Linear, model), like)) == ["z2", "z1"]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="accepted: model=two_layer"):
        BottomUp((X,), Linear, PPCA((X,), Z1))
    model = two_layer()
    with pytest.raises(ValueError, match=r"latents of shape \(3,\), accepted: \(5,\)"):
        TwoLayerModel(model.top, model.middle, model.likelihood, skip=True)
    with pytest.raises(ValueError, match=r"p\(z1\|z2\) reads \(2,\), z2 has shape \(4,\)"):
        TwoLayerModel(LearnedNormal((4,)), model.middle, model.likelihood)
    model.middle = LearnedNormal((Z1,))
    with pytest.raises(ValueError, match="whose p"):
        Ladder((X,), Linear, model)
