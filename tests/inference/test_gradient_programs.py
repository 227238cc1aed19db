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
from inference.bounds import CIWAE, MIWAE, Renyi
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
        (ELBO(kl="analytic", gradient="stl"), "KL in closed form.*kl=monte_carlo"),
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


def test_a_guide_that_is_no_module_cannot_be_held_constant():
    model, guide, x = programs("normal", 3)
    with pytest.raises(StructureError, match=r"has to be an nn\.Module"):
        ELBO(gradient="stl").bound(model, lambda x: guide(x), x)


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
