"""Particles against log-densities computed by hand on the values drawn, and the programs they refuse."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import Bernoulli, Normal, kl_divergence

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference.particles import (
    StructureError,
    cross_log_q,
    decode,
    encode,
    first_non_finite_site,
    generate,
    guess_max_plate_nesting,
    particles,
)
from models import likelihoods
from models.latent import LatentVariableModel
from models.nets import MLP, Linear
from models.ppca import PPCA
from models.priors import LearnedNormal, StandardNormal
from tests.programs import (
    HierarchicalGuide,
    HierarchicalModel,
    SubsampledGuide,
    SubsampledModel,
    TableGuide,
    TableModel,
)


def composed(event_shape=(5,), latent_dim=2):
    net = lambda i, o: MLP(i, o, (6,))  # noqa: E731
    prior = LearnedNormal((latent_dim,))
    with torch.no_grad():
        prior.loc.normal_()
        prior.log_scale.normal_()
    model = LatentVariableModel(prior, likelihoods.Bernoulli(event_shape, (latent_dim,), net))
    return model, Amortized(DiagonalNormal((latent_dim,), event_shape, net))


def binary(*shape):
    return torch.randint(0, 2, shape).double()


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


# --- what is refused ---------------------------------------------------------------------------------------------


def simple_model(x):
    with pyro.plate("data", x.shape[0], dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1).to_event(1), obs=x)


def simple_guide(x):
    with pyro.plate("data", x.shape[0], dim=-1):
        pyro.sample("z", dist.Normal(x.expand(-1, 2), 1).to_event(1))


def refusal(model, guide, match, num_particles=2, **kw):
    with pytest.raises(StructureError, match=match):
        particles(model, guide, torch.randn(4, 1), num_particles, **kw)


@pytest.mark.parametrize("num_particles", [1, 2])
@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_scales_are_refused(scale, num_particles):
    refusal(poutine.scale(simple_model, scale=scale), simple_guide, "poutine.scale", num_particles)
    refusal(simple_model, poutine.scale(simple_guide, scale=scale), "poutine.scale", num_particles)


def test_a_scale_that_cancels_the_subsampling_is_refused_too():
    model, guide, x = SubsampledModel(batch=2), SubsampledGuide(batch=2), torch.randn(10, 3)
    with pytest.raises(StructureError, match=r"poutine\.scale"):
        particles(poutine.scale(model, scale=0.2), poutine.scale(guide, scale=0.2), x)


def test_a_subsampled_plate_within_the_data_is_refused():
    def model(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            with pyro.plate("words", 10, subsample_size=3, dim=-2) as index:
                pyro.sample("x", dist.Normal(z.sum(-1), 1), obs=torch.zeros(10, 4)[index])

    refusal(model, simple_guide, "site 'x' is scaled by", max_plate_nesting=2)


@pytest.mark.parametrize("num_particles", [1, 4])  # 4 is also the number of data
def test_sites_outside_the_plate_are_refused(num_particles):
    def without_plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(), 1).expand([4, 1]).to_event(2), obs=x)

    def guide_without_plate(x):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))

    def global_latent(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        simple_model(x)

    def global_guide(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        simple_guide(x)

    refusal(without_plate, guide_without_plate, "'z' is outside the plate over the data", num_particles)
    refusal(global_latent, global_guide, "'w' is outside the plate over the data", num_particles)
    nesting = guess_max_plate_nesting(without_plate, guide_without_plate, torch.randn(4, 1))
    refusal(without_plate, guide_without_plate, "outside the plate", num_particles, max_plate_nesting=nesting)


def test_sequential_plates_are_refused():
    def model(x):
        for i in pyro.plate("data", x.shape[0]):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i, 0])

    def guide(x):
        for i in pyro.plate("data", x.shape[0]):
            pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))

    refusal(model, guide, "outside the plate over the data")


def test_missing_and_extra_latents_are_refused():
    def empty(x):
        pass

    def more(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(x.expand(-1, 2), 1).to_event(1))
            pyro.sample("w", dist.Normal(0.0, 1.0))

    refusal(simple_model, empty, r"does not sample the model's latent sites \['z'\]")
    refusal(simple_model, more, r"no latent sites \['w'\] that the guide samples")


def test_enumerated_sites_are_refused():
    from tests import oracles

    oracle = oracles.tiny_discrete_vae()
    x, q = torch.tensor(oracle.data()[:4]), oracles.random_tables(4, 8)
    with pytest.raises(StructureError, match=r"\['z'\] are enumerated.*TraceEnum_ELBO"):
        particles(TableModel(oracle), TableGuide(q, enumerate="parallel"), x)
    model_side = pyro.infer.config_enumerate(TableModel(oracle), default="parallel")
    with pytest.raises(StructureError, match=r"\['z'\] are enumerated"):
        particles(model_side, lambda x: None, x)


def test_a_model_that_observes_nothing_is_refused():
    def model(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))

    refusal(model, simple_guide, "observes nothing")


def test_forgotten_event_dimensions_are_refused_even_where_the_sizes_agree():
    def model(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1).expand([4, 4]), obs=torch.zeros(4, 4))

    refusal(model, simple_guide, r"site 'x' has log-densities of shape \(4, 4\).*to_event", num_particles=1)


def test_plates_of_other_sizes_are_refused():
    def guide(x):
        with pyro.plate("data", 8, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))

    refusal(lambda x: simple_model(x[:1]), guide, "sites disagree about the plate over the data")


def test_numbers_of_particles_and_plates_are_checked():
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1, got {bad}"):
            particles(simple_model, simple_guide, torch.randn(4, 1), bad)
    with pytest.raises(ValueError, match="max_plate_nesting"):
        particles(simple_model, simple_guide, torch.randn(4, 1), 2, max_plate_nesting=0)


def test_auxiliary_sites_count_in_log_q_and_deny_a_closed_form():
    def guide(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            u = pyro.sample("u", dist.Normal(torch.zeros(4, 2), 2).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u / 3, log_density=2 * math.log(3), event_dim=1))

    draws = particles(simple_model, guide, torch.randn(4, 1), 3)
    z = draws.latents["z"].value
    assert torch.allclose(draws.log_q, Normal(0.0, 2 / 3).log_prob(z).sum(-1), atol=1e-12)
    assert draws.reparameterized
    with pytest.raises(StructureError, match=r"auxiliary sites \['u'\]"):
        draws.analytic_kl()


def test_a_discrete_auxiliary_site_is_not_reparameterized():
    def guide(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            k = pyro.sample("k", dist.Bernoulli(torch.full((4,), 0.3)), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(k.unsqueeze(-1).expand(*k.shape, 2), 1).to_event(1))

    assert particles(simple_model, guide, torch.randn(4, 1), 2).not_reparameterized == ["k"]


def test_bad_values_name_their_site():
    def model(x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z.sum(-1, keepdim=True)).to_event(1), obs=x)

    with pyro.validation_enabled(True):
        refusal(model, simple_guide, "site 'x'")
    assert first_non_finite_site(simple_model, simple_guide, torch.full((4, 1), math.inf)) == "value of guide site 'z'"
    assert first_non_finite_site(simple_model, simple_guide, torch.randn(4, 1)) is None


# --- ways to look at a model and a guide -------------------------------------------------------------------------


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
