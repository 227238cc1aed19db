"""Programs that cannot have a bound for each datum, and the one message that says so."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import Normal

from inference.particles import (
    StructureError,
    first_non_finite_site,
    guess_max_plate_nesting,
    particles,
)
from tests.programs import (
    SubsampledGuide,
    SubsampledModel,
    TableGuide,
    TableModel,
)


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
    scaled_model, scaled_guide = poutine.scale(simple_model, scale=scale), poutine.scale(simple_guide, scale=scale)
    for model, guide in ((scaled_model, simple_guide), (simple_model, scaled_guide)):
        with pytest.raises(StructureError, match=r"poutine\.scale"):
            particles(model, guide, torch.randn(4, 1), num_particles)


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

    with pytest.raises(StructureError, match="site 'x' is scaled by"):
        particles(model, simple_guide, torch.randn(4, 1), 2, max_plate_nesting=2)


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
