"""P(y|x) against sums over all latents and targets; what is given is neither scored nor drawn; images given labels."""

import itertools
import json
from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from torch.distributions import constraints

import run
from guides.amortized import Amortized
from guides.discrete import OneHotCategoricals
from guides.enumerated import Enumerated
from inference.datasets import digits
from inference.enumeration import summed
from inference.objectives import ELBO
from inference.particles import generate, particles
from inference.stock import TraceEnum
from models.conditional_vae import ConditionalModel, Partial, given_entries
from models.discrete import UniformOneHots
from models.likelihoods import Bernoulli
from models.nets import MLP
from models.priors import StandardNormal

MLP8 = partial(MLP, hidden=(8,))
STATES, PIXELS, GIVEN = 3, 5, 2


def build(seed=0, sees=True, learned=True):
    """A model of three bits given two, its latent one of three states; all data."""
    torch.manual_seed(seed)
    prior = OneHotCategoricals((1, STATES), (GIVEN,), MLP8) if learned else UniformOneHots((1, STATES))
    model = ConditionalModel(
        prior, Bernoulli((PIXELS,), (STATES + GIVEN * sees,), MLP8), given_entries((PIXELS,), GIVEN, "first")
    )
    guide = Amortized(OneHotCategoricals((1, STATES), (PIXELS,), MLP8))
    with torch.no_grad():
        for parameter in (*model.parameters(), *guide.parameters()):
            parameter.add_(0.4 * torch.randn_like(parameter))
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=PIXELS)))
    model.initialize(x)
    return model, guide, x


def tables(model, x):
    """log P(z|x), (N, S), and log P(y|z, x), (N, S), entry by entry in numpy."""
    context = (x[:, :GIVEN].numpy() - 0.5) / 0.5  # all data have mean and standard deviation a half
    eye = torch.eye(STATES)
    with torch.no_grad():
        prior = model.prior(torch.tensor(context)).base_dist.logits[:, 0].numpy() if model.prior.context_shape else 0.0
        prior = prior + np.zeros((len(x), STATES))
        prior = prior - logsumexp(prior, axis=1, keepdims=True)
        scores = np.zeros((len(x), STATES))
        for n, z in itertools.product(range(len(x)), range(STATES)):
            seen = torch.cat([eye[z], torch.tensor(context[n])]) if model.decoder_sees_context else eye[z]
            p = torch.sigmoid(model.likelihood.net(seen)).numpy()[GIVEN:]
            y = x[n, GIVEN:].numpy()
            scores[n, z] = np.log(np.where(y > 0, p, 1 - p)).sum()
    return prior, scores


@pytest.mark.row("3.2")
@pytest.mark.parametrize(("sees", "learned"), [(True, True), (False, True), (True, False)])
def test_the_enumerated_probability_is_brute_force(sees, learned):
    model, _, x = build(sees=sees, learned=learned)
    prior, scores = tables(model, x)
    exact = logsumexp(prior + scores, axis=1)
    elbo = TraceEnum(max_plate_nesting=1)
    found = [-elbo.loss(model, lambda x: None, x[n : n + 1]) for n in range(len(x))]
    assert np.allclose(found, exact, atol=1e-10)
    totals = np.exp(exact).reshape(2**GIVEN, -1).sum(1)
    assert np.allclose(totals, 1, atol=1e-10)  # over y, for every x


@pytest.mark.row("3.2")
@pytest.mark.parametrize("seed", range(5))
def test_the_gap_is_the_divergence_from_the_posterior(seed):
    model, guide, x = build(seed)
    prior, scores = tables(model, x)
    exact = logsumexp(prior + scores, axis=1)
    posterior = prior + scores - exact[:, None]
    states = torch.eye(STATES).unsqueeze(1)  # (S, 1, S)
    with torch.no_grad():
        bound = summed(ELBO(), model, guide, x, states).numpy()
        log_q = guide.core(x).base_dist.logits[:, 0].numpy()
    divergence = (np.exp(log_q) * (log_q - posterior)).sum(1)
    assert np.allclose(exact - bound, divergence, atol=1e-10)
    assert divergence.min() > 1e-4
    pyros = TraceEnum(max_plate_nesting=1)
    assert -pyros.loss(model, Enumerated(guide.core), x) == pytest.approx(bound.sum(), abs=1e-8)


