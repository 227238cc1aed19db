"""Yardsticks for samples against closed forms and hand values; the study of autoencoder and VAE, small."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from inference.config import ConfigError
from inference.console import Quiet
from inference.sample_quality import Yardstick, energy_distance, energy_test, normal_kl, sharpness
from inference.studies import run_study
from inference.studies.linear import density_as_noise_vanishes, directions
from models.ppca import PPCA
from tests import oracles


def test_the_yardstick_of_normal_data_is_their_density():
    rng = np.random.default_rng(0)
    covariance = np.array([[2.0, 0.6], [0.6, 0.5]])
    x = rng.multivariate_normal([1.0, -2.0], covariance, 20_000)
    exact = -multivariate_normal([1.0, -2.0], covariance).logpdf(x).mean()
    assert Yardstick(x, clusters=1).nll(x) == pytest.approx(exact, abs=0.01)
    assert Yardstick(x, clusters=3).nll(x + 3) > exact + 1


def test_energy_distance_of_two_normals():
    """The difference of two normals is N(m, 2), and its mean absolute value that of the folded normal."""

    def folded(m):  # E|N(m, 2)|
        s = math.sqrt(2)
        return s * math.sqrt(2 / math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)

    rng = np.random.default_rng(0)
    found = [energy_distance(rng.normal(size=(60, 1)), rng.normal(1.0, size=(50, 1))) for _ in range(300)]
    exact, error = 2 * folded(1.0) - 2 * folded(0.0), np.std(found) / math.sqrt(300)
    assert abs(np.mean(found) - 1.2 * exact) > 5 * error
    assert abs(np.mean(found) - exact) < 5 * error


def test_the_energy_test_keeps_its_level():
    rng = np.random.default_rng(1)
    rejected = []
    for _ in range(100):
        two = energy_test(rng.normal(size=(30, 2)), rng.normal(size=(30, 2)), relabellings=100)
        rejected.append(two.statistic > two.threshold)
    assert np.mean(rejected) < 0.05 + 5 * math.sqrt(0.05 * 0.95 / 100)
    apart = energy_test(rng.normal(size=(30, 2)), rng.normal(1.5, size=(30, 2)), relabellings=100)
    assert apart.statistic > 2 * apart.threshold


def test_sharpness_and_the_divergence_of_a_normal_fit_by_hand():
    image = np.zeros((1, 1, 5, 5))
    image[0, 0, 2, 2] = 1.0  # its Laplacian is -4 there and 1 at four neighbours
    assert sharpness(image) == pytest.approx(20 / 25)
    assert sharpness(np.ones((2, 1, 5, 5))) == 0
    codes = np.random.default_rng(0).normal(1.0, 2.0, size=(50, 3))
    assert normal_kl(codes) == pytest.approx(oracles.gaussian_kl(codes.mean(0), np.cov(codes.T)), abs=1e-10)


@pytest.mark.row("1.27")
def test_a_decoder_without_noise_has_no_density():
    """log p(x) off the plane falls as -r^2 / 2 s^2, on it rises as -(D - Q) log s: neither has a limit."""
    torch.manual_seed(0)
    x = torch.randn(40, 5) * torch.tensor([3.0, 2.0, 0.5, 0.4, 0.3])
    scales = [0.1, 1e-2, 1e-3]
    rows = density_as_noise_vanishes(x, 2, scales)
    centred = x - x.mean(0)
    discarded = np.sort(np.linalg.eigvalsh(np.cov(centred.numpy().T, bias=True)))[:3].sum()
    for a, b in itertools.pairwise(rows):
        rise = 3 * math.log(a["scale"] / b["scale"])
        fall = discarded / 2 * (b["scale"] ** -2 - a["scale"] ** -2)
        assert b["on"] - a["on"] == pytest.approx(rise, rel=0.01)
        assert b["off"] - a["off"] == pytest.approx(rise - fall, rel=0.01)
    assert rows[-1]["off"] < -1e4 < 10 < rows[-1]["on"]


@pytest.mark.row("0.13")
def test_a_linear_autoencoder_at_its_best_takes_each_distribution_to_the_other():
    """The decoder takes N(0, I) to the data's distribution, and the encoder the data's to N(0, I)."""
    torch.manual_seed(0)
    rows = torch.randn(500, 4) @ torch.diag(torch.tensor([2.0, 1.5, 0.5, 0.5])) + 1.0
    model = PPCA((4,), 2)
    model.maximum_likelihood(rows)
    p = model.likelihood
    covariance = torch.cov(rows.T, correction=0)
    means = model.posterior(rows).mean
    with torch.no_grad():
        aggregated = torch.cov(means.T, correction=0) + model.posterior(rows[:1]).covariance_matrix[0]
        assert torch.allclose(aggregated, torch.eye(2), atol=1e-8)
        assert torch.allclose(means.mean(0), torch.zeros(2), atol=1e-8)
        generated = p.weight @ p.weight.T + p.scale.square() * torch.eye(4)
        values, vectors = torch.linalg.eigh(covariance)
        kept = vectors[:, 2:]
        assert torch.allclose(kept.T @ generated @ kept, torch.diag(values[2:]), atol=1e-8)  # exact where it codes
        assert generated.trace() == pytest.approx(covariance.trace().item(), abs=1e-8)
        # A two-sample test cannot tell draws from data, and could those of a decoder before it is fitted.
        fitted, unfitted = (m.evidence().sample((200,)).numpy() for m in (model, PPCA((4,), 2)))
    same, other = (energy_test(sample, rows[:200].numpy()) for sample in (fitted, unfitted))
    assert same.statistic < same.threshold
    assert other.statistic > other.threshold


TINY = ["trainer.steps=4", "evaluation.particles=4", "evaluation.draws=2", "encoder.hidden=[8]", "decoder.hidden=[8]"]


@pytest.mark.row("4.29")
def test_the_autoencoder_study_answers_for_each_model(tmp_path):
    options = ["study.models=[autoencoder,vae]", "study.seeds=[0]", "study.samples=40", "study.jobs=1"]
    page = run_study(["autoencoder", *TINY, *options, f"run.dir={tmp_path / 'study'}"], Quiet())
    ae, vae = json.loads((tmp_path / "study" / "table.json").read_text())
    assert (ae["kind"], vae["kind"]) == ("autoencoder", "vae")
    assert ae["nll"] is None
    assert vae["nll"] > 0
    for row in (ae, vae):
        for name in ("sample_nll", "reconstruction_nll", "code_kl", "energy", "sample_sharpness"):
            assert math.isfinite(row[name])
        assert 0 <= row["accuracy"] <= 1
    text = page.read_text()
    assert text.count("<img") == 3
    assert "marginal KL" in text


def test_the_autoencoder_study_is_not_of_images_alone(tmp_path):
    """Data of four entries leave a linear model three latents at most, and one latent has no plane to be drawn on."""
    words = [*TINY, "data=iris", "model.latent_dim=1", "evaluation.data=20"]
    options = ["study.models=[autoencoder,vae]", "study.seeds=[0]", "study.samples=20", "study.jobs=1"]
    page = run_study(["autoencoder", *words, *options, f"run.dir={tmp_path / 'study'}"], Quiet())
    ae, vae = json.loads((tmp_path / "study" / "table.json").read_text())
    assert ae["sample_sharpness"] is vae["sample_sharpness"] is None
    assert math.isfinite(vae["sample_nll"])
    text = page.read_text()
    assert text.count("<img") == 1  # the mismatch of prior and codes
    assert "as many latents (1)" in text


def test_directions_are_those_that_data_vary_in():
    x = torch.randn(50, 3) @ torch.randn(3, 7) + 5.0
    assert directions(x - x.mean(0)) == 3
    rows = density_as_noise_vanishes(x, directions(x) - 1, [0.1])
    assert math.isfinite(rows[0]["off"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study.models=[gan]"], r"gan.*autoencoder, beta_tenth"),
        (["objective=iwae"], r"study\.models has an objective"),
        (["model=two_layer", "study.models=['guide=ladder']"], "guide=ladder.*one latent.*z2, z1"),
        (["likelihood=pixelcnn", "data.binarization=dynamic", "study.models=[vae]"], "likelihood=pixelcnn knows none"),
        (["seed=2"], r"seed=2.*study\.seeds"),
    ],
)
def test_what_the_autoencoder_study_cannot_compare_is_refused(words, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_study(["autoencoder", *words, f"run.dir={tmp_path}"], Quiet())
