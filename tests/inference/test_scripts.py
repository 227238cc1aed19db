"""Our objectives in other people's Pyro scripts, and Pyro's in ours."""

import math
import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.infer.autoguide
import pytest
import torch
from torch import nn

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference.bounds import PIWAE
from inference.engine import SVI, SharedOptimizer
from inference.objectives import ELBO, IWAE
from models.latent import LatentVariableModel
from models.likelihoods import Bernoulli
from models.nets import MLP
from models.priors import StandardNormal
from tests import oracles
from tests.programs import (
    TableGuide,
    TableModel,
)

ROOT = Path(__file__).resolve().parents[2]


def composed():
    net = lambda i, o: MLP(i, o, (6,))  # noqa: E731
    model = LatentVariableModel(StandardNormal((2,)), Bernoulli((5,), (2,), net))
    return model, Amortized(DiagonalNormal((2,), (5,), net)), torch.randint(0, 2, (4, 5)).double()


class StockVAE(nn.Module):
    """Pyro's tutorial in small: an nn.Module registered by pyro.module, model and guide its methods."""

    def __init__(self, data_dim=8, latent_dim=2):
        super().__init__()
        self.latent_dim = latent_dim
        self.decoder, self.encoder = nn.Linear(latent_dim, data_dim), nn.Linear(data_dim, 2 * latent_dim)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(x.shape[0], self.latent_dim), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


def two_patterns(count=60):
    pattern = torch.cat([torch.ones(4), torch.zeros(4)])
    return torch.stack([pattern if i % 2 else 1 - pattern for i in range(count)])


@pytest.mark.parametrize("objective", [ELBO(2), ELBO(kl="analytic"), IWAE(5)], ids=["mc", "analytic", "iwae"])
def test_objectives_train_a_stock_program_under_plain_svi(objective):
    pyro.set_rng_seed(0)
    vae, x = StockVAE(), two_patterns()
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.05}), loss=objective)
    start = svi.evaluate_loss(x) / len(x)
    assert start > math.log(2) + 1
    losses = [svi.step(x) / len(x) for _ in range(300)]
    assert isinstance(losses[0], float)
    end = svi.evaluate_loss(x) / len(x)
    assert end < 1.5  # the entropy of the two patterns is log 2 = 0.69; blind to them it is 8 log 2 = 5.5


def test_the_readmes_script_finds_the_evidence(capsys):
    """As it stands there: two of our objectives, Pyro's SVI; z ~ N(0, 1), x ~ N(z, 1), so that x ~ N(0, 2)."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (script,) = [block for block in blocks if "SVI" in block]
    space = {}
    torch.set_default_dtype(torch.float32)
    exec(script, space)
    x = space["x"]
    expected = -float(dist.Normal(0.0, math.sqrt(2)).log_prob(x).mean())
    found = [abs(float(number)) for number in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)]
    assert len(found) == 2
    assert all(expected - 0.1 < value < expected + 0.5 for value in found)  # bounds


def test_a_script_of_ten_lines(capsys):
    """With an autoguide of Pyro's, whose parameters have names of their own."""
    x = 3.0 + torch.randn(50)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    expected = -float(dist.Normal(0.0, math.sqrt(2)).log_prob(x).mean())
    for loss in (ELBO(gradient="stl"), IWAE(particles=10, gradient="dreg"), PIWAE(4, 2)):
        guide = pyro.infer.autoguide.AutoNormal(model)
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
        losses = [svi.step(x) / len(x) for _ in range(250)]
        assert losses[0] > expected + 0.2
        assert abs(losses[-1] - expected) < 0.03


def test_objectives_train_parameters_of_the_global_store():
    x = 2 + torch.randn(200)

    def model(x):
        mean = pyro.param("mean", torch.tensor(0.0))
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(mean, 0.6))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(x.shape[0]))
        scale = pyro.param("scale", torch.ones(x.shape[0]), constraint=dist.constraints.positive)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(loc, scale))

    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss=ELBO(5, "analytic"))
    for _ in range(600):
        svi.step(x)
    assert abs(pyro.param("mean").item() - x.mean().item()) < 0.1
    assert abs(pyro.param("scale").mean().item() - 0.48) < 0.05  # 1 / sqrt(1 / 0.6^2 + 1 / 0.8^2)


@pytest.mark.row("5.1", "5.2")
@pytest.mark.parametrize(
    "loss",
    [
        pyro.infer.Trace_ELBO(),
        pyro.infer.TraceMeanField_ELBO(),
        pyro.infer.TraceGraph_ELBO(),
        pyro.infer.TraceEnum_ELBO(strict_enumeration_warning=False),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_pyros_objectives_train_our_programs(loss):
    model, guide, x = composed()
    before = _elbo(model, guide, x)
    svi = SVI(model, guide, shared_adam(model, guide), loss)
    for _ in range(200):
        svi.step(x)
    assert _elbo(model, guide, x) > before + 0.5


def test_enumeration_trains_a_discrete_guide():
    oracle = oracles.tiny_discrete_vae()
    x = torch.tensor(oracle.data())
    table = oracles.random_tables(64, 8)
    model, guide = TableModel(oracle), TableGuide(table, enumerate="parallel")
    svi = SVI(model, guide, shared_adam(guide), pyro.infer.TraceEnum_ELBO(max_plate_nesting=1))
    evidence, start = oracle.log_evidence(oracle.data()).sum(), oracle.elbo(oracle.data(), table).sum()
    assert evidence - start > 10
    for _ in range(500):
        loss = svi.step(x)
    assert abs(evidence + loss) < 0.1


def shared_adam(*programs, lr=0.05):
    return SharedOptimizer([p for program in programs for p in program.parameters()], torch.optim.Adam, lr)


def _elbo(model, guide, x):
    pyro.set_rng_seed(7)
    with torch.no_grad():
        return ELBO(200, "analytic")(model, guide, x).mean().item()
