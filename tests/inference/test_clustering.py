"""Mixtures as priors: the cluster as a site or summed out, the bound of VaDE, accuracy, starts from a run."""

import itertools
import json
from functools import partial

import numpy as np
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from scipy.special import logsumexp
from scipy.stats import norm

import run
from guides.amortized import Amortized
from guides.clustering import Clustering
from guides.gaussian import DiagonalNormal, FullNormal
from inference.assemble import assemble, start_from_data
from inference.clustering import VaDE, clustering_accuracy, clusters_of, mutual_information_score
from inference.config import ConfigError, load
from inference.console import Quiet
from inference.experiment import train
from inference.objectives import ELBO
from inference.particles import particles
from inference.pretraining import draw_codes, fit_mixture
from inference.structure import StructureError
from inference.studies import run_study
from models.latent import LatentVariableModel
from models.likelihoods import Bernoulli, FixedGaussian
from models.mixture_vae import MixtureVAE
from models.nets import MLP
from models.priors import MixturePrior, StandardNormal

MLP8 = partial(MLP, hidden=(8,))


def build(seed=0, dim=2, components=3, pixels=5, core=DiagonalNormal):
    """The same prior, likelihood and encoder with the cluster as a site and with it summed out, and data."""
    torch.manual_seed(seed)
    prior, likelihood = MixturePrior((dim,), components=components), Bernoulli((pixels,), (dim,), MLP8)
    with torch.no_grad():
        prior.logits.normal_()
        prior.log_scale.normal_(std=0.3)
    explicit, summed = MixtureVAE(prior, likelihood), LatentVariableModel(prior, likelihood)
    guide = Clustering((dim,), (pixels,), MLP8, explicit)
    marginal = Amortized(guide.core if core is DiagonalNormal else core((dim,), (pixels,), MLP8))
    return explicit, guide, summed, marginal, torch.bernoulli(torch.full((6, pixels), 0.5))


