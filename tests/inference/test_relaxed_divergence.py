"""The divergence of relaxed draws is that of what they relax, at every temperature and under every prior."""

from functools import partial
from itertools import product

import pyro
import pytest
import torch
from torch import nn

from guides.amortized import Amortized
from guides.relaxed import RelaxedBernoulliBits, RelaxedOneHotCategoricals
from inference.annealing import AnnealedELBO, BetaELBO
from inference.assemble import assemble
from inference.config import load
from inference.free_bits import FreeBits
from inference.objectives import ELBO
from inference.particles import StructureError, particles
from inference.stock import Trace, TraceMeanField
from models.conditional import Conditional
from models.discrete import OneHots, UniformBits, UniformOneHots, joint
from models.dvae import OneHotPrior
from models.latent import LatentVariableModel
from models.likelihoods import Bernoulli
from models.nets import Linear
from models.pixelcnn import PixelCNN

PIXELS = 3


class Weighted(Conditional):
    """One-hot vectors of classes that are not alike."""

    def __init__(self, shape):
        super().__init__(shape)
        self.logits = nn.Parameter(torch.randn(shape))

    def forward(self, *context):
        return joint(OneHots(self.logits), len(self.event_shape))


def pair(kind, temperature):
    shape = {"bits": (3,), "grid": (1, 2, 3)}.get(kind, (2, 4))
    prior = {
        "bits": lambda: UniformBits(shape),
        "classes": lambda: UniformOneHots(shape),
        "weighted": lambda: Weighted(shape),
        "grid": lambda: OneHotPrior(PixelCNN((1, 2), 3, channels=4, layers=1), 3),
    }[kind]()
    core = RelaxedBernoulliBits if kind == "bits" else RelaxedOneHotCategoricals
    guide = Amortized(core(shape, (PIXELS,), Linear, hard=False, temperature=temperature, minimum=temperature))
    model = LatentVariableModel(prior, Bernoulli((PIXELS,), shape, Linear))
    with torch.no_grad():
        for parameter in nn.ModuleList([model, guide]).parameters():
            parameter.add_(0.7 * torch.randn_like(parameter))
    return model, guide


def by_hand(kind, model, guide, x):
    """KL(q || p) of each datum, summed over all states, ``(N,)``."""
    logits = guide.core.net(x)  # (N, *event)
    if kind == "bits":
        logits = torch.stack([torch.zeros_like(logits), logits], -1)
    log_q = logits.flatten(1, -2).log_softmax(-1)  # (N, V, C)
    classes, total = log_q.shape[-1], 0
    for state in product(range(classes), repeat=log_q.shape[1]):
        each = log_q[:, range(len(state)), state].sum(-1)
        hot = torch.eye(classes)[list(state)]
        with pyro.validation_enabled(False):
            log_p = model.prior().log_prob(hot[:, 1] if kind == "bits" else hot.reshape(model.prior.event_shape))
        total = total + each.exp() * (each - log_p)
    return total


@pytest.mark.parametrize("temperature", [2.0, 0.7])
@pytest.mark.parametrize("kind", ["bits", "classes", "weighted"])
def test_it_is_the_sum_over_states_in_value_and_gradient(kind, temperature):
    model, guide = pair(kind, temperature)
    x = (torch.rand(5, PIXELS) < 0.5).double()
    draws = particles(model, guide, x, 3)
    exact, found = by_hand(kind, model, guide, x), draws.sampled_kl()
    assert torch.allclose(found, exact.expand(3, 5), atol=1e-10)
    own = list(guide.parameters())
    for one, other in zip(*(torch.autograd.grad(kl.mean(), own) for kl in (exact, found)), strict=True):
        assert torch.allclose(one, other, atol=1e-10)
    # The mean of log q - log p over many relaxed draws is something else.
    many = particles(model, guide, x, 4000)
    plain = many.log_q - many.log_prior
    assert ((plain.mean(0) - exact).abs() > 10 * plain.std(0) / 4000**0.5).any()


def test_under_a_prior_without_a_closed_form_it_is_so_on_average():
    model, guide = pair("grid", 1.0)
    x = torch.tensor([[1.0, 0.0, 1.0]])
    with torch.no_grad():
        exact = by_hand("grid", model, guide, x)
        draws = particles(model, guide, x, 20_000)
        found, plain = draws.sampled_kl(), draws.log_q - draws.log_prior
    error = found.std(0) / 20_000**0.5
    assert (found.mean(0) - exact).abs() < 5 * error
    assert (plain.mean(0) - exact).abs() > 20 * error
    with pytest.raises(StructureError, match=r"from relaxed draws.*use objective=elbo"):
        TraceMeanField(max_plate_nesting=1).loss(model, guide, x)


@pytest.mark.parametrize(
    "make",
    [ELBO, partial(BetaELBO, beta=1.0), AnnealedELBO, partial(FreeBits, nats=0.0, group="all", kl="monte_carlo")],
    ids=["elbo", "beta", "annealed", "free_bits"],
)
def test_every_elbo_has_it(make):
    model, guide = pair("classes", 2.0)
    x = (torch.rand(5, PIXELS) < 0.5).double()
    bound, draws = make().estimate(model, guide, x)
    assert torch.allclose(bound, draws.log_likelihood[0] - by_hand("classes", model, guide, x), atol=1e-10)


def test_pyros_own_which_take_it_from_the_draws_refuse():
    model, guide = pair("bits", 1.0)
    x = torch.zeros(4, PIXELS)
    with pytest.raises(StructureError, match=r"those of \['z'\] are relaxed.*use objective=elbo"):
        Trace(max_plate_nesting=1).loss(model, guide, x)
    guide.eval()
    assert Trace(max_plate_nesting=1).loss(model, guide, x) > 0


@pytest.mark.parametrize(
    ("words", "objective"),
    [
        (["prior=onehot", "guide=concrete"], "elbo"),
        (["prior=bits", "guide=straight_through"], "trace_mean_field"),
        (["prior=bits", "guide=straight_through_mean"], "trace_mean_field"),
        (["model=vq", "guide=quantized"], "vq"),
        (["model=vq_levels", "guide=quantized_levels", "encoder=local", "decoder=local"], "vq"),
        (["prior=onehot", "guide=concrete", "objective=iwae"], "iwae"),
        (["guide=diagonal"], "trace_elbo"),
    ],
    ids=lambda case: case if isinstance(case, str) else case[-1],
)
def test_the_objective_follows_the_guide_unless_it_is_named(words, objective):
    setup = assemble(load(["device=cpu", *words]))
    assert setup.config.words["objective"] == objective
