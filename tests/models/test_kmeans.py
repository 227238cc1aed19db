"""K-means against scikit-learn's, its own definition, and the mixture it is the limit of."""

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from scipy.stats import chisquare
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.datasets import load_digits

from guides.enumerated import exact, hard
from inference.em import EMError, EMSettings, fit
from inference.particles import generate
from models.gmm import GaussianMixture
from models.kmeans import KMeans
from models.tractable import DegenerateError

LLOYD = EMSettings(restarts=0, tolerance=0)


def clouds(size=300, seed=0):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(scale=2, size=(4, 3))[rng.integers(4, size=size)] + rng.normal(size=(size, 3)))


def digits():
    grey = load_digits().data
    return torch.tensor(grey + 0.01 * np.random.default_rng(0).normal(size=grey.shape))  # whole numbers have ties


def started(x, count):
    model = KMeans(x.shape[1:], count)
    with torch.no_grad():
        model.codebook.copy_(x[:count].flatten(1))
    return model


@pytest.mark.row("0.23")
@pytest.mark.parametrize(("x", "count"), [(clouds(), 5), (digits(), 64)])
def test_lloyd_is_scikit_learns(x, count):
    model = started(x, count)
    untrained = float(model.inertia(x))
    result = fit(model, x, LLOYD)
    theirs = SklearnKMeans(count, init=x[:count].numpy(), n_init=1, tol=0, max_iter=500).fit(x.numpy())
    assert result.converged
    assert untrained > 1.05 * theirs.inertia_
    assert float(model.inertia(x)) == pytest.approx(theirs.inertia_, rel=1e-9)
    assert np.allclose(model.codebook.detach(), theirs.cluster_centers_, atol=1e-9)
    assert result.free_energy == pytest.approx(-theirs.inertia_ / len(x), rel=1e-9)
    energies = np.array([step.free_energy for step in result.history])
    assert np.all(np.diff(energies) >= -1e-12 * abs(energies[0]))


@pytest.mark.row("0.23", "3.14")
def test_the_spherical_mixture_becomes_lloyd_as_its_scale_vanishes():
    """One iteration of EM with one fixed, equal scale moves the means to Lloyd's centers as that scale goes to 0."""
    x = clouds()
    lloyd = started(x, 4)
    fit(lloyd, x, EMSettings(restarts=0, iterations=1))
    distances = []
    for scale in (3.0, 1.0, 0.3, 0.1, 0.03, 0.01):
        model = GaussianMixture((3,), 4, "spherical")
        with torch.no_grad():
            model.loc.copy_(x[:4])
            model.log_scale.fill_(np.log(scale))
        statistics, _ = model.e_step(x)
        means = statistics["first"] / statistics["count"].unsqueeze(1)
        distances.append(float((means - lloyd.codebook.detach()).abs().max()))
    assert distances[0] > 0.5
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-6


@pytest.mark.row("3.14")
def test_hard_em_with_equal_spherical_components_is_lloyd():
    x = clouds()
    lloyd, model = started(x, 4), GaussianMixture((3,), 4, "spherical")
    with torch.no_grad():
        model.loc.copy_(x[:4])
    for _ in range(30):
        fit(lloyd, x, EMSettings(restarts=0, iterations=1))
        statistics, _ = model.e_step(x, hard=True)
        model.m_step(statistics)
        with torch.no_grad():  # equal weights and scales are not learned
            model.logits.zero_()
            model.log_scale.zero_()
        assert torch.allclose(model.loc, lloyd.codebook, atol=1e-10)


