"""Guides and priors made of any reparameterizable family."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode

from guides.amortized import Amortized
from guides.family import FamilyConditional
from guides.gaussian import DiagonalNormal
from inference.assemble import assemble
from inference.config import ConfigError, load
from inference.objectives import ELBO, IWAE
from models.families import FAMILIES, FamilyPrior, families_inside
from models.latent import LatentVariableModel
from models.likelihoods import FixedGaussian
from models.nets import Linear
from models.priors import StandardNormal
from tests.family_cases import INF, by_scipy, every_family


def core_of(word, event=(2,), context=(3,)):
    return FamilyConditional(event, context, Linear, word)


@every_family
def test_a_guide_core_has_the_shapes_of_one(word):
    core = core_of(word)
    for leading in ((), (4,), (2, 3)):
        made = core(torch.randn(*leading, 3))
        assert made.event_shape == (2,)
        assert made.batch_shape == leading
        z = made.rsample((5,))
        assert z.shape == (5, *leading, 2)
        assert made.log_prob(z).shape == (5, *leading)
    context = torch.randn(2, 3, 3)
    made, z = core(context), core(context).sample()
    one_by_one = [core(context[i, j]).log_prob(z[i, j]) for i, j in itertools.product(range(2), range(3))]
    assert torch.allclose(made.log_prob(z).flatten(), torch.stack(one_by_one), atol=1e-10)


@every_family
def test_a_step_never_waits_for_the_device(word):
    # Fake tensors hold no numbers: asking one for its value, as .item() or an if would, raises.
    core, prior = core_of(word), None if FAMILIES[word].moving_support else FamilyPrior((2,), family=word)
    with pyro.validation_enabled(False), FakeTensorMode(allow_non_fake_inputs=True):
        made = core(torch.zeros(4, 3))
        z = made.rsample()
        (made.log_prob(z) if prior is None else made.log_prob(z) - prior().log_prob(z)).sum().backward()


def tiny_pair(word):
    prior = FamilyPrior((2,), family=word) if word in ("dirichlet", "cauchy") else StandardNormal((2,))
    model = LatentVariableModel(prior, FixedGaussian((3,), (2,), Linear))
    return model, Amortized(FamilyConditional((2,), (3,), Linear, word, model))


@pytest.mark.row("1.12", "1.13", "1.14")
@every_family
def test_two_steps_of_training(word):
    model, guide = tiny_pair(word)
    parameters = {**dict(model.named_parameters(prefix="model")), **dict(guide.named_parameters(prefix="guide"))}
    before = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer, x = torch.optim.Adam(parameters.values(), lr=0.01), torch.randn(16, 3)
    for objective in (ELBO(particles=2), IWAE(particles=3)):
        optimizer.zero_grad()
        bound = objective.bound(model, guide, x)
        (-bound.mean()).backward()
        assert bound.isfinite().all()
        for name, value in parameters.items():
            assert value.grad.isfinite().all(), name
            assert value.grad.abs().sum() > 0, name
        optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in parameters.items())
    dead = (guide.core.net.output.weight.grad == 0).all(1)  # of each entry of each parameter of the family
    assert dead.sum() == (1 if word == "elliptical" else 0)  # the net writes the whole matrix, upper triangle and all


def test_pyro_s_own_elbo_trains_it():
    model, guide = tiny_pair("gompertz")
    svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO())
    x = torch.randn(50, 3)
    losses = [svi.step(x) for _ in range(150)]
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:20])


def test_a_positive_guide_under_a_normal_prior_gives_a_bound():
    model = LatentVariableModel(StandardNormal((1,)), FixedGaussian((2,), (1,), Linear))
    x = torch.randn(6, 2)
    weight, loc = model.likelihood.net.output.weight.detach(), model.likelihood.net.output.bias.detach()
    evidence = torch.distributions.MultivariateNormal(loc, weight @ weight.T + torch.eye(2)).log_prob(x)
    core = FamilyConditional((1,), (2,), Linear, "gamma", model)
    with torch.no_grad():
        draws = torch.stack([ELBO(particles=500).bound(model, Amortized(core), x) for _ in range(20)])
    upper = draws.mean(0) + 5 * draws.std(0) / 20**0.5
    assert (upper < evidence).all()


def test_gaussian_is_the_diagonal_guide():
    core, other = core_of("gaussian"), DiagonalNormal((2,), (3,), Linear)
    other.load_state_dict(core.state_dict())
    x, z = torch.randn(4, 3), torch.randn(4, 2)
    assert torch.equal(core(x).log_prob(z), other(x).log_prob(z))


@pytest.mark.parametrize("word", ["laplace", "triangular", "elliptical", "dirichlet"])
def test_events_of_more_dimensions(word):
    core = FamilyConditional((2, 4, 3), (5,), Linear, word)
    made = core(torch.randn(7, 5))
    assert (made.batch_shape, made.event_shape) == ((7,), (2, 4, 3))
    assert made.rsample().shape == (7, 2, 4, 3)
    per_entry = {"laplace": (4, 4, 3), "triangular": (6, 4, 3), "elliptical": (8 * (3 + 9 + 1),), "dirichlet": (24,)}
    assert core.output_shape == per_entry[word]


@pytest.mark.parametrize(
    ("prior", "accepted"),
    [
        ("gaussian", set(FAMILIES) - {"dirichlet", "cauchy"}),
        ("laplace", set(FAMILIES) - {"dirichlet", "cauchy"}),
        ("student_t", set(FAMILIES) - {"dirichlet"}),
        ("cauchy", set(FAMILIES) - {"dirichlet"}),
        ("elliptical", set(FAMILIES) - {"dirichlet", "cauchy", "student_t", "pareto", "f"}),
        ("exponential", set(families_inside("positive"))),
        ("gamma", {"exponential", "rayleigh", "pareto", "reciprocal", "weibull", "gompertz", "erlang", "lognormal"}),
        ("beta", {"beta"}),
        ("dirichlet", {"dirichlet"}),
    ],
)
def test_a_guide_stays_inside_the_prior(prior, accepted):
    model = LatentVariableModel(FamilyPrior((2,), family=prior), FixedGaussian((3,), (2,), Linear))
    if prior == "gamma":
        accepted = accepted | {"gamma", "chi2", "f", "beta"}
    for word in FAMILIES:
        if word in accepted:
            FamilyConditional((2,), (3,), Linear, word, model)
        else:
            with pytest.raises(ValueError, match=f"{word} .*(prior's support|moments up to order).*accepted"):
                FamilyConditional((2,), (3,), Linear, word, model)


POWER_LAWS = {"cauchy": lambda: stats.cauchy(), "student_t": lambda: stats.t(2.01), "f": lambda: stats.f(3, 4.01)}
POWER_LAWS["pareto"] = lambda: stats.pareto(2.01)


@every_family
def test_moments_and_tails_of_the_table_are_scipys(word):
    """Of the heaviest tails the table's moment exists and the next does not; how log-densities fall far out."""
    family, far = FAMILIES[word], np.array([1e3, 1e5])
    if word in POWER_LAWS:
        # z^m p(z) has an integral where it falls faster than 1/z, which its values at two far points tell.
        for order, finite in ((family.moments, True), (family.moments + 1, False)):
            log_integrand = order * np.log(far) + POWER_LAWS[word]().logpdf(far)
            assert (np.diff(log_integrand)[0] / np.log(100) < -1.001) == finite
    else:
        assert family.moments == INF
    with np.errstate(all="ignore"):
        for side in (1, -1):  # the power of |z| in which -log p grows
            near, beyond = -by_scipy(word).logpdf(side * far)
            if np.isfinite([near, beyond]).all():
                assert np.log(beyond / near) / np.log(100) < family.tail_order + 0.2
            elif np.isfinite(near):
                assert family.tail_order == INF


