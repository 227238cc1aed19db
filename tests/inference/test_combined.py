"""Remedies that are objectives, at once: against sums by hand, and each alone against its own objective."""

import math

import pytest
import torch

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference.annealing import AnnealedELBO, BetaELBO
from inference.combined import CombinedELBO
from inference.engine import SVI, SharedOptimizer
from inference.free_bits import FreeBits
from inference.infovae import InfoVAE, mmd2, rbf
from inference.objectives import ELBO
from inference.particles import StructureError, particles
from models import likelihoods
from models.latent import LatentVariableModel
from models.nets import MLP
from models.priors import StandardNormal


def composed():
    torch.manual_seed(0)
    net = lambda i, o: MLP(i, o, (5,))  # noqa: E731
    model = LatentVariableModel(StandardNormal((2,)), likelihoods.FixedGaussian((3,), (2,), net, 0.5))
    return model, Amortized(DiagonalNormal((2,), (3,), net)), torch.randn(7, 3)


def bound(objective, progress=None):
    model, guide, x = composed()
    if progress is not None:
        objective.at(progress)
    torch.manual_seed(1)
    return objective.bound(model, guide, x)


@pytest.mark.parametrize("progress", [0.3, 0.9])
def test_all_of_them_at_once_by_hand(progress):
    """beta 3, a third of the way up a warm-up of 0.9; half a nat for free; information at 0.4; discrepancy at 4.4."""
    found = bound(
        CombinedELBO(3.0, 0.9, nats=0.5, group="all", alpha=0.4, scale=5.0, bandwidth=0.8, particles=2), progress
    )
    model, guide, x = composed()
    torch.manual_seed(1)
    draws = particles(model, guide, x, 2)
    kl = draws.log_q - draws.log_prior
    assert kl.mean() > 0.5
    prior = torch.randn(2, 7, 2)
    discrepancy = mmd2(draws.latents["z"].value, prior, rbf, 0.8).mean()
    weight = 0.6 * 3.0 * (1 / 3 if progress < 0.5 else 1.0)
    torch.testing.assert_close(found, (draws.log_likelihood - weight * kl).mean(0) - 4.4 * discrepancy)
    # With a floor that none is above, every datum pays the floor, under the same weight.
    found = bound(CombinedELBO(3.0, 0.9, nats=50.0, group="all", particles=2), progress)
    weight = 3.0 * (1 / 3 if progress < 0.5 else 1.0)
    torch.testing.assert_close(found, draws.log_likelihood.mean(0) - weight * 50.0)


@pytest.mark.parametrize(
    ("combined", "alone"),
    [
        (lambda: CombinedELBO(), lambda: ELBO()),
        (lambda: CombinedELBO(0.4), lambda: BetaELBO(0.4)),
        (lambda: CombinedELBO(warmup=0.5, start=0.2), lambda: AnnealedELBO(0.5, start=0.2)),
        (lambda: CombinedELBO(warmup=0.8, schedule="cyclical"), lambda: AnnealedELBO(0.8, "cyclical")),
        (lambda: CombinedELBO(nats=0.3, kl="analytic"), lambda: FreeBits(0.3)),
        (lambda: CombinedELBO(nats=3.0, group="all", floor_of="datum", kl="analytic"),
         lambda: FreeBits(3.0, "all", "datum")),
        (lambda: CombinedELBO(alpha=0.4, scale=5.0, kernel="imq"), lambda: InfoVAE(0.4, 5.0, "imq")),
    ],
)  # fmt: skip
def test_each_alone_is_what_it_is_without_the_others(combined, alone):
    torch.testing.assert_close(bound(combined(), 0.3), bound(alone(), 0.3))
    for name in ("local", "linear", "log_q_is_sampled", "needs_density"):
        assert getattr(combined(), name) == getattr(alone(), name), name


def test_a_run_tells_it_how_far_it_is_and_logs_the_weight():
    model, guide, x = composed()
    objective = CombinedELBO(2.0, warmup=0.8, nats=0.1)
    optimizer = SharedOptimizer([*model.parameters(), *guide.parameters()], torch.optim.Adam, 0.01)
    svi = SVI(model, guide, optimizer, objective)
    svi.at(0.2)
    assert svi.info() == {"train/kl_weight": pytest.approx(0.5)}
    assert svi.step(x).isfinite()


def test_one_datum_is_enough_without_a_discrepancy():
    model, guide, x = composed()
    assert CombinedELBO(alpha=0.4, scale=0.6).bound(model, guide, x[:1]).isfinite().all()
    with pytest.raises(StructureError, match="at least 2 data"):
        CombinedELBO(alpha=0.4).bound(model, guide, x[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta must be 0 or above"),
        ({"beta": math.inf}, "beta must be 0 or above"),
        ({"warmup": 2.0}, "warmup is a part of the run"),
        ({"nats": -1.0}, "nats must be 0 or above"),
        ({"group": "layer"}, "'dimension', 'site' or 'all'"),
        ({"nats": 1.0, "floor_of": "datum"}, "floor under each draw"),
        ({"scale": -1.0}, "scale must be 0 or above"),
    ],
)
def test_what_each_refuses_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CombinedELBO(**options)