@pytest.mark.row("0.24")
def test_it_is_an_autoencoder():
    x = clouds()
    model = started(x, 5)
    fit(model, x, LLOYD)
    code = model.encode(x)
    rebuilt = model.decode(code).detach()
    distances = torch.cdist(x, model.codebook.detach(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(code, distances.argmin(1))
    assert float((rebuilt - x).square().mean()) * x.numel() == pytest.approx(float(model.inertia(x)), rel=1e-9)
    assert torch.equal(model.decode(model.encode(rebuilt)).detach(), rebuilt)
    used = torch.bincount(code, minlength=5) / len(x)
    assert float(model.perplexity(x)) == pytest.approx(float(torch.exp(-(used * used.log()).sum())))
    assert 1 < model.perplexity(x) <= 5


@pytest.mark.row("0.26")
def test_it_is_a_generator_of_codewords():
    model = KMeans((1, 2, 3), 7)
    torch.manual_seed(3)
    for x in (model.sample(10_000), generate(model, torch.zeros(10_000, 1, 2, 3))[1].mean.detach()):
        same = (x.flatten(1).unsqueeze(1) == model.codebook.detach()).all(2)
        assert torch.equal(same.sum(1), torch.ones(10_000, dtype=torch.int64))
        counts = same.sum(0).numpy()
        assert chisquare(counts).pvalue > 1e-3
        skewed = counts + np.array([300, -300, 0, 0, 0, 0, 0])
        assert chisquare(skewed).pvalue < 1e-3
    trace = poutine.trace(poutine.uncondition(model)).get_trace(torch.zeros(4, 1, 2, 3))
    assert torch.equal(model.encode(trace.nodes["x"]["fn"].mean), trace.nodes["z"]["value"])


def test_a_word_without_data_stays():
    x = clouds()
    model = started(x, 3)
    with torch.no_grad():
        model.codebook[2] = 1e3
    fit(model, x, LLOYD)
    assert torch.equal(model.codebook[2].detach(), torch.full((3,), 1e3))
    assert model.perplexity(x) <= 2 + 1e-12


def test_degenerate_data_give_a_result_or_one_message():
    point = torch.ones(1, 2)
    model = KMeans((2,), 1)
    assert fit(model, point, EMSettings()).free_energy == pytest.approx(0, abs=1e-12)
    assert float(model.inertia(point)) == 0
    model = KMeans((2,), 2)
    fit(model, torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(20, 1), EMSettings())
    assert float(model.perplexity(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))) == pytest.approx(2)
    with pytest.raises(DegenerateError, match="1 distinct rows"):
        model.initialize(torch.ones(5, 2))
    with pytest.raises(ValueError, match="row 1"):
        model.initialize(torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]))
    with pytest.raises(ValueError, match="at least one word"):
        KMeans((2,), 0)


@pytest.mark.parametrize("x", [torch.ones(1, 2), torch.stack([torch.arange(6.0), torch.ones(6)], 1)])
def test_one_point_and_constant_columns_have_a_codebook(x):
    x = x.double()
    model = KMeans((2,), len(x))
    assert fit(model, x, EMSettings()).converged
    assert float(model.inertia(x)) == pytest.approx(0, abs=1e-12)
    assert model.scale > 0
    assert torch.isfinite(model.log_evidence(x)).all()


def test_more_codewords_than_data_are_refused():
    with pytest.raises(EMError, match=r"4 data have only 4 distinct rows.*at most 4"):
        fit(KMeans((2,), 5), torch.randn(4, 2), EMSettings(restarts=2))


def test_the_program_is_the_mixture_whose_posterior_is_nearest_first():
    x = clouds()
    model = started(x, 4)
    fit(model, x, LLOYD)
    residual = float(model.inertia(x)) / x.numel()
    assert float(model.scale) == pytest.approx(residual**0.5, rel=1e-9)
    assert torch.equal(model.posterior(x).probs.argmax(1), model.encode(x))
    mixture = GaussianMixture((3,), 4, "spherical")
    with torch.no_grad():
        mixture.loc.copy_(model.codebook)
        mixture.log_scale.fill_(float(model.scale.log()))
    assert torch.allclose(model.log_joint(x), mixture.log_joint(x), atol=1e-9)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    tight = -elbo.loss(model, exact(model), x)
    assert tight == pytest.approx(float(model.log_evidence(x).sum().detach()), abs=1e-8)
    classified = model.log_joint(x).max(1).values.sum()
    assert -elbo.loss(model, hard(model), x) == pytest.approx(float(classified.detach()), abs=1e-8)
    assert tight > float(classified.detach()) + 1


@pytest.mark.parametrize("variant", ["exact", "incremental", "generalized"])
def test_the_scale_is_that_of_the_distances_however_the_words_were_found(variant):
    x = 3 * torch.randn(60, 2)
    model = KMeans((2,), 3)
    fit(model, x, EMSettings(variant=variant, restarts=0, iterations=40, inner_steps=30))
    assert float(model.scale) ** 2 == pytest.approx(float(model.inertia(x)) / x.numel(), rel=0.02)
    assert abs(float(model.scale) - 1) > 0.2