def test_a_cauchy_guide_has_no_bound_under_a_normal_prior():
    """What is refused: the mean of log p(z) is minus infinity, and averages of draws run away."""
    z = FAMILIES["cauchy"].constructor(torch.zeros(100_000), torch.ones(100_000)).rsample()
    log_p = StandardNormal((1,))().log_prob(z.unsqueeze(-1))
    assert float(log_p.mean()) < -1000
    with pytest.raises(ConfigError, match=r"cauchy has absolute moments up to order 0.*prior.family=cauchy"):
        assemble(load(["guide=family", "guide.family=cauchy"]))
    assemble(load(["guide=family", "guide.family=cauchy", "prior=family", "prior.family=cauchy"]))


def test_discrete_priors_have_no_family():
    class Counts(StandardNormal):
        def forward(self, *context):
            return dist.Poisson(self.scale).to_event(1)

    model = LatentVariableModel(Counts((2,)), FixedGaussian((3,), (2,), Linear))
    with pytest.raises(ValueError, match="no family under that prior"):
        FamilyConditional((2,), (3,), Linear, "gamma", model)


def test_a_prior_of_every_fixed_support():
    for word, family in FAMILIES.items():
        if family.moving_support:
            with pytest.raises(ValueError, match=f"support of {word} moves"):
                FamilyPrior((2,), family=word)
            continue
        prior = FamilyPrior((2,), family=word)
        z = prior().sample((5,))
        assert z.shape == (5, 2)
        prior().log_prob(z).sum().backward()
        assert prior.unconstrained.grad.abs().sum() > 0
    z = torch.randn(5, 2)
    assert torch.equal(FamilyPrior((2,))().log_prob(z), StandardNormal((2,))().log_prob(z))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"unknown family 'normal'; accepted: beta, .*weibull"):
        core_of("normal")
    with pytest.raises(ValueError, match="last dimension of at least 2"):
        core_of("dirichlet", event=(1,))
    with pytest.raises(ValueError, match="at least one dimension"):
        core_of("laplace", event=())


