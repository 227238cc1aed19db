"""The contract of every Conditional, held against all built-in ones and one that is none of ours.

A new family joins by one line in ``CASES``: a constructor whose draws and contexts are small.
"""

from functools import partial
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch._subclasses.fake_tensor import FakeTensorMode

from guides.committed import CommittedNormal
from guides.discrete import BernoulliBits, OneHotCategoricals
from guides.exact import ExactPosterior
from guides.family import FamilyConditional
from guides.flow import CouplingPosterior
from guides.gaussian import DiagonalNormal, FullNormal, LowRankNormal, Unconditional
from guides.mixture import NormalMixture
from guides.relaxed import (
    MeanPathBernoulliBits,
    MeanPathOneHotCategoricals,
    RelaxedBernoulliBits,
    RelaxedOneHotCategoricals,
)
from models import likelihoods
from models.autoregressive import AutoregressiveLevels
from models.autoregressive_prior import AR1Prior
from models.conditional import Conditional
from models.discrete import UniformBits, UniformOneHots
from models.families import FamilyPrior
from models.flow_prior import AutoregressivePrior, CouplingPrior, InverseAutoregressivePrior, SplinePrior
from models.flows import Flow
from models.nets import MLP, ConvDecoder, ConvEncoder, GatedMLP, Linear
from models.pixel_decoder import PixelCNNLikelihood
from models.ppca import PPCA, LinearGaussian
from models.priors import LearnedNormal, MixturePrior, StandardNormal
from models.text import LSTMLikelihood, TransformerLikelihood
from models.vamp import AggregatedPosterior, VampPrior


class Waiting(Conditional):
    """A third party's likelihood: waiting times whose rates are read off the latent."""

    def __init__(self, event_shape, context_shape, net):
        super().__init__(event_shape, context_shape)
        self.net = net(self.context_shape, self.event_shape)

    def forward(self, *context):
        return dist.Exponential(self.net(*context).exp()).to_event(len(self.event_shape))


class Shown(Conditional):
    """A prior made of a guide, together with that guide, whose parameters it uses and does not own."""

    def __init__(self, prior, core):
        super().__init__(prior.event_shape)
        self.prior, self.core = prior, core
        prior.look_through(core)
        if isinstance(prior, AggregatedPosterior):
            prior.initialize(torch.randn(4, *prior.data_shape))

    def forward(self, *context):
        return self.prior(*context)


MLP8 = partial(MLP, hidden=(8,))
IMAGE = (1, 4, 3)
SMALL_CONV = partial(ConvDecoder, channels=(6, 5), activation="softplus")


