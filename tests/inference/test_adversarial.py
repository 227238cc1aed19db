"""Implicit models and adversarial training: the game's value on tables, draws without a density, a toy that learns."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from inference.adversarial import best_discriminator, game_value, tabular_value, train_adversarially
from inference.assemble import assemble
from inference.config import ConfigError, load
from inference.console import Quiet
from inference.objectives import ELBO
from inference.particles import StructureError, generate
from inference.studies import run_study
from models.implicit import Implicit
from models.latent import LatentVariableModel
from models.nets import MLP, Linear
from models.priors import StandardNormal
from run import main


@pytest.mark.row("0.28", "1.29")
def test_the_best_discriminator_and_the_value_of_the_game():
    p, g = torch.randn(20, 6).softmax(-1), torch.randn(20, 6).softmax(-1)
    best = best_discriminator(p, g)
    value = tabular_value(p, g, best)
    middle = (p + g) / 2
    divergence = ((p * (p / middle).log()).sum(-1) + (g * (g / middle).log()).sum(-1)) / 2
    assert torch.allclose(value, -math.log(4) + 2 * divergence, atol=1e-10)
    for _ in range(20):
        other = (best.logit() + 0.1 * torch.randn_like(best)).sigmoid()
        assert (tabular_value(p, g, other) < value).all()
    assert torch.allclose(tabular_value(p, p, best_discriminator(p, p)), torch.tensor(-math.log(4)), atol=1e-10)
    found = optimize.minimize_scalar(
        lambda d: -float(tabular_value(p[0, :1], g[0, :1], torch.tensor([d]))),
        bounds=(1e-6, 1 - 1e-6),
        method="bounded",
    )
    assert found.x == pytest.approx(float(best[0, 0]), abs=1e-4)


def test_the_value_from_logits():
    on_data, on_draws = torch.randn(5), torch.randn(7)
    by_hand = on_data.sigmoid().log().mean() + (1 - on_draws.sigmoid()).log().mean()
    assert torch.allclose(game_value(on_data, on_draws), by_hand, atol=1e-12)


@pytest.mark.row("1.30", "3.10")
def test_draws_have_no_density(capsys):
    model = LatentVariableModel(StandardNormal((3,)), Implicit((2, 4), (3,), MLP))
    latents, p_x, x = generate(model, torch.zeros(5, 2, 4))
    assert x.shape == (5, 2, 4)
    assert x.requires_grad
    assert torch.equal(x, p_x.mean)
    with pytest.raises(ValueError, match="has no density"):
        model.likelihood(latents["z"]).log_prob(x)
    torch.set_default_dtype(torch.float32)
    setup = assemble(load(["likelihood=implicit", "data.binarization=none", "device=cpu", "objective=elbo"]))
    with pytest.raises((ValueError, StructureError), match="has no density"):
        ELBO().bound(setup.model, setup.guide, torch.rand(3, 1, 8, 8))
    for greys in ([], ["data.binarization=none"]):
        assert main(["train", "likelihood=implicit", *greys, "trainer.steps=1"]) == 2
        assert "an implicit model draws data and has no density" in capsys.readouterr().err


@pytest.mark.row("1.30")
def test_maximum_likelihood_and_the_game_part_where_the_model_is_wrong():
    """One normal for two unequal, narrow bumps: likelihood covers both, the Jensen-Shannon divergence need not."""
    x = np.linspace(-8, 8, 4001)
    p = 0.7 * stats.norm.pdf(x, -2, 0.4) + 0.3 * stats.norm.pdf(x, 2, 0.4)

    def divergence(parameters):
        g = stats.norm.pdf(x, parameters[0], np.exp(parameters[1]))
        middle = (p + g) / 2
        terms = [
            np.where(f > 1e-300, f * np.log(np.maximum(f, 1e-300) / np.maximum(middle, 1e-300)), 0) for f in (p, g)
        ]
        return integrate.trapezoid(sum(terms) / 2, x)

    mean = 0.7 * -2 + 0.3 * 2
    scale = math.sqrt(0.4**2 + 0.21 * 16)
    game = min((optimize.minimize(divergence, start, method="Nelder-Mead") for start in ([-2.0, -1.0], [0.0, 0.5])),
               key=lambda result: result.fun)  # fmt: skip
    assert divergence([mean, math.log(scale)]) > game.fun + 0.05
    assert abs(game.x[0] - mean) > 0.5
    assert np.exp(game.x[1]) < 0.5 * scale


def test_a_generator_learns_where_the_data_are():
    torch.manual_seed(1)
    model = LatentVariableModel(StandardNormal((2,)), Implicit((2,), (2,), Linear))
    target = torch.tensor([0.8, 0.3])

    def batches():
        return (target + 0.05 * torch.randn(100, 2)).clamp(0, 1)

    def miss():
        return float((generate(model, torch.zeros(500, 2))[2].detach().mean(0) - target).abs().max())

    assert miss() > 0.15
    values = train_adversarially(model, MLP((2,), (1,), hidden=(16,)), batches, 300, learning_rate=1e-2)
    assert miss() < 0.1
    assert abs(values[-1] + math.log(4)) < 0.4


def test_the_study_shows_both_models(tmp_path):
    torch.set_default_dtype(torch.float32)
    small = ["encoder.hidden=[8]", "decoder.hidden=[8]", "trainer.steps=10", "evaluation.data=30", "evaluation.draws=2"]
    own = ["study.steps=10", "study.samples=100", "study.hidden=8"]
    page = run_study(["adversarial", *small, *own, f"run.dir={tmp_path / 'study'}"], Quiet())
    rows = {row["model"]: row for row in json.loads((tmp_path / "study" / "table.json").read_text())}
    assert rows["VAE"]["log_p"] > rows["VAE"]["elbo"] - 1
    assert rows["GAN"]["log_p"] is None
    assert rows["GAN"]["energy"] > rows["GAN"]["energy_threshold"]
    assert "has no density" in page.read_text()
    with pytest.raises(ConfigError, match="leave out likelihood"):
        run_study(["adversarial", "likelihood=gaussian", f"run.dir={tmp_path / 'other'}"], Quiet())
    with pytest.raises(ConfigError, match="at least 100"):
        run_study(["adversarial", "study.samples=5", f"run.dir={tmp_path / 'other'}"], Quiet())
