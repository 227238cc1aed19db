"""Every guide that has a word, with every kind of model and objective; and what each must be able to do.

A new guide joins by its line in the catalog, a new kind of model by a line in ``MODELS``. Sizes are kept small by
``SMALL``, options that are used where the part has them.
"""

import copy
import inspect
import warnings

import pyro
import pytest
import torch
from pyro.infer import Predictive
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from inference.assemble import assemble
from inference.catalog import CATALOG
from inference.config import ConfigError, load
from inference.engine import SVI, SharedOptimizer
from inference.particles import StructureError, cross_log_q, decode, encode, particles

MODELS = {
    "composed": ["model.latent_dim=3", "decoder.hidden=[6]"],
    "ppca": ["model.latent_dim=2"],
    "two_layer": ["model.latent_dim=3", "model.top_dim=2", "model.hidden=[6]", "decoder.hidden=[6]"],
}
OBJECTIVES = {
    "trace_elbo": ["objective=trace_elbo", "objective.particles=2"],
    "elbo": ["objective=elbo", "objective.particles=2"],
    "elbo analytic": ["objective=elbo", "objective.kl=analytic"],
    "iwae": ["objective=iwae", "objective.particles=3"],
}
SMALL = {"hidden": "[6]", "transforms": "2", "context_dim": "4", "features": "4", "components": "3", "steps": "3"}
TWO_LAYERS = ["bottom_up", "top_down", "ladder"]
NO_CLOSED_FORM = ["mixture", "planar", "sylvester", "realnvp", "iaf", "spline", "bottom_up"]
LOOKED_AT = [
    "diagonal", "unconditional", "low_rank", "full", "mixture", "planar", "sylvester", "realnvp", "iaf", "spline",
    "free", "semi_amortized", "deterministic", "exact", *TWO_LAYERS,
]  # fmt: skip


def words(guide, model):
    options = inspect.signature(CATALOG["guide"][guide]).parameters
    small = [f"guide.{name}={value}" for name, value in SMALL.items() if name in options]
    encoder = ["encoder.hidden=[6]"] if "net" in options else []
    return ["data=iris", "device=cpu", f"guide={guide}", *small, *encoder, f"model={model}", *MODELS[model]]


def build(guide, dtype=torch.float64):
    """Guide and a model for it, with parameters of no special value, and five data."""
    model = "ppca" if guide == "exact" else "two_layer" if guide in TWO_LAYERS else "composed"
    setup = assemble(load(words(guide, model)))
    programs = nn.ModuleList([setup.model, setup.guide]).to(dtype)
    with torch.no_grad():
        for parameter in programs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return setup.model, setup.guide, torch.rand(5, *setup.dataset.shape, dtype=dtype)


@pytest.fixture(params=LOOKED_AT)
def case(request):
    return (request.param, *build(request.param))


def train(guide, model, objective):
    """Score once under Pyro's checks and take two steps; every parameter must get a finite gradient."""
    setup, x = assemble(load([*words(guide, model), *OBJECTIVES[objective]])), torch.rand(5, 4)
    programs = nn.ModuleList([setup.model, setup.guide])
    optimizer = SharedOptimizer(programs.parameters(), setup.config.factory("optimizer"), 0.01)
    svi = SVI(setup.model, setup.guide, optimizer, setup.objective)
    with pyro.validation_enabled(True):
        setup.objective.loss(setup.model, setup.guide, x)
    for _ in range(2):
        svi.loss_and_grads(setup.model, setup.guide, x)
        for name, parameter in programs.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        optimizer(batch_size=len(x))
        optimizer.zero_grad()
        assert all(parameter.isfinite().all() for parameter in programs.parameters())


def fits(guide, model, objective):
    """Whether the guide is for such a model, and has the closed-form KL that the objective may want."""
    if objective == "elbo analytic" and guide in NO_CLOSED_FORM:
        return False
    if guide in TWO_LAYERS or model == "two_layer":
        return guide in TWO_LAYERS and model == "two_layer"
    if guide == "deterministic" and objective == "iwae":  # no density to weigh by
        return False
    return guide != "exact" or model == "ppca"


@pytest.mark.row("5.6")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("guide", CATALOG["guide"])
def test_it_trains_or_is_refused(guide, model, objective):
    refusal = None
    try:
        train(guide, model, objective)
    except (ConfigError, StructureError) as error:
        refusal = str(error)
    assert refusal is None or len(refusal) > 20
    if guide in LOOKED_AT:
        assert (refusal is None) == fits(guide, model, objective), refusal


