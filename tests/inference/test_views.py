"""Generating, decoding and encoding with any pair of programs, against the nets and distributions inside."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import Normal

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference.particles import (
    StructureError,
    cross_log_q,
    decode,
    encode,
    generate,
    guess_max_plate_nesting,
    particles,
)
from models import likelihoods
from models.latent import LatentVariableModel
from models.nets import Linear
from models.ppca import PPCA
from models.priors import StandardNormal
from tests.pairs import binary, composed
from tests.programs import (
    HierarchicalGuide,
    HierarchicalModel,
)


@pytest.mark.row("0.12", "4.6")
def test_generation_uses_no_guide_and_conditions_on_nothing():
    model = PPCA((3,), 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
        model.likelihood.log_scale.fill_(-0.5)

    def guide(x):
        raise AssertionError("generation called the guide")

    count = 20_000
    with pytest.raises(AssertionError, match="called the guide"):
        particles(model, guide, torch.zeros(2, 3))  # so would generation, if it ran one
    with torch.no_grad(), poutine.trace() as seen:
        latents, p, x = generate(model, torch.full((count, 3), torch.nan))  # no entry of it can have been read
    assert not any(site["is_observed"] for site in seen.trace.nodes.values() if site["type"] == "sample")
    z = latents["z"]
    assert set(latents) == {"z"}
    assert z.shape == (count, 2)
    assert x.shape == (count, 3)
    assert torch.allclose(p.mean, z @ model.likelihood.weight.T + model.likelihood.loc, atol=1e-12)
    expected = (model.likelihood.weight @ model.likelihood.weight.T + model.likelihood.scale**2 * torch.eye(3)).detach()
    centred = x - model.likelihood.loc.detach()
    products = centred.unsqueeze(1) * centred.unsqueeze(2)  # (count, 3, 3)
    error = products.std(0) / count**0.5
    assert ((products.mean(0) - expected).abs() < 4 * error).all()
    assert ((products.mean(0) - 1.1 * expected).abs() > 4 * error).any()
    assert (centred.mean(0).abs() < 4 * centred.std(0) / count**0.5).all()


def test_generation_goes_down_a_hierarchy():
    model = HierarchicalModel()
    latents, p, x = generate(model, torch.zeros(7, 5))
    assert {name: value.shape for name, value in latents.items()} == {"top": (7, 2), "bottom": (7, 3)}
    assert torch.allclose(p.mean, model.b(latents["bottom"]).tanh(), atol=1e-12)
    assert not torch.equal(x, p.mean)


def test_generation_and_decoding_need_the_site_x():
    def model(y):
        with pyro.plate("data", y.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(StructureError, match=r"no observed site 'x'; its observed sites are \['y'\]"):
        generate(model, torch.zeros(3))
    with pytest.raises(StructureError, match="no observed site 'x'"):
        decode(model, {"z": torch.zeros(3)}, torch.zeros(3))


def test_decoding_gives_the_likelihood_at_those_latents():
    (model, _), z = composed(), torch.randn(4, 2)
    p = decode(model, {"z": z}, torch.full((4, 5), torch.nan))
    assert p.batch_shape == (4,)
    assert torch.allclose(p.mean, model.likelihood.net(z).sigmoid(), atol=1e-12)
    with pytest.raises(StructureError, match=r"no latent sites \['w'\]; its latent sites are \['z'\]"):
        decode(model, {"w": z}, torch.zeros(4, 5))


def test_decoding_draws_the_latents_that_are_not_given():
    model, top = HierarchicalModel(), torch.full((20_000, 2), 3.0)
    with torch.no_grad():
        mean = torch.atanh(decode(model, {"top": top}, torch.zeros(20_000, 5)).mean.clamp(-1 + 1e-12, 1 - 1e-12))
        expected = model.b(model.a(top))[0]
    error = mean.std(0) / 20_000**0.5
    assert ((mean.mean(0) - expected).abs() < 5 * error).all()
    assert ((mean.mean(0) - model.b(model.a(0 * top))[0]).abs() > 5 * error).any()


def test_encoding_gives_the_posterior_of_each_datum():
    (_, guide), x = composed(), binary(4, 5)
    q = encode(guide, x)["z"]
    assert q.batch_shape == (4,)
    assert torch.allclose(q.mean, guide.core.net(x)[:, :2], atol=1e-12)
    assert list(encode(HierarchicalGuide(), torch.randn(4, 5))) == ["top", "bottom"]


@pytest.mark.parametrize("num_latents", [1, 3])
def test_cross_densities_are_a_double_loop(num_latents):
    guide, x = HierarchicalGuide(), torch.randn(4, 5)
    latents = {"top": torch.randn(num_latents, 2), "bottom": torch.randn(num_latents, 3)}
    found = cross_log_q(guide, latents, x)
    assert found.shape == (num_latents, 4)
    for i in range(num_latents):
        for j in range(4):
            loc, raw = guide.first(x[j]).chunk(2, -1)
            expected = Normal(loc, (0.3 * raw).exp()).log_prob(latents["top"][i]).sum()
            loc, raw = guide.second(torch.cat([x[j], latents["top"][i]])).chunk(2, -1)
            expected = expected + Normal(loc, (0.3 * raw).exp()).log_prob(latents["bottom"][i]).sum()
            assert torch.allclose(found[i, j], expected, atol=1e-12)


def test_looking_at_plate_nesting_draws_no_random_numbers():
    model, guide, x = HierarchicalModel(), HierarchicalGuide(), torch.randn(4, 5)
    state = torch.get_rng_state()
    assert guess_max_plate_nesting(model, guide, x) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_images_and_linear_nets():
    model = LatentVariableModel(StandardNormal((2,)), likelihoods.FixedGaussian((1, 2, 3), (2,), Linear, scale=0.5))
    guide, x = Amortized(DiagonalNormal((2,), (1, 2, 3), Linear)), torch.randn(4, 1, 2, 3)
    draws = particles(model, guide, x, 3)
    z = draws.latents["z"].value
    expected = Normal(model.likelihood.net(z), 0.5).log_prob(x).sum((-3, -2, -1))
    assert torch.allclose(draws.log_likelihood, expected, atol=1e-12)