def test_what_is_given_is_kept_and_not_scored():
    torch.manual_seed(0)
    base = dist.Bernoulli(logits=torch.randn(4, 1, 3, 2)).to_event(3)
    given = given_entries((1, 3, 2), 1, "last")
    x = torch.bernoulli(torch.full((4, 1, 3, 2), 0.5))
    partial_ = Partial(base, given, x)
    assert torch.allclose(partial_.log_prob(x), base.base_dist.log_prob(x)[:, :, :2].sum((1, 2, 3)), atol=1e-12)
    draws = partial_.expand(torch.Size((7, 4))).sample()
    assert torch.equal(draws[..., 2, :], x[:, :, 2].expand(7, 4, 1, 2))
    assert not torch.equal(draws[0, ..., :2, :], draws[1, ..., :2, :])
    assert torch.equal(partial_.mean[:, :, 2], x[:, :, 2])
    assert torch.equal(partial_.mean[:, :, :2], base.mean[:, :, :2])
    assert isinstance(partial_.support, constraints.independent)


def test_generation_reads_its_context_off_what_it_is_like():
    model, guide, x = build()
    _, _, drawn = generate(model, x)
    assert torch.equal(drawn[:, :GIVEN], x[:, :GIVEN])
    assert not torch.equal(drawn, x)
    assert particles(model, guide, x, 6).log_weight.shape == (6, len(x))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: given_entries((1, 8, 8), 8, "first"), "between 1 and 7"),
        (lambda: given_entries((4,), 0, "first"), "between 1 and 3"),
        (lambda: given_entries((4,), 1, "middle"), "first, last"),
        (lambda: given_entries((4, 4), 1, "last"), "an image"),
        (lambda: Partial(dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), torch.tensor([True, False]), None),
         "independent entries"),
        (lambda: ConditionalModel(StandardNormal((2,)), Bernoulli((4,), (2,), MLP8), torch.zeros(4).bool()), "0 of 4"),
        (lambda: ConditionalModel(StandardNormal((2,)), Bernoulli((4,), (9,), MLP8), torch.arange(4) < 1), "context"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_labels_below_an_image_survive_every_binarization():
    for binarization in ("dynamic", "static", "none"):
        plain, shown = (digits(binarization=binarization, label_rows=rows) for rows in (False, True))
        assert shown.shape == (1, 10, 8)
        rows = torch.as_tensor(shown.splits["test"])
        top = 1 if binarization == "static" else 16
        strip = rows[:, 0, 8:].flatten(1)
        assert torch.equal(strip.argmax(1), plain.labels["test"])
        assert torch.equal(strip.sum(1), torch.full((300,), top).to(strip.sum(1)))
        if binarization != "static":
            assert torch.equal(rows[:, :, :8], torch.as_tensor(plain.splits["test"]))


TINY = ["trainer.steps=8", "evaluation.particles=3", "evaluation.draws=2", "evaluation.data=20", "decoder.hidden=[8]"]
TINY += ["encoder.hidden=[8]", "evaluation.surgery_data=10"]


@pytest.mark.row("3.2")
@pytest.mark.parametrize("recipe", ["class_conditional", "completion"])
def test_it_runs_by_name(recipe, tmp_path):
    torch.set_default_dtype(torch.float32)
    try:
        assert run.main(["train", f"experiment={recipe}", *TINY, f"run.dir={tmp_path / 'run'}"]) == 0
        assert run.main(["sample", str(tmp_path / "run"), "12"]) == 0
    finally:
        torch.set_default_dtype(torch.float64)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["model"] == "conditional"
    assert 0 < summary["test/nll"] < 60
    x = np.load(tmp_path / "run" / "samples.npz")["x"]
    if recipe == "class_conditional":
        assert np.array_equal(x[:, 0, 8:].reshape(12, -1).sum(1), np.ones(12))


@pytest.mark.slow
@pytest.mark.row("3.2")
def test_a_class_conditional_vae_draws_the_class_it_is_asked_for(tmp_path):
    from sklearn.linear_model import LogisticRegression

    torch.set_default_dtype(torch.float32)
    options = ["experiment=class_conditional", "trainer.steps=1200", "evaluation.particles=5", "evaluation.draws=1"]
    try:
        assert run.main(["train", *options, f"run.dir={tmp_path / 'run'}"]) == 0
        assert run.main(["sample", str(tmp_path / "run"), "300"]) == 0
    finally:
        torch.set_default_dtype(torch.float64)
    data = digits(binarization="static")
    judge = LogisticRegression(max_iter=500).fit(data.splits["train"].flatten(1), data.labels["train"])
    drawn = np.load(tmp_path / "run" / "samples.npz")["x"]
    asked = drawn[:, 0, 8:].reshape(300, -1).argmax(1)
    right = np.mean(judge.predict(drawn[:, 0, :8].reshape(300, -1)) == asked)
    assert np.mean(judge.predict(drawn[:, 0, :8].reshape(300, -1)) == np.roll(asked, 1)) < 0.3
    assert right > 0.6
