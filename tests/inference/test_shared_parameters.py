"""Guides that read parameters of the model, and priors that read the guide's: gradients are right or refused."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from guides.hierarchical import Ladder
from guides.semi_amortized import SemiAmortized
from inference.baselines import NormalizedNVIL
from inference.bounds import MIWAE, PIWAE, Renyi
from inference.gradients import DoublyReparameterized
from inference.objectives import ELBO, IWAE
from inference.structure import StructureError
from inference.wake_sleep import WakeSleep
from models.hierarchical import TwoLayerModel
from models.latent import LatentVariableModel
from models.likelihoods import FixedGaussian
from models.nets import MLP, Linear
from models.priors import LearnedNormal, StandardNormal
from models.vamp import VampPrior
from tests import estimation
from tests.estimation import NORMAL, deviations, gradients
from tests.gradient_cases import BOUNDS, LIMIT, PATHWISE, iwae

ROWS = 6000

# Every row has parameters of its own, so that one backward pass gives as many draws of the gradient. The guide's
# location reads the model's: base + slope x + 0.8 loc + 0.5 weight[0], and its scale the model's noise.


def _shifted(model, guide):
    location = guide["base"] + 0.8 * model["loc"] + 0.5 * model["weight"][..., 0]
    return {**guide, "base": location, "log_scale": guide["log_scale"] + 0.3 * model["log_noise"]}


class ReadingGuide(pyro.nn.PyroModule):
    """A module that refers to the model and does not own it."""

    def __init__(self, model, count):
        super().__init__()
        self.own = estimation.NormalGuide(count)
        object.__setattr__(self, "model", model)

    def q(self, x, detach_own=False):
        model = dict(self.model.named_parameters())
        own = {name: p.detach() if detach_own else p for name, p in self.own.named_parameters()}
        values = _shifted(model, own)
        return dist.Normal(values["base"] + (values["slope"] * x).sum(-1), values["log_scale"].exp())

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.q(x))


def of_functions(model, guide):
    """The same as two functions whose parameters come from Pyro's store, with the parameters as they are there."""

    def of(prefix, module):
        return {n: pyro.param(f"{prefix}.{n}", p.detach().clone()) for n, p in module.named_parameters()}

    def generate(x):
        values = of("model", model)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(values["loc"], values["log_scale"].exp()))
            mean = values["weight"] * z.unsqueeze(-1) + values["bias"]
            pyro.sample("x", dist.Normal(mean, values["log_noise"].exp().unsqueeze(-1)).to_event(1), obs=x)

    def infer(x):
        values = _shifted(of("model", model), of("guide", guide.own))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(values["base"] + (values["slope"] * x).sum(-1), values["log_scale"].exp()))

    def stored(module, prefix):
        return [pyro.get_param_store()._params[f"{prefix}.{name}"] for name, _ in module.named_parameters()]

    return generate, infer, stored


def draws_of(objective, functions=False, spoil=None):
    model = estimation.NormalModel(ROWS)
    guide = ReadingGuide(model, ROWS)
    x = torch.tensor(NORMAL["x"]).expand(ROWS, -1).clone()
    if spoil:
        spoil(objective, guide, x)
    programs, parameters = (model, guide), lambda module, prefix: list(module.parameters())
    if functions:
        *programs, parameters = of_functions(model, guide)
    objective.bound(*programs, x).sum().backward()
    return {
        part: torch.cat([p.grad.reshape(ROWS, -1) for p in parameters(module, part)], -1)
        for part, module in (("model", model), ("guide", guide.own))
    }


def exact(formula, particles):
    model, guide = estimation._leaves(NORMAL["model"]), estimation._leaves(NORMAL["guide"])
    terms, probability = estimation._normal_terms(model, _shifted(model, guide), particles)
    return gradients((probability * formula(*terms)).sum(), model, guide)


CASES = [(name, gradient) for name, gradient in PATHWISE if gradient != "reparameterized"]


@pytest.mark.parametrize("functions", [False, True], ids=["modules", "functions"])
@pytest.mark.parametrize(("name", "gradient"), [*CASES, ("iwae", "vimco"), ("elbo", "loo")])
def test_gradients_are_exact_where_the_guide_reads_the_models_parameters(name, gradient, functions):
    objective, formula, count = BOUNDS[name][0](gradient), *BOUNDS[name][1:]
    found, truth = draws_of(objective, functions), exact(formula, count)
    for part in ("model", "guide"):
        assert deviations(found[part], truth[part]) < LIMIT, part


class OwnHeldAlone(DoublyReparameterized):
    """The guide's own parameters alone are held constant: those of the model keep their score, twice replaced."""

    def estimate(self, objective, draw, x):
        bound, draws = super().estimate(objective, draw, x)
        z = draws.latents["z"].value.detach()
        score = self.guide.q(x, detach_own=True).log_prob(z)
        return bound - (draws.log_weight.detach().softmax(0) * (score - score.detach())).sum(0), draws


def test_a_score_that_is_kept_is_told_apart():
    objective = IWAE(2, gradient=OwnHeldAlone())
    found = draws_of(objective, spoil=lambda o, guide, x: object.__setattr__(o.gradient, "guide", guide))
    assert deviations(found["model"], exact(iwae, 2)["model"]) > 2 * LIMIT


