"""Gradient estimators with guides of other shapes, with parts from elsewhere, and what they refuse."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from guides import flow
from guides.amortized import Amortized
from guides.exact import ExactPosterior
from guides.family import FamilyConditional
from inference.baselines import NVIL, ScoreFunction, learning_signal
from inference.bounds import CIWAE, MIWAE, PIWAE, Renyi
from inference.covariance import Covariance
from inference.gradients import Reparameterized
from inference.objectives import ELBO, IWAE
from inference.particles import StructureError, particles
from inference.thermodynamic import TVO
from inference.wake_sleep import WakeSleep
from models.families import FAMILIES, FamilyPrior
from models.latent import LatentVariableModel
from models.likelihoods import FixedGaussian
from models.nets import MLP
from models.ppca import PPCA
from tests.estimation import programs
from tests.gradient_cases import LikelihoodOnly, assert_right, draws_of
from tests.programs import HierarchicalGuide, HierarchicalModel


class FlowGuide(pyro.nn.PyroModule):
    """A normal pushed through a learned inverse autoregressive transform."""

    def __init__(self, size=3, data=2):
        super().__init__()
        self.base = torch.nn.Linear(data, 2 * size)
        self.flow = dist.transforms.affine_autoregressive(size, hidden_dims=[8])

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = self.base(x).chunk(2, -1)
            base = dist.Normal(loc, log_scale.exp()).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


FLOWS = {
    "coupling": flow.CouplingPosterior,
    "autoregressive": flow.InverseAutoregressivePosterior,
    "planar": flow.PlanarPosterior,
    "spline": flow.SplinePosterior,
}


def flow_model(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1).to_event(1))
        pyro.sample("x", dist.Normal(z[..., :2].sin() + z[..., 2:], 0.5).to_event(1), obs=x)


def parameter_gradients(objective, model, guide, x):
    for module in (model, guide):
        if isinstance(module, torch.nn.Module):
            module.zero_grad()
    torch.manual_seed(3)
    bound = objective.bound(model, guide, x)
    bound.sum().backward()
    return torch.cat([p.grad.flatten() for p in guide.parameters()])


def guide_score(model, guide, x, count):
    guide.zero_grad()
    torch.manual_seed(3)
    particles(model, guide, x, count, detach_draws=True).log_q.mean(0).sum().backward()
    return torch.cat([p.grad.flatten() for p in guide.parameters()])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["hand-written flow", *FLOWS, "hierarchy", "reversed hierarchy"])
def test_sticking_the_landing_leaves_out_the_score_and_nothing_else(kind, count):
    if kind == "hand-written flow":
        model, guide, x = flow_model, FlowGuide(), torch.randn(4, 2)
    elif kind in FLOWS:
        net = partial(MLP, hidden=(4,))
        guide = Amortized(FLOWS[kind]((3,), (2,), net, transforms=2, context_dim=3))
        for parameter in guide.parameters():  # away from the identity, where they start
            torch.nn.init.normal_(parameter, std=0.3)
        model, x = flow_model, torch.randn(4, 2)
    else:
        model, guide = HierarchicalModel(), HierarchicalGuide(upwards=kind.startswith("reversed"))
        x = torch.randn(4, 5)
    full = parameter_gradients(ELBO(count), model, guide, x)
    path = parameter_gradients(ELBO(count, gradient="stl"), model, guide, x)
    torch.testing.assert_close(path, full + guide_score(model, guide, x, count), rtol=1e-8, atol=1e-9)
    assert (path - full).abs().max() > 1e-3
    doubly = parameter_gradients(ELBO(count, gradient="dreg"), model, guide, x)
    torch.testing.assert_close(doubly, path, rtol=1e-10, atol=1e-12)


def test_doubly_reparameterized_paths_through_a_hierarchy_are_scaled_once():
    """By hand: each particle's path derivative times its squared normalized weight."""
    model, guide, x = HierarchicalModel(), HierarchicalGuide(), torch.randn(1, 5)
    found = parameter_gradients(IWAE(3, gradient="dreg"), model, guide, x)
    guide.zero_grad()
    torch.manual_seed(3)
    draws = particles(model, guide, x, 3, detach_guide=True)
    weights = draws.log_weight.detach().softmax(0)
    (weights.square() * draws.log_weight).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in guide.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_gradients_with_the_exact_posterior_of_a_model_for_a_guide():
    model = PPCA((3,), 2)
    guide, x = Amortized(ExactPosterior(model)), torch.randn(5, 3)
    for gradient in ("reparameterized", "stl", "dreg", "score", "loo"):
        model.zero_grad()
        bound = ELBO(2, gradient=gradient).bound(model, guide, x)
        bound.sum().backward()
        torch.testing.assert_close(bound, model.log_evidence(x))


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (IWAE(5, gradient="stl"), "biased for IWAE with 5 particles.*gradient=dreg"),
        (MIWAE(4, 2, gradient="stl"), "biased for MIWAE"),
        (ELBO(kl="analytic", gradient="stl"), "KL in closed form.*objective.kl=monte_carlo"),
        (ELBO(kl="analytic", gradient="dreg"), "KL in closed form"),
        (Renyi(-math.inf, 5, gradient="dreg"), "no doubly reparameterized gradient of Renyi"),
        (TVO(5, gradient="dreg"), "no doubly reparameterized gradient of TVO"),
        (ELBO(1, gradient="loo"), "needs objective.particles=2 or more"),
        (IWAE(5, gradient="covariance"), "tempered expectations, such as objective=tvo"),
        (TVO(1), "needs objective.particles=2 or more.*gradient=reparameterized"),
        (LikelihoodOnly(2, gradient="vimco"), "does not define combine"),
        (IWAE(5, gradient="loo"), "own contribution to a mean, and IWAE is none; use gradient=vimco"),
        (ELBO(5, gradient="vimco"), "ELBO with 5 particles is a mean over them; use gradient=loo"),
        (MIWAE(4, 4, gradient="vimco"), "is a mean over them; use gradient=loo"),
        (IWAE(5, gradient="nvil_normalized"), "does not come by the score; use gradient=nvil"),
        (ELBO(kl="analytic", gradient="nvil_normalized"), "does not come by the score; use gradient=nvil"),
        (LikelihoodOnly(2, gradient="stl"), "biased for LikelihoodOnly"),
        (ELBO(gradient="nvil"), "not built yet: call objective.prepare"),
    ],
)
def test_what_an_estimator_is_not_valid_for_is_refused_with_what_would_do(objective, reason):
    model, guide, x = programs("normal", 3)
    with pytest.raises(StructureError, match=reason):
        objective.bound(model, guide, x)


