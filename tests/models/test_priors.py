"""Mixtures and priors that look through the guide; every prior under particles and objectives."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import log_softmax, logsumexp
from scipy.stats import norm
from torch import nn

from guides.deterministic import Deterministic
from guides.gaussian import DiagonalNormal
from inference.assemble import assemble
from inference.config import ConfigError, load
from inference.diagnostics import elbo_terms
from inference.objectives import ELBO, IWAE
from inference.particles import StructureError, decode, generate, particles
from models.flow_prior import CouplingPrior, SplinePrior
from models.nets import Linear
from models.priors import MixturePrior
from models.vamp import AggregatedPosterior, VampPrior
from tests.prior_cases import PRIORS, mass, pair, perturbed, posterior_parameters


@pytest.fixture(params=PRIORS)
def case(request):
    """Model, guide and data with two latents."""
    x = torch.randn(6, 3)
    return *(perturbed(program, 0.2) for program in pair(PRIORS[request.param](2, 3), x)), x


# --- densities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["mixture", "vamp", "aggregated"])
def test_a_mixture_integrates_to_one(word):
    model, guide = (perturbed(program, 0.2) for program in pair(PRIORS[word](2, 3), torch.randn(6, 3)))
    with torch.no_grad():
        guide.core.net.output.weight.mul_(0.3)  # posteriors inside of the grid, and no narrower than its step
    assert mass(model.prior) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("word", ["mixture", "vamp", "aggregated"])
def test_a_scalar_mixture_integrates_to_one(word):
    model, _ = pair(PRIORS[word](1, 3), torch.randn(6, 3))
    perturbed(model)
    assert mass(model.prior, 40.0, 8001) == pytest.approx(1, abs=1e-8)


def test_mixtures_against_scipy():
    x, z = torch.randn(6, 3), torch.randn(20, 2)
    mixture = perturbed(MixturePrior((2,), components=3))
    loc, scale = mixture.loc.detach().numpy(), mixture.log_scale.detach().exp().numpy()
    expected = norm.logpdf(z.numpy()[:, None], loc, scale).sum(-1) + log_softmax(mixture.logits.detach().numpy())
    assert np.allclose(mixture().log_prob(z).detach(), logsumexp(expected, axis=1), atol=1e-12)
    for word in ("vamp", "aggregated"):
        model, guide = pair(PRIORS[word](2, 3), x)
        loc, scale = posterior_parameters(guide, model.prior.pseudo_inputs if word == "vamp" else x)
        expected = norm.logpdf(z.numpy()[:, None], loc, scale).sum(-1)
        assert np.allclose(
            model.prior().log_prob(z).detach(), logsumexp(expected, axis=1) - math.log(len(loc)), atol=1e-12
        )


def test_a_mixture_starts_at_the_standard_normal_on_average():
    one = torch.linspace(-3, 3, 25).unsqueeze(-1)
    starts = torch.stack([MixturePrior((1,))().log_prob(one).exp().detach() for _ in range(1000)])
    error = starts.std(0) / len(starts) ** 0.5

    def agrees(scale):
        expected = dist.Normal(0.0, scale).log_prob(one[:, 0]).exp()
        return bool(((starts.mean(0) - expected).abs() < 5 * error).all())

    assert not agrees(1.2)
    assert agrees(1.0)


# --- priors that look through the guide --------------------------------------------------------------------------


def test_pseudo_inputs_start_near_data_and_all_different():
    x = 7 + 3 * torch.randn(4, 3)
    prior = VampPrior((2,), (3,), components=10)
    assert (prior.pseudo_inputs.mean() - 7).abs() > 3
    prior.initialize(x)
    distance = torch.cdist(prior.pseudo_inputs, x)
    assert distance.min(1).values.max() < 0.3
    assert torch.bincount(distance.argmin(1)).min() >= 2  # no datum is left out
    assert len(prior.pseudo_inputs.unique(dim=0)) == 10


def test_the_aggregated_posterior_keeps_a_random_subset():
    x = torch.arange(20.0).reshape(20, 1)
    prior = AggregatedPosterior((2,), (1,), size=5)
    prior.initialize(x)
    kept = prior.inputs().flatten()
    assert len(kept.unique()) == 5
    assert not torch.equal(kept, x[:5, 0])
    all_of_them = AggregatedPosterior((2,), (1,), size=50)
    all_of_them.initialize(x)
    assert torch.equal(all_of_them.inputs().sort(0).values, x)
    prior.load_state_dict(all_of_them.state_dict())
    assert torch.equal(prior.inputs(), all_of_them.inputs())


@pytest.mark.parametrize("word", ["vamp", "aggregated"])
def test_the_encoder_stays_the_guides(word):
    x, z = torch.randn(6, 3), torch.randn(8, 2)
    both = nn.ModuleList(pair(PRIORS[word](2, 3), x))
    model, guide = both
    assert not [name for name in model.state_dict() if "core" in name]
    own = {id(p) for p in model.parameters()} & {id(p) for p in guide.parameters()}
    assert not own
    twin = copy.deepcopy(both)
    assert torch.equal(twin[0].prior().log_prob(z), model.prior().log_prob(z))
    perturbed(guide)
    assert not torch.allclose(twin[0].prior().log_prob(z), model.prior().log_prob(z))
    assert twin[0].prior.core is twin[1].core
    twin.load_state_dict(both.state_dict())
    assert torch.equal(twin[0].prior().log_prob(z), model.prior().log_prob(z))


@pytest.mark.parametrize("word", ["vamp", "aggregated"])
def test_gradients_reach_the_encoder_through_the_prior(word):
    x, z = torch.randn(6, 3), torch.randn(8, 2)
    model, guide = pair(PRIORS[word](2, 3), x)
    found = torch.autograd.grad(model.prior().log_prob(z).sum(), guide.core.net.output.weight)[0]
    loc, scale = posterior_parameters(guide, model.prior.inputs())
    log_parts = norm.logpdf(z.numpy()[:, None], loc, scale).sum(-1)
    share = np.exp(log_softmax(log_parts, axis=1))  # (I, K)
    standard = (z.numpy()[:, None] - loc) / scale
    by_output = np.concatenate([standard / scale, standard**2 - 1], -1) * share[..., None]  # (I, K, 2 D)
    expected = np.einsum("iko,kx->ox", by_output, model.prior.inputs().detach().numpy())
    assert np.allclose(found, expected, atol=1e-10)


def test_what_has_not_been_shown_a_guide_says_so():
    prior = VampPrior((2,), (3,))
    with pytest.raises(ValueError, match=r"call look_through\(core\) first"):
        prior()
    with pytest.raises(ValueError, match=r"from data \(3,\) to latents \(2,\); this one goes from \(4,\) to \(2,\)"):
        prior.look_through(DiagonalNormal((2,), (4,), Linear))
    with pytest.raises(ValueError, match="Deterministic puts each datum at one point"):
        prior.look_through(Deterministic((2,), (3,), Linear))
    empty = AggregatedPosterior((2,), (3,))
    empty.look_through(DiagonalNormal((2,), (3,), Linear))
    with pytest.raises(ValueError, match=r"call initialize\(x\)"):
        empty()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixturePrior((2,), components=0), "components must be at least 1, got 0"),
        (lambda: VampPrior((2,), (3,), components=0), "components must be at least 1, got 0"),
        (lambda: AggregatedPosterior((2,), (3,), size=0), "size must be at least 1, got 0"),
        (lambda: CouplingPrior((2,), transforms=0), "transforms must be at least 1, got 0"),
        (lambda: CouplingPrior((1,)), "at least 2 dimensions, got 1"),
        (lambda: SplinePrior((2, 3)), r"accepted: event_shape \(D,\), got \(2, 3\)"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prior=vamp", "guide=free"], "guide=free: LocallyFitted climbs.* made of q"),
        (["prior=vamp", "model=two_layer", "guide=top_down"], "prior=vamp with guide=top_down"),
    ],
)
def test_guides_that_cannot_be_looked_through_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        assemble(load(words))


# --- under the objectives ----------------------------------------------------------------------------------------


def test_particles_and_generation(case):
    model, guide, x = case
    draws = particles(model, guide, x, 5)
    z = draws.latents["z"].value
    loop = torch.stack([torch.stack([model.prior().log_prob(z[k, n]) for n in range(6)]) for k in range(5)])
    assert torch.allclose(draws.log_prior, loop, atol=1e-8)
    latents, p_x, drawn = generate(model, torch.zeros(7, 3))
    assert latents["z"].shape == (7, 2)
    assert drawn.shape == (7, 3)
    assert torch.equal(decode(model, latents, torch.zeros(7, 3)).mean, p_x.mean)


def test_plates_of_latents(case):
    model, guide, x = case

    def many(x):
        with pyro.plate("data", 6, dim=-1), pyro.plate("parts", 4, dim=-2):
            z = pyro.sample("z", model.prior())
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0].expand(4, 6))

    def many_guide(x):
        with pyro.plate("data", 6, dim=-1), pyro.plate("parts", 4, dim=-2):
            pyro.sample("z", guide.core(x))

    draws = particles(many, many_guide, x, 5, max_plate_nesting=2)
    z = draws.latents["z"].value
    assert z.shape == (5, 4, 6, 2)
    assert torch.allclose(draws.log_prior, model.prior().log_prob(z).sum(1), atol=1e-8)


def test_everything_is_trained_and_the_kl_is_estimated(case):
    model, guide, x = case
    with torch.no_grad():
        assert elbo_terms(model, guide, x, 4).kl_estimator == "Monte Carlo"
        with pytest.raises(
            StructureError, match=r"no closed-form KL between Normal and \w+ at .*use objective.kl=mont"
        ):
            ELBO(kl="analytic")(model, guide, x)
    IWAE(5)(model, guide, x).sum().backward()
    for name, parameter in [*model.named_parameters(), *guide.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
