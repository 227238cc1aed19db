"""Bits and one-hot vectors against scipy, enumeration and closed forms."""

import itertools

import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch.distributions import kl_divergence

from models.discrete import (
    MOST_STATES,
    Bits,
    OneHots,
    UniformBits,
    UniformOneHots,
    gumbel,
    joint,
    uniform_one_hots,
)

LOG_P = torch.tensor([0.3, 0.01, 0.24, 0.15, 0.1, 0.2], dtype=torch.float64).log()
COUNT = 100_000


@pytest.mark.row("4.17")
def test_gumbel_noise():
    noise = gumbel((COUNT,), LOG_P)
    assert stats.kstest(noise.numpy(), stats.gumbel_r.cdf).pvalue > 1e-3
    assert stats.kstest(0.02 + noise.numpy(), stats.gumbel_r.cdf).pvalue < 1e-3
    error = (torch.pi**2 / 6 / COUNT) ** 0.5
    assert abs(float(noise.mean()) - 0.5772156649) < 5 * error
    fourth = torch.pi**4 * 27 / 5 / 36  # kurtosis 27/5
    assert abs(float(noise.var()) - torch.pi**2 / 6) < 5 * ((fourth - (torch.pi**2 / 6) ** 2) / COUNT) ** 0.5


@pytest.mark.row("4.18")
def test_the_argmax_of_logits_plus_gumbel_noise_is_categorical():
    scores = LOG_P + 0.7 + gumbel((COUNT, 6), LOG_P)  # unnormalized
    largest, place = scores.max(-1)
    assert stats.chisquare(place.bincount(minlength=6).numpy(), (LOG_P.exp() * COUNT).numpy()).pvalue > 1e-4
    assert stats.kstest(largest.numpy(), stats.gumbel_r(loc=0.7).cdf).pvalue > 1e-4
    assert stats.kstest(largest.numpy(), stats.gumbel_r(loc=0.72).cdf).pvalue < 1e-4
    drawn = OneHots(LOG_P + 3).sample((COUNT,))
    assert torch.equal(drawn.sum(-1), torch.ones(COUNT))
    assert stats.chisquare(drawn.sum(0).numpy(), (LOG_P.exp() * COUNT).numpy()).pvalue > 1e-4
    wrong = torch.tensor([0.3, 0.02, 0.24, 0.15, 0.1, 0.19]) * COUNT
    assert stats.chisquare(drawn.sum(0).numpy(), wrong.numpy()).pvalue < 1e-4


def test_bits_are_one_with_their_probability():
    logits = torch.tensor([-4.0, 0.3, 2.0])
    mean = Bits(logits).sample((COUNT,)).mean(0)
    error = (logits.sigmoid() * (-logits).sigmoid() / COUNT).sqrt()
    assert ((mean - logits.sigmoid()).abs() < 5 * error).all()
    assert ((mean - logits.sigmoid() - 0.01).abs() > 5 * error).any()


def test_masses_are_those_of_scipy_and_extend_linearly():
    logits = torch.randn(4, 3)
    bits = torch.randint(0, 2, (4, 3)).double()
    by_scipy = stats.bernoulli.logpmf(bits.numpy(), logits.sigmoid().numpy())
    assert torch.allclose(Bits(logits).log_prob(bits), torch.tensor(by_scipy), atol=1e-12)
    eye = torch.eye(3).unsqueeze(1)  # each class under each of four distributions
    assert torch.allclose(OneHots(logits).log_prob(eye).T, logits.log_softmax(-1), atol=1e-12)
    for made, ends in ((Bits(logits), (torch.zeros(4, 3), bits)), (OneHots(logits), (eye[0], eye[2]))):
        low, high = (made.log_prob(end) for end in ends)
        between = made.log_prob(0.3 * ends[0] + 0.7 * ends[1])
        assert torch.allclose(between, 0.3 * low + 0.7 * high, atol=1e-12)


@pytest.mark.row("2.17", "4.9")
def test_divergence_from_the_uniform_prior_is_log_k_minus_the_entropy():
    logits = 3 * torch.randn(5, 2, 7)
    probs = logits.softmax(-1)
    entropy = -(probs * probs.log()).sum((-1, -2))
    kl = kl_divergence(joint(OneHots(logits), 2), UniformOneHots((2, 7))())
    assert torch.allclose(kl, 2 * torch.tensor(7.0).log() - entropy, rtol=0, atol=1e-12)
    p = (3 * torch.randn(5, 4)).sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).sum(-1)
    kl = kl_divergence(joint(Bits(p.logit()), 1), UniformBits((4,))())
    assert torch.allclose(kl, 4 * torch.tensor(2.0).log() - entropy, rtol=0, atol=1e-12)


def test_divergences_are_torchs_and_finite_where_probabilities_underflow():
    one, other = torch.randn(2, 5, 3)
    for ours, theirs in ((Bits, dist.Bernoulli), (OneHots, dist.OneHotCategorical)):
        expected = kl_divergence(theirs(logits=one), theirs(logits=other))
        assert torch.allclose(kl_divergence(ours(one), ours(other)), expected, atol=1e-12)
        far = torch.tensor([900.0, -900.0, 0.0], requires_grad=True)
        kl = kl_divergence(ours(far), ours(torch.zeros(3)))
        kl.sum().backward()
        assert kl.isfinite().all()
        assert far.grad.isfinite().all()


def test_joint_states_are_all_that_there_are():
    states = joint(OneHots(torch.randn(5, 2, 3)), 2).enumerate_support(expand=False)
    assert states.shape == (9, 1, 2, 3)
    wanted = {(i, j) for i, j in itertools.product(range(3), repeat=2)}
    assert {tuple(s) for s in states[:, 0].argmax(-1).tolist()} == wanted
    q = joint(Bits(torch.randn(5, 2, 2)), 2)
    states = q.enumerate_support()
    assert states.shape == (16, 5, 2, 2)
    assert torch.allclose(q.log_prob(states).logsumexp(0), torch.zeros(5), atol=1e-12)
    assert q.has_enumerate_support
    many = joint(Bits(torch.zeros(13)), 1)
    assert not many.has_enumerate_support
    with pytest.raises(ValueError, match=f"8,192 joint states are too many.*accepted: up to {MOST_STATES:,}"):
        many.enumerate_support()


def test_values_off_the_hull_are_refused_and_rounding_is_not():
    bits, one_hots = Bits(torch.zeros(2), validate_args=True), OneHots(torch.zeros(64), validate_args=True)
    with pytest.raises(ValueError, match="bits or what lies between them"):
        bits.log_prob(torch.tensor([0.5, 1.1]))
    with pytest.raises(ValueError, match="one-hot vectors or what lies between them"):
        one_hots.log_prob(torch.full((64,), 0.5))
    rough = (10 * torch.randn(1000, 64, dtype=torch.float32)).softmax(-1)
    assert one_hots.log_prob(rough).isfinite().all()


def test_shapes_that_cannot_be():
    assert uniform_one_hots((20,), classes=10).event_shape == (20, 10)
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        uniform_one_hots((20,), classes=1)
    with pytest.raises(ValueError, match=r"accepted: event_shape \(variables, classes\)"):
        UniformOneHots((5,))