def test_the_enumerated_component_is_the_marginal_mixture():
    explicit, guide, summed, marginal, x = build()
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    torch.manual_seed(3)
    found = -elbo.differentiable_loss(explicit, guide, x)
    torch.manual_seed(3)
    expected = ELBO(max_plate_nesting=1).bound(summed, marginal, x).sum()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-10)
    parameters = [*explicit.parameters(), *guide.parameters()]
    for one, other in zip(*(torch.autograd.grad(b, parameters) for b in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-9)


def test_a_drawn_component_leaves_no_noise_when_it_comes_from_its_posterior():
    explicit, guide, _, _, x = build()
    guide.eval()
    torch.manual_seed(1)
    with_site = particles(explicit, guide, x, 4)
    latents = with_site.latents["z"].value
    prior = explicit.prior
    z = latents.detach().numpy()
    parts = norm(prior.loc.detach().numpy(), prior.log_scale.exp().detach().numpy())
    log_p = logsumexp(
        parts.logpdf(z[:, :, None]).sum(-1) + torch.log_softmax(prior.logits, 0).detach().numpy(), axis=-1
    )
    expected = with_site.log_likelihood.detach().numpy() + log_p - with_site.latents["z"].log_q().detach().numpy()
    assert np.allclose(with_site.log_weight.detach(), expected, atol=1e-10)


def test_log_evidence_is_the_same_by_quadrature_with_the_cluster_summed_out():
    explicit, _, summed, _, x = build(dim=1)
    nodes = torch.linspace(-9, 9, 4001).unsqueeze(1)
    with torch.no_grad():
        log_p_x = explicit.likelihood(nodes.unsqueeze(1)).log_prob(x)  # (nodes, N)
        joint = [
            explicit.prior.component(torch.tensor(c)).log_prob(nodes) + explicit.prior.logits.log_softmax(0)[c]
            for c in range(3)
        ]
        by_component = torch.stack([(log_p_x + j.unsqueeze(1)).logsumexp(0) for j in joint]).logsumexp(0)
        at_once = (log_p_x + summed.prior().log_prob(nodes).unsqueeze(1)).logsumexp(0)
    assert torch.allclose(by_component, at_once, atol=1e-10)
    assert at_once.std() > 1e-3


def test_an_amortized_assignment_costs_its_divergence_from_the_posterior():
    explicit, guide, _, _, x = build()
    guess = Clustering((2,), (5,), MLP8, explicit, "amortized")
    guess.core = guide.core
    guess.eval(), guide.eval()
    states = torch.arange(3)
    torch.manual_seed(2)
    z = guide.core(x).rsample()
    with torch.no_grad():
        log_q = guess.net(x).log_softmax(-1)
        exact = explicit.prior.responsibilities(z)
        gap = (log_q.exp() * (log_q - exact)).sum(-1)
        log_joint = torch.stack([explicit.prior.component(c).log_prob(z) for c in states], -1)
        log_joint = log_joint + explicit.prior.logits.log_softmax(0)
        bound = (log_q.exp() * (log_joint - log_q)).sum(-1)
        assert torch.allclose(log_joint.logsumexp(-1) - bound, gap, atol=1e-10)
    guess.train()
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    torch.manual_seed(2)
    found = -elbo.loss(explicit, guess, x)
    with torch.no_grad():
        rest = explicit.likelihood(z).log_prob(x) - guide.core(x).log_prob(z)
    assert found == pytest.approx(float((rest + bound).sum()), abs=1e-9)
    assert float(gap.min()) > 1e-3


@pytest.mark.parametrize("clusters", ["posterior", "tightest"])
def test_vade_is_its_formula_and_below_the_elbo(clusters):
    _, _, summed, marginal, x = build()
    objective = VaDE(1, clusters)
    torch.manual_seed(4)
    found = objective.bound(summed, marginal, x).detach().numpy()
    torch.manual_seed(4)
    draws = particles(summed, marginal, x)
    q, prior = marginal.core(x).base_dist, summed.prior
    z = draws.latents["z"].value
    with torch.no_grad():
        m, s = q.loc.unsqueeze(1), q.scale.unsqueeze(1)
        loc, scale = prior.loc, prior.log_scale.exp()
        kl = (scale.log() - s.log() + (s**2 + (m - loc) ** 2) / (2 * scale**2) - 0.5).sum(-1).numpy()  # by hand
        log_pi = prior.logits.log_softmax(0).numpy()
        scores = (
            log_pi - kl
            if clusters == "tightest"
            else log_pi + norm(loc.numpy(), scale.numpy()).logpdf(z.unsqueeze(1).numpy()).sum(-1)
        )
        g = np.exp(scores - logsumexp(scores, axis=1, keepdims=True))
        divergence = (g * (kl + np.log(g) - log_pi)).sum(1)
    assert np.allclose(found, draws.log_likelihood[0].detach().numpy() - divergence, atol=1e-10)
    if clusters == "tightest":
        assert np.allclose(divergence, -logsumexp(log_pi - kl, axis=1), atol=1e-10)
        for _ in range(50):  # no other shares do better
            other = np.random.default_rng().dirichlet(np.ones(3), size=len(x))
            assert np.all((other * (kl + np.log(other) - log_pi)).sum(1) >= divergence - 1e-12)
    torch.manual_seed(5)
    many = particles(summed, marginal, x, 4000)
    mean_kl = (many.log_q - many.log_prior).mean(0).detach().numpy()
    error = 5 * (many.log_q - many.log_prior).std(0).detach().numpy() / 4000**0.5
    assert np.all(divergence + 1e-12 >= mean_kl - error)


@pytest.mark.parametrize(
    ("prior", "core", "says"),
    [(StandardNormal((2,)), DiagonalNormal, "prior=mixture"), (MixturePrior((2,)), FullNormal, "guide=diagonal")],
)
def test_vade_refuses_what_it_has_no_formula_for(prior, core, says):
    model = LatentVariableModel(prior, FixedGaussian((5,), (2,), MLP8))
    with pytest.raises(StructureError, match=says):
        VaDE().bound(model, Amortized(core((2,), (5,), MLP8)), torch.randn(3, 5))


def test_accuracy_is_that_of_the_best_match():
    rng = np.random.default_rng(0)
    labels, clusters = rng.integers(4, size=60), rng.integers(4, size=60)
    by_hand = max(np.mean(np.array(match)[clusters] == labels) for match in itertools.permutations(range(4)))
    assert clustering_accuracy(labels, clusters) == pytest.approx(by_hand, abs=1e-12)
    assert clustering_accuracy(labels, (labels + 1) % 4) == 1.0
    assert clustering_accuracy(labels * 7 + 3, labels) == 1.0  # whatever the classes are called
    split = np.where(rng.integers(2, size=60) == 1, labels + 4, labels)
    assert clustering_accuracy(labels, split) < 1.0  # a class in two clusters keeps one of them
    assert mutual_information_score(labels, labels) == pytest.approx(1.0)
    assert clustering_accuracy(labels, np.zeros(60, dtype=int)) == pytest.approx(np.bincount(labels).max() / 60)


def test_a_mixture_of_clear_clouds_is_found():
    torch.manual_seed(0)
    centres = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 5.0]])
    label = torch.randint(3, (300,))
    codes = centres[label] + 0.5 * torch.randn(300, 2)
    mixture = fit_mixture(codes, 3)
    assert clustering_accuracy(label.numpy(), mixture.log_joint(codes).argmax(1).numpy()) == 1.0
    prior = MixturePrior((2,), components=3)
    assert clustering_accuracy(label.numpy(), prior.responsibilities(codes).argmax(1).numpy()) < 1.0
    prior.become(mixture.logits.detach(), mixture.loc.detach(), mixture.log_scale.exp().detach())
    assert torch.allclose(prior().log_prob(codes), mixture.log_evidence(codes), atol=1e-10)
    assert clustering_accuracy(label.numpy(), prior.responsibilities(codes).argmax(-1).numpy()) == 1.0


