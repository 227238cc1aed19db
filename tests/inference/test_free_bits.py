"""Free bits by hand: which groups pay, what they pay, and who gets a gradient."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal, FullNormal
from inference.free_bits import FreeBits
from inference.objectives import ELBO
from inference.particles import StructureError, particles
from models import likelihoods
from models.latent import LatentVariableModel
from models.nets import Linear
from models.priors import StandardNormal
from tests.programs import HierarchicalGuide, HierarchicalModel

LOC = [[0.1, 1.0, -0.2], [0.3, -2.0, 0.1]]
KL = [[0.005, 0.5, 0.02], [0.045, 2.0, 0.005]]  # loc^2 / 2, as every scale is 1


class Guide(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor(LOC))

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))


def model(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1).to_event(1))
        pyro.sample("x", dist.Normal(0 * z.sum(-1), 1.0), obs=x)  # whose likelihood no latent moves


X = torch.zeros(2)
LIKELIHOOD = -0.9189385332046727  # log N(0; 0, 1)
# averages over the batch: 0.025, 1.25, 0.0125; sums over dimensions: 0.525, 2.05, whose mean is 1.2875


@pytest.mark.parametrize(
    ("nats", "group", "floor_of", "expected", "paying"),
    [
        (0.1, "dimension", "batch", [0.1 + 0.5 + 0.1, 0.1 + 2.0 + 0.1], [[0, 1, 0], [0, 1, 0]]),
        (0.02, "dimension", "batch", [0.005 + 0.5 + 0.02, 0.045 + 2.0 + 0.02], [[1, 1, 0], [1, 1, 0]]),
        (2.0, "dimension", "batch", [6.0, 6.0], [[0, 0, 0], [0, 0, 0]]),
        (0.0, "dimension", "batch", [0.525, 2.05], [[1, 1, 1], [1, 1, 1]]),
        (0.03, "dimension", "datum", [0.03 + 0.5 + 0.03, 0.045 + 2.0 + 0.03], [[0, 1, 0], [1, 1, 0]]),
        (1.0, "site", "batch", [0.525, 2.05], [[1, 1, 1], [1, 1, 1]]),
        (1.5, "site", "batch", [1.5, 1.5], [[0, 0, 0], [0, 0, 0]]),
        (1.0, "all", "datum", [1.0, 2.05], [[0, 0, 0], [1, 1, 1]]),
        (1.3, "all", "batch", [1.3, 1.3], [[0, 0, 0], [0, 0, 0]]),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_values_and_gradients_by_hand(nats, group, floor_of, expected, paying, count):
    guide = Guide()
    bound = FreeBits(nats, group, floor_of, particles=count).bound(model, guide, X)
    torch.testing.assert_close(bound.detach(), LIKELIHOOD - torch.tensor(expected))
    bound.sum().backward()
    torch.testing.assert_close(guide.loc.grad, -torch.tensor(LOC) * torch.tensor(paying))


def test_the_sum_over_a_batch_is_the_papers():
    guide = Guide()
    total = FreeBits(0.02).bound(model, guide, X).sum()
    groups = torch.tensor(KL).mean(0).clamp(min=0.02)
    assert float(total.detach()) == pytest.approx(2 * (LIKELIHOOD - float(groups.sum())), abs=1e-12)


def test_two_sites_are_two_groups():
    programs, x = (HierarchicalModel(), HierarchicalGuide()), torch.randn(4, 5)
    torch.manual_seed(0)
    bound = FreeBits(5.0, "site", "datum").bound(*programs, x)
    torch.manual_seed(0)
    draws = particles(*programs, x)
    kls = draws.site_kls()
    expected = draws.log_likelihood - kls["top"].clamp(min=5.0) - kls["bottom"].clamp(min=5.0)
    torch.testing.assert_close(bound, expected[0])


def test_no_free_bits_are_the_elbo_and_any_are_below_it():
    programs, x = (HierarchicalModel(), HierarchicalGuide()), torch.randn(4, 5)

    def total(objective):
        torch.manual_seed(0)
        return float(objective.bound(*programs, x).sum().detach())

    for group in ("dimension", "site", "all"):
        for kl in ("analytic", "monte_carlo"):
            elbo = total(ELBO(3, kl=kl))
            free = "datum" if kl == "analytic" else "batch"
            assert total(FreeBits(0.0, group, free, particles=3)) == pytest.approx(total(ELBO(3, kl="analytic")))
            assert total(FreeBits(50.0, group, particles=3, kl=kl)) < elbo - 1e-3


def test_families_without_a_split_or_a_closed_form_are_refused_with_what_would_do():
    x = torch.randn(4, 5)
    decoder = likelihoods.FixedGaussian((5,), (2,), Linear)
    correlated = Amortized(FullNormal((2,), (5,), Linear))
    whole = LatentVariableModel(StandardNormal((2,)), decoder)
    with pytest.raises(StructureError, match=r"does not split over its dimensions; use objective\.group=site or all"):
        FreeBits().bound(whole, correlated, x)
    assert FreeBits(group="all").bound(whole, correlated, x).isfinite().all()
    with pytest.raises(StructureError, match=r"in the model's order; use objective.kl=monte_carlo"):
        FreeBits(group="all").bound(HierarchicalModel(), HierarchicalGuide(upwards=True), x)
    for group in ("dimension", "site", "all"):
        objective = FreeBits(0.5, group, kl="monte_carlo")
        assert objective.bound(HierarchicalModel(), HierarchicalGuide(upwards=True), x).isfinite().all()


def test_a_plain_factorized_guide_has_its_dimensions_for_groups():
    x = torch.randn(4, 5)
    whole = LatentVariableModel(StandardNormal((2,)), likelihoods.FixedGaussian((5,), (2,), Linear))
    guide = Amortized(DiagonalNormal((2,), (5,), Linear))
    torch.manual_seed(0)
    bound = FreeBits(0.3, particles=2).bound(whole, guide, x)
    torch.manual_seed(0)
    likelihood = particles(whole, guide, x, 2).log_likelihood.mean(0)
    q = guide.core(x).base_dist
    kl = torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0))
    expected = likelihood.sum() - 4 * kl.mean(0).clamp(min=0.3).sum()
    torch.testing.assert_close(bound.sum(), expected)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: FreeBits(-1.0), "nats must be 0 or above"),
        (lambda: FreeBits(group="layer"), "'dimension', 'site' or 'all', got 'layer'"),
        (lambda: FreeBits(floor_of="epoch"), "'batch' or 'datum', got 'epoch'"),
        (lambda: FreeBits(floor_of="datum", kl="monte_carlo"), "floor under each draw.*use kl=analytic"),
    ],
)
def test_bad_options_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()