CASES = {
    "StandardNormal": lambda: StandardNormal((3,)),
    "StandardNormal spatial": lambda: StandardNormal((2, 2, 2)),
    "LearnedNormal": lambda: LearnedNormal((3,)),
    "Bernoulli": lambda: likelihoods.Bernoulli(IMAGE, (3,), MLP8),
    "Bernoulli conv": lambda: likelihoods.Bernoulli(IMAGE, (3,), SMALL_CONV),
    "FixedGaussian": lambda: likelihoods.FixedGaussian(IMAGE, (3,), MLP8),
    "LearnedGaussian": lambda: likelihoods.LearnedGaussian((5,), (3,), partial(GatedMLP, hidden=(8,))),
    "OptimalGaussian": lambda: likelihoods.OptimalGaussian(IMAGE, (3,), SMALL_CONV).eval(),
    "Categorical": lambda: likelihoods.Categorical((5,), (3,), MLP8, levels=4),
    "Categorical conv": lambda: likelihoods.Categorical((2, 4, 3), (3,), SMALL_CONV, levels=4),
    "DiscretizedLogistic": lambda: likelihoods.DiscretizedLogistic(IMAGE, (3,), SMALL_CONV, levels=16),
    "DiscretizedLogistic shared": lambda: likelihoods.DiscretizedLogistic(IMAGE, (3,), MLP8, 16, shared_scale=True),
    "PixelCNNLikelihood": lambda: PixelCNNLikelihood(IMAGE, (3,), MLP8, channels=4, layers=2, kernel=3, features=2),
    "PixelCNNLikelihood grey": lambda: PixelCNNLikelihood(IMAGE, (3,), MLP8, levels=4, channels=4, everywhere=True),
    "LSTMLikelihood": lambda: LSTMLikelihood((4,), (3,), levels=5, width=3, hidden=4, layers=2),
    "LSTMLikelihood skip": lambda: LSTMLikelihood((4,), (3,), levels=5, width=3, hidden=4, layers=2, skip=True),
    "TransformerLikelihood": lambda: TransformerLikelihood((4,), (3,), levels=5, width=4, heads=2, skip=True),
    "LinearGaussian": lambda: LinearGaussian((2, 3), (3,)),
    "DiagonalNormal": lambda: DiagonalNormal((3,), IMAGE, partial(ConvEncoder, channels=(5,), activation="tanh")),
    "DiagonalNormal as likelihood": lambda: DiagonalNormal(IMAGE, (3,), SMALL_CONV),
    "DiagonalNormal as hierarchical prior": lambda: DiagonalNormal((2,), (3,), Linear),
    "FullNormal": lambda: FullNormal((3,), IMAGE, MLP8),
    "LowRankNormal": lambda: LowRankNormal((3,), IMAGE, MLP8, rank=2),
    "NormalMixture": lambda: NormalMixture((3,), IMAGE, MLP8, components=2),
    "CommittedNormal": lambda: CommittedNormal((3,), IMAGE, MLP8, SimpleNamespace(prior=StandardNormal((3,)))),
    "AR1Prior": lambda: AR1Prior((4,)),
    "Unconditional": lambda: Unconditional((3,), IMAGE),
    "ExactPosterior": lambda: ExactPosterior(PPCA((2, 3), 2)),
    "FamilyConditional laplace": lambda: FamilyConditional((3,), IMAGE, MLP8, "laplace"),
    "FamilyConditional elliptical": lambda: FamilyConditional((3,), IMAGE, MLP8, "elliptical"),
    "FamilyConditional erlang": lambda: FamilyConditional((3,), IMAGE, MLP8, "erlang"),
    "FamilyConditional dirichlet": lambda: FamilyConditional((3,), IMAGE, MLP8, "dirichlet"),
    "FamilyPrior gamma": lambda: FamilyPrior((3,), family="gamma"),
    "FamilyPrior dirichlet": lambda: FamilyPrior((3,), family="dirichlet"),
    "MixturePrior": lambda: MixturePrior((3,), components=4),
    "MixturePrior spatial": lambda: MixturePrior((2, 2, 2), components=4),
    "VampPrior": lambda: Shown(VampPrior((3,), IMAGE, components=4), DiagonalNormal((3,), IMAGE, MLP8)),
    "VampPrior of flows": lambda: Shown(VampPrior((3,), (2,), components=4), CouplingPosterior((3,), (2,), MLP8)),
    "VampPrior low rank": lambda: Shown(VampPrior((3,), (2,), components=4), LowRankNormal((3,), (2,), MLP8)),
    "AggregatedPosterior": lambda: Shown(AggregatedPosterior((3,), (2,)), DiagonalNormal((3,), (2,), MLP8)),
    "CouplingPrior": lambda: CouplingPrior((3,), hidden=(8,)),
    "AutoregressivePrior": lambda: AutoregressivePrior((3,), hidden=(8,)),
    "InverseAutoregressivePrior": lambda: InverseAutoregressivePrior((3,), hidden=(8,)),
    "SplinePrior": lambda: SplinePrior((3,), hidden=(8,), bins=4),
    "UniformBits": lambda: UniformBits((3,)),
    "UniformBits spatial": lambda: UniformBits((2, 2, 2)),
    "UniformOneHots": lambda: UniformOneHots((3, 4)),
    "BernoulliBits": lambda: BernoulliBits((3,), IMAGE, MLP8),
    "OneHotCategoricals": lambda: OneHotCategoricals((3, 4), IMAGE, MLP8),
    "RelaxedBernoulliBits": lambda: RelaxedBernoulliBits((3,), IMAGE, MLP8),
    "MeanPathBernoulliBits": lambda: MeanPathBernoulliBits((3,), IMAGE, MLP8),
    "MeanPathOneHotCategoricals": lambda: MeanPathOneHotCategoricals((3, 4), IMAGE, MLP8),
    "RelaxedOneHotCategoricals": lambda: RelaxedOneHotCategoricals((3, 4), IMAGE, MLP8),
    "Waiting": lambda: Waiting((2, 2), (3,), MLP8),
}
LEADING = [(), (4,), (2, 3)]


@pytest.fixture(params=CASES)
def case(request):
    return build(request.param)


def build(name):
    conditional = CASES[name]()
    with torch.no_grad():
        for parameter in conditional.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return conditional


def contexts(conditional, leading=(4,)):
    return (torch.randn(*leading, *conditional.context_shape),) if conditional.context_shape else ()