def ladder():
    net = partial(MLP, hidden=(3,))
    middle = DiagonalNormal((2,), (1,), net)
    model = TwoLayerModel(LearnedNormal((1,)), middle, FixedGaussian((3,), (2,), Linear, scale=0.7))
    return model, Ladder((3,), net, model, features=2, hidden=(3,))


def semi_amortized(unroll=True):
    net = partial(MLP, hidden=(3,))
    model = LatentVariableModel(LearnedNormal((2,)), FixedGaussian((3,), (2,), net, scale=0.7))
    return model, Amortized(SemiAmortized(model, net, steps=2, unroll=unroll))


def vamp():
    net = partial(MLP, hidden=(3,))
    model = LatentVariableModel(VampPrior((2,), (3,), components=3), FixedGaussian((3,), (2,), net, scale=0.7))
    guide = Amortized(DiagonalNormal((2,), (3,), net))
    model.prior.look_through(guide.core)
    return model, guide


def perturbed(make):
    torch.manual_seed(1)
    model, guide = make()
    parameters = list(nn.ModuleList([model, guide]).parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model, guide, parameters


def means(objective, model, guide, parameters, repeats=10, rows=800):
    """Mean gradient and its standard error, over repeats."""
    x, found = torch.tensor([0.3, 0.8, -0.2]).expand(rows, -1).clone(), []
    for seed in range(repeats):
        torch.manual_seed(seed + 1)
        bound = objective.bound(model, guide, x).mean()
        grads = torch.autograd.grad(bound, parameters, allow_unused=True, materialize_grads=True)
        found.append(torch.cat([gradient.flatten() for gradient in grads]))
    stacked = torch.stack(found)
    return stacked.mean(0), stacked.std(0) / math.sqrt(repeats)


@pytest.mark.parametrize("make", [ladder, semi_amortized, vamp])
@pytest.mark.parametrize("bound", [lambda g: IWAE(3, gradient=g), lambda g: Renyi(0.3, 3, gradient=g)])
def test_our_own_guides_that_do_have_the_plain_gradients_mean(make, bound):
    model, guide, parameters = perturbed(make)
    plain, plain_error = means(bound("reparameterized"), model, guide, parameters)
    doubly, error = means(bound("dreg"), model, guide, parameters)
    # few repeats: the standard errors are themselves uncertain, so that the largest of many is above 5 of them
    far = ((plain - doubly).abs() / (plain_error.square() + error.square()).sqrt().clamp(min=1e-12)).max()
    assert far < 8


TWO_TARGETS = [PIWAE(4, 2), PIWAE(3, 1), PIWAE(4, 2, gradient="dreg"), WakeSleep(3), WakeSleep(3, "both"),
               WakeSleep(3, gradient="dreg"), ELBO(gradient=NormalizedNVIL(nn.Linear(3, 1).double()))]  # fmt: skip


@pytest.mark.parametrize("objective", TWO_TARGETS, ids=lambda o: f"{type(o).__name__} {o.gradient.name}")
@pytest.mark.parametrize("make", [ladder, semi_amortized, vamp])
def test_two_targets_for_one_parameter_are_refused(make, objective):
    model, guide, _ = perturbed(make)
    x = torch.randn(5, 3)
    with pytest.raises(StructureError, match=r"both depend on the same parameters.*use (objective|gradient)="):
        objective.bound(model, guide, x)
    with torch.no_grad(), pytest.raises(StructureError, match="both depend"):  # as a run is checked before it starts
        objective.bound(model, guide, x)
    model, guide, _ = perturbed(partial(semi_amortized, unroll=False))  # what it reads is a constant
    assert objective.bound(model, guide, x).requires_grad


def test_the_same_of_functions_and_with_names_where_there_are_any():
    x = torch.randn(5)

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(loc, 1.0)), 1.0), obs=x)

    def guide(x):
        loc, slope = pyro.param("loc", torch.tensor(0.3)), pyro.param("slope", torch.tensor(0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + slope * x, 0.7))

    for objective in (PIWAE(4, 2), WakeSleep(3), WakeSleep(3, gradient="dreg")):
        with pytest.raises(StructureError, match="both depend on the same parameters"):
            objective.bound(model, guide, x)
    for objective in (MIWAE(4, 2, gradient="dreg"), IWAE(3), ELBO(2, gradient="loo")):
        assert objective.bound(model, guide, x).requires_grad
    with pytest.raises(StructureError, match=r"\(middle\.net\S+, "):
        PIWAE(4, 2).bound(*ladder(), torch.randn(5, 3))


def test_programs_that_share_nothing_have_their_two_targets():
    net = partial(MLP, hidden=(3,))
    model = LatentVariableModel(StandardNormal((2,)), FixedGaussian((3,), (2,), net, scale=0.7))
    guide = Amortized(DiagonalNormal((2,), (3,), net))
    for objective in TWO_TARGETS:
        assert objective.bound(model, guide, torch.randn(5, 3)).requires_grad