def test_particles_are_draws_of_each_datum(case):
    name, model, guide, x = case
    draws = particles(model, guide, x, 3)
    assert draws.log_weight.shape == (3, 5)
    assert draws.log_weight.isfinite().all()
    assert draws.reparameterized
    values = {site: latent.value for site, latent in draws.latents.items()}
    for site, value in values.items():
        assert value.requires_grad == any(p.requires_grad for p in guide.parameters()) or name == "free", site
        assert name == "deterministic" or (value[0] != value[1]).any()


def test_any_latents_score_under_any_datum(case):
    """What ELBO surgery asks for: every latent, foreign to the draw at hand, under every datum's posterior."""
    name, model, guide, x = case
    if name == "deterministic":
        pytest.skip("scores nothing but its own point")
    draws = particles(model, guide, x)
    latents = {site: latent.value.reshape(5, -1).detach() for site, latent in draws.latents.items()}
    table = cross_log_q(guide, latents, x)
    own = torch.stack([table[i, i] for i in range(5)])
    assert torch.allclose(own, draws.log_q.reshape(5), atol=1e-8)
    one_by_one = [
        [cross_log_q(guide, {s: z[i : i + 1] for s, z in latents.items()}, x[j : j + 1]) for j in range(5)]
        for i in range(5)
    ]
    assert torch.allclose(table.flatten(), torch.cat([torch.cat(row) for row in one_by_one]).flatten(), atol=1e-8)
    assert name == "unconditional" or table.std(1).min() > 1e-6


def test_encoding_and_decoding(case):
    _, model, guide, x = case
    encoded = encode(guide, x)
    assert all(q.batch_shape == (5,) for q in encoded.values())
    latents = {site: latent.value.reshape(5, -1) for site, latent in particles(model, guide, x).latents.items()}
    assert set(encoded) == set(latents)
    assert decode(model, latents, x).mean.shape == x.shape


def test_pyros_predictive(case):
    _, model, guide, x = case
    for parallel in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            drawn = Predictive(guide, num_samples=6, parallel=parallel)(x)
            posterior = Predictive(pyro.poutine.uncondition(model), guide=guide, num_samples=6, parallel=parallel)(x)
        for site in encode(guide, x):
            assert drawn[site].shape[:2] == (6, 5)
        assert posterior["x"].shape == (6, *x.shape)


def test_it_can_be_copied_after_use(case):
    name, model, guide, x = case
    draws = particles(model, guide, x, 2)
    draws.log_weight.sum().backward()
    model, other = copy.deepcopy((model, guide))
    torch.manual_seed(3)
    one = particles(model, guide, x).log_q
    torch.manual_seed(3)
    assert torch.equal(particles(model, other, x).log_q, one)
    fresh_model, fresh, _ = build(name)
    fresh_model.load_state_dict(model.state_dict())
    fresh.load_state_dict(guide.state_dict())
    torch.manual_seed(3)
    assert torch.allclose(particles(fresh_model, fresh, x).log_q, one, atol=1e-10)


@pytest.mark.parametrize("guide", LOOKED_AT)
def test_single_precision(guide):
    model, guide, x = build(guide, dtype=torch.float32)
    draws = particles(model, guide, x, 2)
    for latent in draws.latents.values():
        assert latent.value.dtype == torch.float32
    assert draws.log_weight.dtype == torch.float32
    assert draws.log_weight.isfinite().all()


@pytest.mark.parametrize("guide", LOOKED_AT)
def test_a_step_never_waits_for_the_device(guide):
    # Fake tensors hold no numbers: asking one for its value, as .item() or an if would, raises.
    model, guide, _ = build(guide)
    with pyro.validation_enabled(False), FakeTensorMode(allow_non_fake_inputs=True):
        total = particles(model, guide, torch.zeros(5, 4), 2).log_weight.sum()
        with pytest.raises(DataDependentOutputException):  # as any wait on the way would have been
            total.item()


def test_a_second_step_meets_no_old_graph(case):
    _, model, guide, x = case
    for _ in range(2):
        draws = particles(model, guide, x, 2)
        if draws.log_weight.requires_grad:
            draws.log_weight.sum().backward()
        assert draws.log_weight.isfinite().all()