# --- from run.py -------------------------------------------------------------------------------------------------

TINY = ["model.latent_dim=3", "encoder.hidden=[8]", "decoder.hidden=[8]", "evaluation.particles=2", "seed=3"]
TINY += ["evaluation.draws=1", "evaluation.data=20", "evaluation.surgery_data=10", "trainer.steps=5"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("start") / "vae"
    try:
        train(load([*TINY, f"run.dir='{folder}'"]), Quiet())
    finally:
        torch.set_default_dtype(torch.float64)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["prior=mixture", "prior.components=4", "objective=vade"],
        ["model=gmm_vae", "model.components=4", "guide=clustering", "objective=trace_enum"],
    ],
)
def test_a_run_starts_from_another_one(pretrained, words):
    setup = assemble(load([*TINY, *words, f"run.start='{pretrained}'"]))
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    start_from_data(setup)
    source = assemble(load([f"experiment='{pretrained}/config.yaml'", "run.dir=null"]))
    assert not torch.equal(before["likelihood.net.output.bias"], setup.model.state_dict()["likelihood.net.output.bias"])
    assert setup.model.likelihood.net.output.bias.shape == source.model.likelihood.net.output.bias.shape
    assert not torch.equal(before["prior.loc"], setup.model.state_dict()["prior.loc"])
    codes = draw_codes(setup.guide, setup.source("train").fixed())
    fitted = setup.model.prior().log_prob(codes).mean()
    setup.model.prior.load_state_dict({n[6:]: value for n, value in before.items() if n.startswith("prior.")})
    assert fitted > setup.model.prior().log_prob(codes).mean() + 0.1


def test_a_start_that_is_none_is_refused(pretrained, tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint"):
        start_from_data(assemble(load([*TINY, f"run.start='{tmp_path}'"])))
    other = ["encoder=conv", "decoder=conv", "model.latent_dim=7"]
    with pytest.raises(ConfigError, match="no parameter in common"):
        start_from_data(assemble(load([*TINY[3:], *other, f"run.start='{pretrained}'"])))
    setup = assemble(load(TINY))
    with pytest.raises(ValueError, match="prior=mixture"):
        clusters_of(setup.model, setup.guide, setup.source("test").fixed())


def test_the_guide_of_clusters_is_for_models_with_clusters(capsys):
    assert run.main(["train", "guide=clustering"]) == 2
    assert "accepted: model=gmm_vae" in capsys.readouterr().err


@pytest.mark.slow
def test_the_clustering_study(tmp_path):
    options = [*TINY[:-2], "trainer.steps=20", "study.seeds=[0,1]", "study.restarts=1", "study.jobs=1"]
    options.remove("seed=3")
    page = run_study(["clustering", *options, f"run.dir={tmp_path / 'study'}"], Quiet())
    rows = json.loads((tmp_path / "study" / "table.json").read_text())
    assert len(rows) == 12
    by_method = {row["method"]: row["accuracy"] for row in rows}
    assert by_method["kmeans"] > 0.5  # of ten classes
    assert all(0.05 < row["accuracy"] <= 1 for row in rows)
    assert page.read_text().count("<img") == 2
    with pytest.raises(ConfigError, match="accepted: kmeans"):
        run_study(["clustering", "study.methods=[k]", f"run.dir={tmp_path}"], Quiet())
