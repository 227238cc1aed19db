"""Surgery on a part of the data, its bias, and what the log of a run follows along the training."""

import itertools
import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference import experiment
from inference.config import ConfigError, load
from inference.console import Quiet
from inference.diagnostics import surgery
from inference.evaluate import evaluating, validation_scores
from inference.experiment import open_run
from models.latent import LatentVariableModel
from models.likelihoods import FixedGaussian
from models.nets import Linear
from models.ppca import PPCA
from models.priors import StandardNormal
from tests import brute_force, oracles


@pytest.mark.row("4.24", "4.25")
def test_a_part_of_the_data_brackets_the_information_of_all():
    """Over every batch of 4 of 12 data: one estimate is low on average, the other high, and the truth by quadrature."""
    rng = np.random.default_rng(0)
    loc, scale = rng.normal(size=12), rng.uniform(0.2, 0.8, size=12)
    table = torch.tensor(np.stack([loc, scale], 1))

    def guide(x):
        m, s = table[x[:, 0].long()].T
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(m.unsqueeze(-1), s.unsqueeze(-1)).to_event(1))

    model = LatentVariableModel(StandardNormal((1,)), FixedGaussian((1,), (1,), Linear))
    x = torch.arange(12).double().unsqueeze(-1)
    _, truth, _ = brute_force.scalar_surgery(loc, scale)
    batches = [list(batch) for batch in itertools.combinations(range(12), 4)]
    within = np.mean([brute_force.scalar_surgery(loc[b], scale[b], 2001)[1] for b in batches])
    found = [surgery(model, guide, x[b], population=12) for b in batches for _ in range(2)]
    low, high = (np.array([getattr(f, name) for f in found]) for name in ("mutual_information", "upper"))
    low_error, high_error = (v.std() / math.sqrt(len(v)) for v in (low, high))
    assert abs(low.mean() - within) < 5 * low_error  # unbiased for the data that it sees
    assert within < truth - 5 * low_error
    assert high.mean() > truth + 5 * high_error
    assert (high <= math.log(12)).all()
    # Of all the data both are one number.
    whole = surgery(model, guide, x)
    assert whole.upper == pytest.approx(whole.mutual_information, abs=1e-12)


def test_the_gap_that_is_tracked_is_the_divergence_from_the_posterior():
    torch.manual_seed(3)
    model, guide, x = PPCA((3,), 2), Amortized(DiagonalNormal((2,), (3,), Linear)), torch.randn(200, 3)
    scores = validation_scores(model, guide, x, seed=0, surgery_data=50, gap_particles=3000)
    q = guide.core(x).base_dist
    p = model.likelihood
    oracle = oracles.LinearModel(p.weight.detach().numpy(), p.loc.detach().numpy(), p.scale.item())
    means, covariance = oracles.ppca_posterior(x.numpy(), oracle)
    exact = np.mean(
        [
            oracles.gaussian_kl(m.numpy(), np.diag(s.numpy() ** 2), mean, covariance)
            for m, s, mean in zip(q.loc.detach(), q.scale.detach(), means, strict=True)
        ]
    )
    noise = 5 * math.sqrt(float(scores["valid/reconstruction"] ** 2)) / math.sqrt(200)  # of the ELBO's single draw
    assert exact > 0.2
    assert scores["valid/kl_to_posterior"] == pytest.approx(exact, abs=min(noise, 0.5 * exact))
    assert scores["valid/kl"] == pytest.approx(scores["valid/mutual_information"] + scores["valid/marginal_kl"])
    with evaluating(model, guide, seed=0):
        assert 0 <= scores["valid/mutual_information"] <= math.log(50)
    assert set(validation_scores(model, guide, x, seed=0)) == {"valid/elbo", "valid/reconstruction", "valid/kl"}


SMALL = ["encoder.hidden=[8]", "decoder.hidden=[8]", "evaluation.particles=4", "evaluation.draws=2"]


@pytest.mark.row("5.8")
def test_a_run_tracks_what_it_is_asked_to(tmp_path):
    torch.set_default_dtype(torch.float32)
    steps = ["trainer.steps=6", "trainer.validations=3", "trainer.surgery_data=40", "trainer.gap_particles=3"]
    folder = experiment.train(load([*SMALL, *steps, f"run.dir={tmp_path / 'run'}"]), Quiet())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert row["valid/kl"] == pytest.approx(row["valid/mutual_information"] + row["valid/marginal_kl"], abs=1e-6)
        assert 0 <= row["valid/mutual_information"] <= math.log(40)
        assert 0 <= row["valid/active_units"] <= 20
        assert "valid/kl_to_posterior" in row
    setup = open_run(folder)
    x = setup.source("valid").fixed()
    assert validation_scores(setup.model, setup.guide, x, 0)["valid/kl"] == pytest.approx(
        rows[-1]["valid/kl"], rel=1e-4
    )
    with pytest.raises(ConfigError, match="surgery_data"):
        load(["trainer.surgery_data=-1"])


@pytest.mark.row("4.30")
def test_a_run_says_how_much_better_its_training_data_are_bounded(tmp_path):
    """The prior that is made of all training data knows them by heart, more than N(0, I) does."""
    torch.set_default_dtype(torch.float32)
    words = ["data.limit=60", "model.latent_dim=8", "trainer.steps=150", "trainer.learning_rate=0.01", "seed=0"]
    small = ["evaluation.particles=2", "evaluation.draws=2", "encoder.hidden=[16]", "decoder=linear"]
    gaps = {}
    for prior in ("standard", "aggregated"):
        folder = experiment.train(load([*words, *small, f"prior={prior}", f"run.dir={tmp_path / prior}"]), Quiet())
        summary = json.loads((folder / "summary.json").read_text())
        gaps[prior] = summary["train/elbo"] - summary["test/elbo"]
    assert gaps["aggregated"] > gaps["standard"] + 0.3