def test_one_particle_and_equal_parts_are_means_so_that_nothing_is_left_out_wrongly():
    model, guide, x = programs("normal", 3)
    for objective in (IWAE(1, gradient="stl"), MIWAE(4, 4, gradient="stl"), CIWAE(1.0, 3, gradient="stl")):
        assert objective.bound(model, guide, x).requires_grad


def test_unknown_words_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"one of reparameterized, stl, dreg, score.*got 'reinforce'"):
        ELBO(gradient="reinforce")


def of_functions(net=None, register=False):
    """The normal model and guide as functions with parameters from ``pyro.param``, and their data."""

    def model(x):
        loc = pyro.param("prior_loc", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.2))
            pyro.sample("x", dist.Normal(1.5 * z, 0.8), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.full((len(x),), 0.4))
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        if register:
            pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc if net is None else net(x.unsqueeze(-1)).squeeze(-1), scale))

    return model, guide, torch.tensor([0.5, -1.0, 2.0])


class OfModules(pyro.nn.PyroModule):
    """The same with parameters in a module, its methods the programs."""

    def __init__(self):
        super().__init__()
        self.prior_loc = torch.nn.Parameter(torch.tensor(0.3))
        self.loc = torch.nn.Parameter(torch.full((3,), 0.4))
        self.log_scale = torch.nn.Parameter(torch.tensor(0.7).log())

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.prior_loc, 1.2))
            pyro.sample("x", dist.Normal(1.5 * z, 0.8), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()))


HOLDING = (
    ELBO(2, gradient="stl"),
    ELBO(2, gradient="dreg"),
    IWAE(3, gradient="dreg"),
    WakeSleep(3, gradient="dreg"),
    PIWAE(4, 2),
    PIWAE(4, 2, gradient="dreg"),
)


@pytest.mark.parametrize("objective", HOLDING, ids=lambda o: f"{type(o).__name__} {o.gradient.name}")
def test_parameters_of_the_store_and_of_a_methods_module_are_held_constant_too(objective):
    """Functions with ``pyro.param`` and methods of a module have the gradient of programs that are modules."""
    model, guide, x = of_functions()
    torch.manual_seed(3)
    value = objective.loss_and_grads(model, guide, x)
    store = pyro.get_param_store()
    found = {name: store._params[name].grad for name in ("prior_loc", "loc", "scale")}
    of_model, of_guide = OfModules(), OfModules()
    torch.manual_seed(3)
    torch.testing.assert_close(objective.loss_and_grads(of_model.model, of_guide.guide, x), value)
    for name, parameter in (("prior_loc", of_model.prior_loc), ("loc", of_guide.loc), ("scale", of_guide.log_scale)):
        torch.testing.assert_close(found[name], parameter.grad)
        assert found[name].abs().min() > 0, name


def test_the_path_derivative_of_a_function_is_the_one_on_paper():
    """d/d loc and d/d log scale of log p(x, z) - log q(z), along z = loc + scale eps, q's parameters constant."""
    model, guide, x = of_functions()
    torch.manual_seed(3)
    ELBO(gradient="stl").loss_and_grads(model, guide, x)
    torch.manual_seed(3)
    z = 0.4 + 0.7 * torch.randn(3)
    along = 1.5 * (x - 1.5 * z) / 0.8**2 - (z - 0.3) / 1.2**2 + (z - 0.4) / 0.7**2
    store = pyro.get_param_store()
    torch.testing.assert_close(-store._params["loc"].grad, along)
    torch.testing.assert_close(-store._params["scale"].grad, (along * (z - 0.4)).sum())


