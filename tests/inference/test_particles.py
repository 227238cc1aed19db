"""Particles against log-densities computed by hand on the values drawn, and the programs they refuse."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import Bernoulli, Normal, kl_divergence

from inference.particles import (
    StructureError,
    guess_max_plate_nesting,
    particles,
)
from tests.pairs import binary, composed
from tests.programs import (
    HierarchicalGuide,
    HierarchicalModel,
    SubsampledGuide,
    SubsampledModel,
)


@pytest.mark.parametrize("num_particles", [1, 2, 5])
def test_composed_programs_score_their_draws(num_particles):
    (model, guide), x = composed(), binary(4, 5)
    draws = particles(model, guide, x, num_particles)
    z = draws.latents["z"].value.reshape(num_particles, 4, 2)
    loc, log_scale = guide.core.net(x).chunk(2, -1)
    expected_q = Normal(loc, log_scale.exp()).log_prob(z).sum(-1)
    expected_prior = Normal(model.prior.loc, model.prior.log_scale.exp()).log_prob(z).sum(-1)
    expected_likelihood = Bernoulli(logits=model.likelihood.net(z)).log_prob(x).sum(-1)
    for found, expected in [
        (draws.log_q, expected_q),
        (draws.log_prior, expected_prior),
        (draws.log_likelihood, expected_likelihood),
        (draws.log_weight, expected_likelihood + expected_prior - expected_q),
    ]:
        assert found.shape == (num_particles, 4)
        assert torch.allclose(found, expected, atol=1e-12)
    assert draws.data_scale == 1
    assert draws.reparameterized
    assert draws.same_order
    if num_particles > 1:
        assert z.std(0).min() > 0


@pytest.mark.parametrize("num_particles", [1, 4])
def test_hand_written_hierarchies_work_as_composed_models_do(num_particles):
    model, guide, x = HierarchicalModel(), HierarchicalGuide(), torch.randn(6, 5)
    draws = particles(model, guide, x, num_particles)
    shape = (num_particles, 6)
    top, bottom = (draws.latents[name].value.reshape(*shape, -1) for name in ("top", "bottom"))
    prior = Normal(0.0, 1.0).log_prob(top).sum(-1) + Normal(model.a(top), 0.5).log_prob(bottom).sum(-1)
    likelihood = Normal(model.b(bottom).tanh(), model.log_scale.exp()).log_prob(x).sum(-1)
    loc, raw = guide.first(x).chunk(2, -1)
    log_q = Normal(loc, (0.3 * raw).exp()).log_prob(top).sum(-1)
    loc2, raw2 = guide.second(torch.cat([x.expand(*shape, 5), top], -1)).chunk(2, -1)
    log_q = log_q + Normal(loc2, (0.3 * raw2).exp()).log_prob(bottom).sum(-1)
    assert torch.allclose(draws.log_prior, prior, atol=1e-12)
    assert torch.allclose(draws.log_likelihood, likelihood, atol=1e-12)
    assert torch.allclose(draws.log_q, log_q, atol=1e-12)
    kl = kl_divergence(Normal(loc, (0.3 * raw).exp()), Normal(0.0, 1.0)).sum(-1)
    kl = kl + kl_divergence(Normal(loc2, (0.3 * raw2).exp()), Normal(model.a(top), 0.5)).sum(-1)
    assert torch.allclose(draws.analytic_kl(), kl, atol=1e-12)


def test_a_guide_in_the_opposite_order_has_no_closed_form_kl():
    draws = particles(HierarchicalModel(), HierarchicalGuide(upwards=True), torch.randn(6, 5), 3)
    assert not draws.same_order
    assert draws.log_weight.shape == (3, 6)
    with pytest.raises(StructureError, match="model's order"):
        draws.analytic_kl()


class PixelModel:
    """Pixels in a plate of their own, outside of the data, and a latent for each of them."""

    def __init__(self, pixels=4, observed=None):
        self.pixels, self.observed = pixels, observed

    def __call__(self, x):
        pixels, data = pyro.plate("pixels", self.pixels, dim=-2), pyro.plate("data", x.shape[0], dim=-1)
        with data:
            shift = pyro.sample("shift", dist.Normal(0.5, 2.0))
            with pixels:
                z = pyro.sample("z", dist.Normal(shift, 1.0))
                with poutine.mask(mask=True if self.observed is None else self.observed.T):
                    pyro.sample("x", dist.Normal(z, 0.7), obs=x.T)


def pixel_guide(x):
    with pyro.plate("data", x.shape[0], dim=-1):
        pyro.sample("shift", dist.Normal(x.mean(1), 1.5))
        with pyro.plate("pixels", x.shape[1], dim=-2):
            pyro.sample("z", dist.Normal(0.5 * x.T, 0.9))


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("missing", [False, True])
def test_nested_plates_and_masks(num_particles, missing):
    x, observed = torch.randn(6, 4), torch.rand(6, 4) > 0.4 if missing else torch.ones(6, 4, dtype=torch.bool)
    model = PixelModel(observed=observed if missing else None)
    assert guess_max_plate_nesting(model, pixel_guide, x) == 2
    draws = particles(model, pixel_guide, x, num_particles, max_plate_nesting=2)
    z = draws.latents["z"].value.reshape(num_particles, 4, 6)
    shift = draws.latents["shift"].value.reshape(num_particles, 1, 6)
    likelihood = (Normal(z, 0.7).log_prob(x.T) * observed.T).sum(1)
    prior = Normal(0.5, 2.0).log_prob(shift)[:, 0] + Normal(shift, 1.0).log_prob(z).sum(1)
    log_q = Normal(x.mean(1), 1.5).log_prob(shift)[:, 0] + Normal(0.5 * x.T, 0.9).log_prob(z).sum(1)
    assert torch.allclose(draws.log_likelihood, likelihood, atol=1e-12)
    assert torch.allclose(draws.log_prior, prior, atol=1e-12)
    assert torch.allclose(draws.log_q, log_q, atol=1e-12)
    kl = kl_divergence(Normal(x.mean(1), 1.5), Normal(0.5, 2.0))
    kl = kl + kl_divergence(Normal(0.5 * x.T, 0.9), Normal(shift, 1.0)).sum(1)
    assert torch.allclose(draws.analytic_kl(), kl, atol=1e-12)


def masked(program, mask):
    def run(x):
        with poutine.mask(mask=mask):
            return program(x)

    return run


def test_masked_latents_count_for_nothing_in_either_kl():
    (model, guide), x, mask = composed(), binary(4, 5), torch.tensor([True, False, True, False])
    pyro.set_rng_seed(3)
    whole = particles(model, guide, x, 2)
    pyro.set_rng_seed(3)
    part = particles(masked(model, mask), masked(guide, mask), x, 2)
    assert torch.allclose(part.log_weight, whole.log_weight * mask, atol=1e-12)
    assert torch.allclose(part.analytic_kl(), whole.analytic_kl() * mask, atol=1e-12)
    one_sided = particles(masked(model, mask), guide, x, 2)
    with pytest.raises(StructureError, match="only one of model and guide masks site 'z'"):
        one_sided.analytic_kl()


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_programs_that_subsample_the_data_themselves(num_particles, batch):
    x = torch.randn(10, 3)
    model, guide = SubsampledModel(batch=batch), SubsampledGuide(batch=batch)
    draws = particles(model, guide, x, num_particles)
    assert draws.data_scale == 10 / batch
    assert draws.log_weight.shape == (num_particles, batch)
    index = torch.tensor([7, 2, 4, 0, 9])[:batch]
    draws = particles(model, guide, x, num_particles, subsample=index)
    z = draws.latents["z"].value.reshape(num_particles, batch, 2)
    expected = Normal(model.decoder(z), model.log_scale.exp()).log_prob(x[index]).sum(-1)
    assert torch.allclose(draws.log_likelihood, expected, atol=1e-12)  # unscaled


def test_a_batch_of_a_larger_data_set():
    def model(x):
        with pyro.plate("data", 1000, subsample_size=x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 1000, subsample_size=x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0))

    draws = particles(model, guide, torch.randn(8), 3)
    assert draws.data_scale == 125
    z = draws.latents["z"].value
    assert torch.allclose(draws.log_prior, Normal(0.0, 1.0).log_prob(z), atol=1e-12)


def test_labels_follow_the_data_into_both_programs():
    """p(x|z, y) and q(z|x, y): a conditional model gets what it is conditional on as a further argument."""

    def model(x, y, sharpness=1.0):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z * y, sharpness), obs=x)

    def guide(x, y, sharpness=1.0):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(x + y, sharpness))

    x, y = torch.randn(5), torch.randn(5)
    draws = particles(model, guide, x, 4, y, sharpness=0.5)
    z = draws.latents["z"].value
    assert torch.allclose(draws.log_likelihood, Normal(z * y, 0.5).log_prob(x), atol=1e-12)
    assert torch.allclose(draws.log_prior, Normal(y, 1.0).log_prob(z), atol=1e-12)
    assert torch.allclose(draws.log_q, Normal(x + y, 0.5).log_prob(z), atol=1e-12)
