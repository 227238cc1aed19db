"""MuProp, REBAR, RELAX and ARM: the enumerated gradient, less noise, what they learn, and what they refuse."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from guides.amortized import Amortized
from guides.discrete import BernoulliBits
from inference.antithetic import ARM
from inference.baselines import ScoreFunction
from inference.control_variates import REBAR, RELAX, MuProp
from inference.engine import SharedOptimizer
from inference.objectives import ELBO, IWAE, gradient_estimator
from inference.particles import StructureError
from models.discrete import Bits, OneHots, UniformBits, scores_given
from models.latent import LatentVariableModel
from models.likelihoods import Bernoulli
from models.nets import Linear
from tests.estimation import BitsGuide, BitsModel, deviations, exact, gradient_draws, programs
from tests.gradient_cases import BOUNDS, CONTROLLED, LATENTS, LIMIT, ROWS, assert_right, draws_of
from tests.inference import engines


def made(gradient, kind="bits"):
    """An estimator whose learned parts are somewhere, and not where they start."""
    estimator = RELAX(hidden=8) if gradient == "relax" else gradient_estimator(gradient)
    estimator.prepare((3,), (2,) if kind == "bits" else (2, 3))
    with torch.no_grad():
        for parameter in estimator.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return estimator


@pytest.mark.row("0.31", "5.7")
@pytest.mark.parametrize("gradient", CONTROLLED)
@pytest.mark.parametrize("name", ["elbo_one", "elbo_analytic", "beta", "iwae", "miwae", "tvo"])
def test_the_mean_is_the_enumerated_gradient_of_every_bound(name, gradient):
    assert_right(draws_of(name, made(gradient), "bits"), name, "bits")


@pytest.mark.row("0.31", "5.7")
@pytest.mark.parametrize("gradient", CONTROLLED)
@pytest.mark.parametrize("name", ["elbo_one", "elbo_analytic", "iwae"])
def test_and_for_one_hot_vectors(name, gradient):
    assert_right(draws_of(name, made(gradient, "classes"), "classes"), name, "classes")


class NoCorrection(REBAR):
    """The relaxed bound is subtracted and does not come back."""

    def paths(self, slope, relaxed, logits):
        return torch.zeros_like(logits)


class NoMean(MuProp):
    """The expansion is subtracted, its mean is not added."""

    def mean_part(self, slope, mean, logits):
        return torch.zeros_like(logits)


class Independent(ARM):
    """The second draw has noise of its own."""

    def antithetic(self, u, p):
        return (torch.rand_like(u) < p).to(p.dtype)


class OneSwap(ARM):
    """The first class alone is swapped with others."""

    def swapped(self, objective, site, q, signal):
        found = super().swapped(objective, site, q, signal)
        return torch.cat([found[..., :1], torch.zeros_like(found[..., 1:])], -1)


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        *((wrong, kind) for wrong in (NoCorrection, NoMean) for kind in LATENTS),
        (Independent, "bits"),
        (OneSwap, "classes"),
    ],
)
def test_wrong_ones_are_told_apart(wrong, kind):
    draws = draws_of("elbo_one", wrong(), kind)
    assert deviations(draws["guide"], exact(kind, *BOUNDS["elbo_one"][1:])["guide"]) > 2 * LIMIT


@pytest.mark.parametrize("kind", LATENTS)
def test_they_are_less_noisy_than_the_score_function(kind):
    spread = {g: float(draws_of("elbo_one", g, kind)["guide"].var(0).sum()) for g in ["score", *CONTROLLED]}
    assert max(spread[g] for g in CONTROLLED) < 0.5 * spread["score"], spread


@pytest.mark.parametrize("kind", LATENTS)
@pytest.mark.parametrize("gradient", ["rebar", "relax"])
def test_what_is_learned_lowers_the_variance_and_moves_nothing_else(gradient, kind):
    estimator = {"rebar": REBAR, "relax": RELAX}[gradient](temperature=3.0, scale=0.2)
    objective = ELBO(gradient=estimator)
    objective.prepare((3,), LATENTS[kind])
    model, guide, x = programs(kind, 200)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.03)
    before = float(gradient_draws(objective, kind, ROWS)["guide"].var(0).sum())
    for _ in range(100):
        optimizer.zero_grad()
        (-objective.bound(model, guide, x)).sum().backward()
        optimizer.step()
    assert float(gradient_draws(objective, kind, ROWS)["guide"].var(0).sum()) < 0.8 * before
    assert all(p.grad is not None and p.grad.any() for p in objective.parameters())


def test_the_term_that_trains_it_leaves_model_and_guide_alone():
    class Untrained(REBAR):
        def training_term(self, gradient, site):
            return gradient.new_zeros(())

    found = []
    for estimator in (REBAR(), Untrained()):
        torch.manual_seed(1)
        found.append(gradient_draws(ELBO(gradient=estimator), "bits", 100))
    for part in ("model", "guide"):
        torch.testing.assert_close(found[0][part], found[1][part])


@pytest.mark.parametrize("kind", ["bits", "one-hots"])
def test_scores_given_a_draw_are_those_of_whoever_drew_it(kind):
    """Draw, then scores given the draw: together as scores, then the draw that they make."""
    torch.manual_seed(2)
    logits = torch.tensor([0.7, -0.4, 0.2]).expand(100_000, 3)
    q = Bits(logits) if kind == "bits" else OneHots(logits)
    value = q.sample()
    scores = scores_given(value, q)
    again = (scores > 0).double() if kind == "bits" else torch.eye(3, dtype=torch.double)[scores.argmax(-1)]
    assert torch.equal(again, value)
    noise = scores - q.logits
    expected = torch.tensor(0.0 if kind == "bits" else 0.5772156649)
    error = noise.std(0) / len(noise) ** 0.5
    assert ((noise.mean(0) - expected).abs() < LIMIT * error).all()
    variance = torch.pi**2 / (3 if kind == "bits" else 6)
    assert torch.allclose(noise.var(0), torch.tensor(variance), rtol=0.05)
    assert (torch.corrcoef(noise.T) - torch.eye(3)).abs().max() < 0.02


@pytest.mark.parametrize("gradient", CONTROLLED)
def test_as_the_loss_of_pyros_own_svi(gradient):
    pyro.clear_param_store()
    with pyro.settings.context(module_local_params=False):
        objective = ELBO(gradient=gradient)
        objective.prepare((3,), (2,))
        model, guide, x = BitsModel(20), BitsGuide(20), torch.tensor([1.0, 0.0, 1.0]).expand(20, 3)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), loss=objective)
        start = [p.detach().clone() for p in objective.parameters()]
        first = sum(svi.step(x) for _ in range(20))
        for _ in range(200):
            svi.step(x)
        assert sum(svi.step(x) for _ in range(20)) < first - 20 * 20 * 0.5
        assert all(not torch.equal(a, b) for a, b in zip(start, objective.parameters(), strict=True))
        trained = {"rebar": 2, "relax": 6}.get(gradient, 0)
        assert len(start) == trained


def test_the_bound_is_the_same_without_gradients():
    model, guide, x = programs("bits", 50)
    for gradient in CONTROLLED:
        objective = ELBO(gradient=gradient)
        objective.prepare((3,), (2,))
        torch.manual_seed(4)
        with torch.no_grad():
            value = objective.bound(model, guide, x)
        torch.manual_seed(4)
        assert torch.allclose(objective.bound(model, guide, x), value)
        assert not value.requires_grad


# --- What they refuse -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", CONTROLLED)
def test_latents_of_other_kinds_are_refused_with_what_would_do(gradient):
    model, guide, x = programs("normal", 3)
    objective = ELBO(gradient=gradient)
    objective.prepare((2,), (1,))
    with pytest.raises(StructureError, match=rf"gradient={gradient} is for bits and one-hot.*gradient=reparameterized"):
        objective.bound(model, guide, x)


def two_sites(x, observed=True):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Bernoulli(0.5)) + pyro.sample("y", dist.Bernoulli(0.5))
        if observed:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("gradient", CONTROLLED)
def test_several_sites_are_refused(gradient):
    with pytest.raises(StructureError, match=r"for one latent site.*\['z', 'y'\].*nvil or loo"):
        IWAE(2, gradient=gradient).bound(two_sites, lambda x: two_sites(x, False), torch.zeros(4))


def test_a_net_that_is_not_built_is_asked_for():
    model, guide, x = programs("bits", 3)
    with pytest.raises(StructureError, match=r"objective.prepare\(event_shape, latent_shape\)"):
        ELBO(gradient="relax").bound(model, guide, x)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        REBAR(temperature=0.0)


def test_a_scale_of_zero_is_the_score_function():
    found = []
    for estimator in (REBAR(scale=0.0), ScoreFunction()):
        torch.manual_seed(1)
        found.append(gradient_draws(ELBO(gradient=estimator), "bits", 100)["guide"])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("gradient", ["rebar", "arm"])
def test_a_compiled_step_is_the_eager_one(gradient):
    found = []
    for kind in (engines.SVI, engines.plain):
        torch.manual_seed(3)
        model = LatentVariableModel(UniformBits((2,)), Bernoulli((engines.PIXELS,), (2,), Linear))
        guide = Amortized(BernoulliBits((2,), (engines.PIXELS,), Linear))
        objective = IWAE(2, gradient=gradient)
        parts = torch.nn.ModuleList([model, guide, objective])
        svi = kind(model, guide, SharedOptimizer(parts.parameters(), torch.optim.Adam, 0.05), objective)
        found.append((engines.losses(svi, engines.batches(4)), engines.parameters(svi)))
    assert svi.why_eager is None
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-9)