def test_by_name():
    setup = assemble(load(["guide=family", "guide.family=laplace", "encoder.hidden=[4]", "decoder.hidden=[4]"]))
    assert isinstance(setup.guide.core(torch.zeros(2, *setup.dataset.shape)).base_dist, dist.Laplace)
    setup = assemble(load(["guide=family", "guide.family=dirichlet", "prior=family", "prior.family=dirichlet"]))
    assert setup.guide.core.family == "dirichlet"
    with pytest.raises(ConfigError, match=r"guide=family: KL.* draws of dirichlet .*prior.family=dirichlet"):
        assemble(load(["guide=family", "guide.family=dirichlet"]))


STEEP = {"gompertz": "right", "gumbel": "left"}


@pytest.mark.parametrize("word", sorted(FAMILIES))
def test_tails_that_an_exponential_outgrows_are_scipys(word):
    """Far out, -log p that grows faster than |z| leaves exponentials a mean."""
    family = FAMILIES[word]
    assert family.steep == STEEP.get(word, "")
    if word in ("dirichlet", "elliptical", "weibull", "laplace"):  # on a simplex; of any power; scipy underflows
        assert word == "dirichlet" or not family.is_light("right")
        return
    with np.errstate(all="ignore"):
        for side, where in ((1, "right"), (-1, "left")):
            far, beyond = -by_scipy(word).logpdf(side * np.array([1e4, 1e5]))
            outgrows = not np.isfinite(beyond) or beyond / far > 20  # faster than a line
            assert family.is_light(where) == outgrows, where


@pytest.mark.parametrize(
    ("prior", "q", "finite"),
    [
        *(("gompertz", q, False) for q in ("lognormal", "gamma", "exponential", "erlang", "chi2", "weibull", "f")),
        *(("gompertz", q, True) for q in ("rayleigh", "gompertz", "reciprocal", "beta")),
        *(("gumbel", q, False) for q in ("laplace", "logistic", "student_t", "elliptical", "cauchy")),
        *(("gumbel", q, True) for q in ("gaussian", "uniform", "triangular", "gumbel", "gamma", "lognormal")),
    ],
)
def test_priors_that_fall_exponentially_ask_for_means_of_exponentials(prior, q, finite):
    words = ["data=iris", "device=cpu", "prior=family", f"prior.family={prior}", "guide=family", f"guide.family={q}"]
    if finite:
        assemble(load(words))
    else:
        with pytest.raises(ConfigError, match=r"KL\(q \|\| p\) is infinite.*accepted: "):
            assemble(load(words))


def test_what_is_refused_has_means_that_run_away():
    """log p of a Gompertz prior under a log-normal: finite at every draw, and without a mean."""
    z = FAMILIES["lognormal"].constructor(torch.zeros(100_000), torch.ones(100_000)).rsample()
    log_p = FAMILIES["gompertz"].constructor(torch.ones(()), torch.ones(())).log_prob(z)
    assert float(log_p.mean()) < -1e6
    assert float(log_p.median()) > -20
