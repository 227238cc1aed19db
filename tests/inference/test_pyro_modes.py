"""Scripts of Pyro's that import this package: Pyro stays as it comes, and the parts work as it comes.

The rest of the tests runs as the command line does, with parameters in their modules. These run in a process of their
own, in which nothing has switched that on.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STOCK = """
import warnings; warnings.simplefilter("error")
import pyro, pyro.infer, pyro.optim, torch
import pyro.distributions as dist
from pyro.infer.autoguide import AutoNormal

def model(x):
    b = pyro.param("b", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + b, 1.0), obs=x)

def stock():
    pyro.clear_param_store(); pyro.set_rng_seed(0)
    x = 3 + torch.randn(20)
    svi = pyro.infer.SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), loss=pyro.infer.Trace_ELBO())
    losses = [svi.step(x) for _ in range(5)]
    return losses, sorted(pyro.get_param_store().keys())

def refused():
    try:
        dist.Normal(0.0, -1.0)
    except ValueError as error:
        return "scale" in str(error)

before, settings = (stock(), refused()), pyro.settings.get()
assert refused(), "Pyro refuses a negative scale"
import models, guides, inference.objectives, inference.engine
import models.flows, inference.catalog, inference.assemble, inference.experiment, inference.studies
assert (stock(), refused()) == before, "a stock script"
assert pyro.settings.get() == settings, "settings"
before = before[0]
assert len(before[1]) == 3
"""

OURS = """
from functools import partial
from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference.bounds import CIWAE, PIWAE, Renyi
from inference.compiled import CompiledSVI
from inference.engine import SVI, SharedOptimizer
from inference.evaluate import evaluating
from inference.objectives import ELBO, IWAE
from inference.particles import particles
from inference.wake_sleep import WakeSleep
from models.latent import LatentVariableModel
from models.likelihoods import FixedGaussian
from models.nets import MLP
from models.priors import LearnedNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

def ours():
    pyro.clear_param_store(); pyro.set_rng_seed(0)
    net = partial(MLP, hidden=(4,))
    made = LatentVariableModel(LearnedNormal((2,)), FixedGaussian((3,), (2,), net, scale=0.7))
    return made, Amortized(DiagonalNormal((2,), (3,), net)), torch.randn(8, 3)

def moved(step, programs, what):
    named = [(n, p) for program in programs for n, p in program.named_parameters()]
    before = [p.detach().clone() for _, p in named]
    losses = [float(step()) for _ in range(3)]
    assert not (still := [n for (n, p), b in zip(named, before) if torch.equal(p, b)]), (what, still)
    return losses

OBJECTIVES = [ELBO(), ELBO(gradient="stl"), IWAE(3, gradient="dreg"), PIWAE(4, 2, max_plate_nesting=1),
              PIWAE(4, 2, gradient="dreg"), WakeSleep(3, "both"), Renyi(0.5, 3), CIWAE(0.5, 3), ELBO(2, gradient="loo"),
              pyro.infer.Trace_ELBO()]
for loss in OBJECTIVES:
    made, guide, x = ours()
    svi = pyro.infer.SVI(made, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
    moved(lambda: svi.step(x), (made, guide), loss)

class Constrained(PyroModule):
    def __init__(self):
        super().__init__("of_the_user")
        self.loc, self.scale = nn.Parameter(torch.zeros(3)), PyroParam(torch.ones(3), dist.constraints.positive)

class Model(Constrained):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, self.scale).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

class Guide(Constrained):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc + 0.3 * x, self.scale).to_event(1))

for loss in (IWAE(3, gradient="dreg"), PIWAE(4, 2, max_plate_nesting=1), WakeSleep(3)):
    pyro.clear_param_store(); x = torch.randn(8, 3)
    made, guide = Model(), Guide()
    made._pyro_name, guide._pyro_name = "their_model", "their_guide"
    svi = pyro.infer.SVI(made, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
    moved(lambda: svi.step(x), (made, guide), loss)
    assert all(value.requires_grad for _, value in pyro.get_param_store().named_parameters())

class Classic(nn.Module):
    def __init__(self):
        super().__init__(); self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)
    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)
    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

DETACHED = ELBO(gradient="stl"), IWAE(3, gradient="dreg"), WakeSleep(3, gradient="dreg"), PIWAE(4, 2, gradient="dreg")
for loss in DETACHED:
    pyro.clear_param_store()
    one, other = Classic(), Classic()
    svi = pyro.infer.SVI(one.model, other.guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
    moved(lambda: svi.step(x), (one.decoder, other.encoder), loss)

for kind in (SVI, partial(CompiledSVI, inductor=False)):
    made, guide, x = ours()
    optimizer = SharedOptimizer([*made.parameters(), *guide.parameters()], torch.optim.Adam, 0.05)
    svi = kind(made, guide, optimizer, IWAE(3, gradient="dreg"))
    moved(lambda: svi.step(x), (made, guide), kind)
    with evaluating(made, guide, seed=0):
        particles(made, guide, x, 3)
    assert not list(pyro.get_param_store().keys()), "nothing is left in the store"

found = []
for kind in (pyro.infer.SVI, partial(CompiledSVI, inductor=False)):
    made, guide, x = ours()
    svi = kind(made, guide, pyro.optim.Adam({"lr": 0.05}), IWAE(3))
    found.append(moved(lambda: svi.step(x), (made, guide), kind))
assert max(abs(a - b) for a, b in zip(*found)) < 1e-3, found
assert pyro.settings.get("module_local_params") is False
print("as it comes")
"""


@pytest.mark.parametrize("script", [STOCK, STOCK + OURS], ids=["importing changes nothing", "our parts"])
def test_in_pyros_default_mode(script):
    if script == STOCK:
        script += 'print("as it comes")'
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.endswith("as it comes\n"), done.stderr[-3000:]


def test_the_readmes_script_runs_as_pyro_comes():
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    (script,) = [block.split("```")[0] for block in blocks if "SVI" in block]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
