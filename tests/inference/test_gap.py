import numpy as np
import pytest
import torch

from guides.amortized import Amortized
from guides.free import LocallyFitted
from guides.gaussian import DiagonalNormal, FullNormal, Unconditional
from inference.gap import gaps
from models.nets import Linear
from models.ppca import PPCA
from tests import oracles
from tests.brute_force import best_diagonal_normal


def linear_model():
    """A linear-Gaussian model with a correlated posterior, and data from it."""
    model = PPCA((4,), 2)
    weight = torch.tensor([[1.0, 0.8], [0.9, 1.1], [-0.5, 0.3], [0.7, 0.9]])
    with torch.no_grad():
        model.likelihood.weight.copy_(weight)
        model.likelihood.loc.zero_()
        model.likelihood.log_scale.fill_(np.log(0.6))
    x = torch.randn(20, 2) @ weight.T + 0.6 * torch.randn(20, 4)
    known = oracles.LinearModel(weight.numpy(), np.zeros(4), 0.6)
    return model, x, known


def untrained(core):
    """A guide whose encoder is off by a known amount only in that it was never trained."""
    guide = Amortized(core)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.mul_(0.3)
    return guide


@pytest.mark.row("1.3", "2.11", "5.6")
@pytest.mark.parametrize(
    "core",
    [lambda: FullNormal((2,), (4,), Linear), lambda: DiagonalNormal((2,), (4,), Linear), lambda: Unconditional((2,))],
)
def test_the_gap_is_split_as_the_closed_forms_say(core):
    model, x, known = linear_model()
    guide = untrained(core())
    found = gaps(model, guide, x, seed=0, steps=300, learning_rate=0.05, particles=1000)
    _, covariance = oracles.ppca_posterior(x.numpy(), known)
    full = isinstance(guide.core, FullNormal)
    approximation = 0.0 if full else best_diagonal_normal(np.linalg.inv(covariance))[1]
    evidence = oracles.ppca_log_evidence(x.numpy(), known)
    with torch.no_grad():
        q = guide.core(x)
        q_loc = q.mean.expand(20, 2).numpy()
        spread = q.covariance_matrix if full else torch.diag_embed(q.variance.expand(20, 2))
    elbo = np.array(
        [
            float(oracles.ppca_elbo(x[i : i + 1].numpy(), known, q_loc[i : i + 1], spread[i].numpy())[0])
            for i in range(20)
        ]
    )
    whole = evidence - elbo
    assert whole.mean() > 0.3  # the untrained encoder does lose something
    assert within_errors(found.log_p.numpy(), evidence)
    assert within_errors(found.approximation.numpy(), approximation)
    assert within_errors(found.amortization.numpy(), whole - approximation)
    if not full:  # a family that could express the correlation would be seen
        assert approximation > 0.3
        assert not within_errors(found.approximation.numpy(), 0.0)


def within_errors(values, expected):
    """Whether the mean over data is within five standard errors, and the search's last thousandths, of the truth."""
    difference = values - expected
    return abs(difference.mean()) < 5 * difference.std(ddof=1) / np.sqrt(len(difference)) + 0.01


def test_the_guide_is_left_as_it_was():
    model, x, _ = linear_model()
    guide = untrained(DiagonalNormal((2,), (4,), Linear))
    before = {name: parameter.clone() for name, parameter in guide.named_parameters()}
    gaps(model, guide, x, seed=0, steps=5, particles=10)
    assert all(torch.equal(before[name], parameter) for name, parameter in guide.named_parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in guide.parameters())


def test_a_guide_that_reads_nothing_is_refused():
    model, x, _ = linear_model()

    class Fixed(torch.nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(ValueError, match="no network that reads the data"):
        gaps(model, Fixed(), x, seed=0)


def test_a_fit_that_stopped_early_is_not_the_familys_fault():
    """Of per-datum fits by 1 and by 200 inner steps, the approximation gap is the closed form's; the rest is apart."""
    model, x, known = linear_model()
    _, covariance = oracles.ppca_posterior(x.numpy(), known)
    expected = best_diagonal_normal(np.linalg.inv(covariance))[1]
    found = {steps: gaps(model, Amortized(LocallyFitted(model, steps)), x, 0, 200, 0.05, 400) for steps in (1, 200)}
    for each in found.values():
        assert within_errors(each.approximation.numpy(), expected)
    assert float(found[1].amortization.mean()) > 0.1
    assert abs(float(found[200].amortization.mean())) < 0.01
