"""What the KL buys: an autoencoder against a variational one, and the two-dimensional code against PCA."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KNeighborsClassifier

from inference.assemble import assemble, start_from_data
from inference.config import load
from inference.data import Batches
from inference.diagnostics import posterior_means
from inference.engine import SVI, SharedOptimizer
from inference.evaluate import evaluate, evaluating
from inference.particles import decode, generate, particles

NETS = ["encoder.activation=relu", "decoder.activation=relu"]


def trained(arguments, steps, learning_rate=2e-3):
    """A setup after so many steps, in single precision; zero steps leave it as it starts."""
    torch.set_default_dtype(torch.float32)
    setup = assemble(load([*NETS, "objective=elbo", *arguments]))
    start_from_data(setup)
    parameters = [*setup.model.parameters(), *setup.guide.parameters()]
    optimizer = SharedOptimizer(parameters, setup.config.factory("optimizer"), learning_rate)
    svi, batches = SVI(setup.model, setup.guide, optimizer, setup.objective), Batches(setup.source("train"), 100)
    step = 0
    while step < steps:
        for x in batches:
            svi.optim.set_learning_rate(learning_rate * (1 - step / steps))
            svi.step(x)
            step += 1
    return setup


def sample_nll(setup, mixture, pca):
    """Mean -log density, in nats, of decoded prior draws under a mixture fitted to the data."""
    with evaluating(setup.model, seed=0):
        _, p_x, _ = generate(setup.model, torch.zeros(500, 1, 8, 8))
    return -mixture.score(pca.transform(p_x.mean.flatten(1).numpy()))


def gaussian_kl(codes):
    """KL of a normal fitted to the codes from N(0, I), in nats per dimension."""
    loc, covariance = codes.mean(0), np.cov(codes.T)
    _, log_det = np.linalg.slogdet(covariance)
    return 0.5 * (np.trace(covariance) + loc @ loc - codes.shape[1] - log_det) / codes.shape[1]


@pytest.mark.slow
@pytest.mark.row("0.16", "1.25", "1.26")
def test_without_the_kl_codes_leave_the_prior_and_samples_leave_the_data():
    grey = ["data.binarization=none", "likelihood=gaussian", "likelihood.scale=0.15", "model.latent_dim=8"]
    vae = trained([*grey, "guide=diagonal"], 1500)
    ae = trained([*grey, "guide=deterministic"], 1500)
    x, test = (vae.source(split).fixed() for split in ("train", "test"))
    pca = PCA(12, random_state=0).fit(x.flatten(1).numpy())
    mixture = GaussianMixture(10, random_state=0).fit(pca.transform(x.flatten(1).numpy()))
    real = -mixture.score(pca.transform(test.flatten(1).numpy()))
    with torch.no_grad():
        codes = {name: posterior_means(s.guide, test).numpy() for name, s in (("vae", vae), ("ae", ae))}
        squared = {
            name: float((decode(s.model, {"z": posterior_means(s.guide, test)}, test).mean - test).square().mean())
            for name, s in (("vae", vae), ("ae", ae))
        }
    assert squared["ae"] < squared["vae"]  # it reconstructs better
    assert gaussian_kl(codes["ae"]) > 5 * gaussian_kl(codes["vae"])
    assert sample_nll(ae, mixture, pca) > sample_nll(vae, mixture, pca) + 5  # and generates worse
    assert sample_nll(vae, mixture, pca) < real + 10


@pytest.mark.slow
@pytest.mark.row("0.17")
def test_two_latents_of_a_vae_beat_two_principal_components_and_no_latent():
    start, end = (trained(["model.latent_dim=2", "decoder.hidden=[200,200]"], steps) for steps in (0, 4000))
    train, test = (end.source(split).fixed() for split in ("train", "test"))
    labels = [end.dataset.labels[split].numpy() for split in ("train", "test")]
    pca = PCA(2).fit(train.flatten(1).numpy())
    flat = [x.flatten(1).numpy() for x in (train, test)]
    pca_error = np.square(pca.inverse_transform(pca.transform(flat[1])) - flat[1]).mean()

    def accuracy(codes):
        return KNeighborsClassifier(15).fit(codes[0], labels[0]).score(codes[1], labels[1])

    def error_and_accuracy(setup):
        with torch.no_grad():
            codes = [posterior_means(setup.guide, x) for x in (train, test)]
            error = float((decode(setup.model, {"z": codes[1]}, test).mean - test).square().mean())
        return error, accuracy([code.numpy() for code in codes])

    pca_accuracy = accuracy([pca.transform(x) for x in flat])
    (start_error, _), (error, found) = error_and_accuracy(start), error_and_accuracy(end)
    assert start_error > pca_error  # the untrained model fails
    assert error < pca_error
    assert found > pca_accuracy
    mean = train.mean(0).clamp(1e-3, 1 - 1e-3)
    ignoring = -float((test * mean.log() + (1 - test) * (1 - mean).log()).flatten(1).sum(1).mean())
    numbers, _ = evaluate(end.model, end.guide, test, end.config.section("evaluation"), seed=0)
    assert numbers["test/nll"] < ignoring - 1


@pytest.mark.row("1.23")
def test_a_latent_that_the_decoder_ignores_is_seen_as_such():
    """z does not affect x: no information, no active unit, and log p(x) that of the pixels by themselves."""
    setup = trained(["model.latent_dim=2", "decoder.hidden=[]"], 0)
    torch.nn.init.zeros_(setup.model.likelihood.net.output.weight)
    torch.nn.init.zeros_(setup.guide.core.net.output.weight)
    x = setup.source("test").fixed()[:100]
    with torch.no_grad():
        draws = particles(setup.model, setup.guide, x, 20)
        spread = draws.log_likelihood.var(0).max()
        mean = torch.sigmoid(setup.model.likelihood.net.output.bias)
    assert spread < 1e-6
    by_pixel = -(x.flatten(1) * mean.log() + (1 - x.flatten(1)) * (1 - mean).log()).sum(1)
    numbers, _ = evaluate(setup.model, setup.guide, x, setup.config.section("evaluation"), seed=0)
    assert numbers["test/nll"] == pytest.approx(float(by_pixel.mean()), abs=1e-3)
    assert numbers["test/mutual_information"] == 0
    assert numbers["test/active_units"] == 0