def test_pyros_own_svi_trains_a_guide_of_functions_by_the_path_alone():
    model, guide, x = of_functions()
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=IWAE(3, gradient="dreg"))
    svi.step(x)
    names = ("prior_loc", "loc", "scale")
    before = {name: pyro.param(name).detach().clone() for name in names}
    svi.step(x)
    for name in names:
        assert not torch.equal(pyro.param(name), before[name]), name


@pytest.mark.parametrize("register", [True, False])
def test_where_a_guides_parameters_come_from_does_not_matter_to_a_gradient_along_its_draws(register):
    """A net registered by pyro.module, or known to the function alone, has the gradient of a module that owns it."""
    net = torch.nn.Linear(1, 1)
    model, guide, x = of_functions(net, register)

    class Owning(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.log_scale = net, torch.nn.Parameter(torch.tensor(0.7).log())

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.net(x.unsqueeze(-1)).squeeze(-1), self.log_scale.exp()))

    for objective in HOLDING[:4]:
        found = []
        for program in (guide, Owning()):
            net.zero_grad()
            torch.manual_seed(3)
            objective.loss_and_grads(model, program, x)
            found.append(net.weight.grad.clone())
        torch.testing.assert_close(*found)
        assert found[0].abs() > 0


def test_a_model_that_hides_its_parameters_cannot_be_held_constant():
    _, guide, x = of_functions()
    with pytest.raises(StructureError, match="methods of one module; make them two"):
        PIWAE(4, 2).loss_and_grads((both := OfModules()).model, both.guide, x)
    offset, net = torch.nn.Parameter(torch.tensor(0.2)), torch.nn.Linear(1, 1)

    def hiding(x, register=False):
        if register:
            pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(offset, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(StructureError, match=r"the model has parameters.*nn\.Module"):
        PIWAE(4, 2).loss_and_grads(hiding, guide, x)
    with pytest.raises(StructureError, match=r"by pyro\.module.*nn\.Module"):
        PIWAE(4, 2).loss_and_grads(partial(hiding, register=True), guide, x)


def test_dropout_in_the_guide_is_refused_where_it_would_score_its_draws_twice():
    model, guide, x = programs("normal", 3)
    guide.dropout = torch.nn.Dropout(0.5)
    with pytest.raises(StructureError, match="dropout"):
        ELBO(gradient="stl").bound(model, guide, x)
    assert ELBO(gradient="stl").bound(model, guide.eval(), x).isfinite().all()


def test_an_estimator_of_ones_own_is_one_overridden_line():
    class Median(ScoreFunction):
        def baseline(self, objective, draws, signal, x):
            return signal.median(0, keepdim=True).values.detach() * 0 + 0.3

    assert_right(draws_of("elbo", Median(), "bits"), "elbo", "bits")


def test_nvil_learns_its_baseline_and_no_other_parameter_moves_it():
    estimator = NVIL(torch.nn.Linear(3, 1))
    objective = ELBO(gradient=estimator)
    model, guide, x = programs("bits", 200)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.1)
    errors = []
    for _ in range(100):
        optimizer.zero_grad()
        draws = particles(model, guide, x)
        signal, _ = learning_signal(objective, draws)
        errors.append(float((signal - estimator.baseline(objective, draws, signal, x)).detach().square().mean()))
        (-objective.bound(model, guide, x)).sum().backward()
        optimizer.step()
    assert errors[0] > 4 * min(errors[-5:])
    assert isinstance(objective.gradient, NVIL)
    assert not isinstance(objective.gradient, Covariance | Reparameterized)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scores_that_do_not_average_to_zero_are_refused_by_what_needs_them_to(family):
    prior = "dirichlet" if family == "dirichlet" else "gaussian"
    model = LatentVariableModel(FamilyPrior((3,), family=prior), FixedGaussian((2,), (3,), MLP))
    guide = Amortized(FamilyConditional((3,), (2,), MLP, family=family))
    x = torch.randn(4, 2)
    assert ELBO().bound(model, guide, x).requires_grad
    estimators = (
        *(ELBO(2, gradient=gradient) for gradient in ("stl", "dreg", "score", "loo")),
        IWAE(2, gradient="dreg"),
        TVO(2),
        WakeSleep(2),
        WakeSleep(2, gradient="dreg"),
    )
    for objective in estimators:
        if FAMILIES[family].score_identity:
            assert objective.bound(model, guide, x).requires_grad
        else:
            with pytest.raises(StructureError, match=r"mean of the score is not zero.*gradient=reparameterized"):
                objective.bound(model, guide, x)