def mean_of(made):
    """None for flows, mixtures of them, and what is drawn entry by entry, which know none."""
    try:
        return made.mean
    except NotImplementedError:
        assert isinstance(getattr(made, "component_distribution", made), Flow | AutoregressiveLevels)
        return None


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_shapes(case, leading):
    made = case(*contexts(case, leading))
    assert made.event_shape == case.event_shape
    assert torch.broadcast_shapes(made.batch_shape, leading) == leading
    draws = made.sample((7,))
    assert draws.shape == (7, *made.batch_shape, *case.event_shape)
    assert draws.dtype == torch.get_default_dtype()
    assert made.log_prob(draws).shape == (7, *made.batch_shape)
    mean = mean_of(made)
    assert mean is None or mean.shape == made.batch_shape + case.event_shape
    assert made.log_prob(draws).isfinite().all()


def test_a_batch_is_a_loop(case):
    (context,) = contexts(case, (2, 3)) or (torch.zeros(2, 3),)
    made = case(context).expand((2, 3))
    draws = made.sample()
    loop = [case(context[k, n]).log_prob(draws[k, n]) for k in range(2) for n in range(3)]
    assert torch.allclose(made.log_prob(draws).flatten(), torch.stack(loop).flatten(), atol=1e-10)
    assert made.log_prob(draws).std() > 1e-6 or isinstance(case, UniformBits | UniformOneHots)


def test_expanding_repeats(case):
    made = case(*contexts(case))
    wide = made.expand((5, 4))
    draws = wide.sample()
    assert draws.shape == (5, 4, *case.event_shape)
    assert torch.allclose(wide.log_prob(draws), made.log_prob(draws), atol=1e-12)
    assert not torch.equal(draws[0], draws[1])
    mean = mean_of(made)
    assert mean is None or torch.allclose(wide.mean, mean.expand(wide.mean.shape), atol=1e-12)


def test_draws_average_to_the_mean(case):
    made, count = case(*contexts(case)), 4000
    if mean_of(made) is None:
        pytest.skip("knows no mean")
    draws, mean = made.sample((count,)), made.mean.detach()
    spread = draws.std(0)
    directions = torch.randn(case.event_shape) / spread.mean()  # a sum of entries is closer to normal than each
    dims = tuple(range(-len(case.event_shape), 0))

    def errors(mean):
        projected = ((draws - mean) * directions).sum(dims)
        return projected.mean(0).abs() / (projected.std(0) / count**0.5)

    assert (errors(mean + 0.2 * spread * directions.sign()) > 5).all()
    assert (errors(mean) < 5).all()


def test_every_named_parameter_gets_a_gradient(case):
    made = case(*contexts(case, (16,)))
    made.log_prob(made.sample()).sum().backward() if list(case.parameters()) else None
    for name, parameter in case.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_reparameterized_draws_carry_gradients(case):
    made = case(*contexts(case))
    if not made.has_rsample or not list(case.parameters()):
        pytest.skip("draws are not a differentiable function of parameters")
    made.rsample().square().sum().backward()
    assert all(parameter.grad is not None for parameter in case.parameters())


def test_pyro_sees_exactly_the_parameters(case):
    with poutine.trace(param_only=True) as capture:
        case(*contexts(case))
    seen = {id(site["value"].unconstrained()) for site in capture.trace.nodes.values()}
    assert seen == {id(parameter) for parameter in case.parameters()}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_restores_it(name):
    first, second = build(name), build(name)
    if not list(first.parameters()):
        pytest.skip("has no parameters")
    context = contexts(first)
    draws = first(*context).sample()
    assert not torch.allclose(first(*context).log_prob(draws), second(*context).log_prob(draws))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(*context).log_prob(draws), second(*context).log_prob(draws))


def test_it_follows_to_single_precision(case):
    target = case.model if isinstance(case, ExactPosterior) else case
    target.to(torch.float32)
    made = case(*(context.float() for context in contexts(case)))
    draws = made.sample()
    assert draws.dtype == torch.float32
    assert made.log_prob(draws).dtype == torch.float32


def test_a_step_never_waits_for_the_device(case):
    # Fake tensors hold no numbers: asking one for its value, as .item() or an if would, raises.
    with pyro.validation_enabled(False), FakeTensorMode(allow_non_fake_inputs=True):
        made = case(*(torch.zeros(4, *context.shape[1:]) for context in contexts(case)))
        made.log_prob(made.sample()).sum()


def test_context_is_ignored_where_there_is_none(case):
    if case(*contexts(case)).batch_shape != ():
        pytest.skip("reads its context")
    x, z = torch.randn(4, 2), case().sample()
    assert torch.equal(case().log_prob(z), case(x).log_prob(z))
