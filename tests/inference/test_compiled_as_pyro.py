"""A compiled step is Pyro's step, whatever else happens to parameters, optimizers and settings in between."""

from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

from tests.inference.engines import PIXELS, batches, plain
from tests.inference.test_compiled import StockVAE, ours_is_pyros

BETA = 1.0
MEAN_FIELD, ELBO = pyro.infer.TraceMeanField_ELBO, pyro.infer.Trace_ELBO


def svi_of(kind, vae, optim=None, loss=ELBO, guide=None):
    return kind(vae.model, guide or vae.guide, optim or pyro.optim.Adam({"lr": 0.05}), loss())


class Weighted(StockVAE):
    """Its likelihood has a weight and a shift."""

    def model(self, x, weight=1.0, shift=0.0):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            with poutine.scale(scale=weight):
                logits = self.decoder(z) + shift
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x, *rest):
        super().guide(x)


def followed(make, between=lambda vae, svi, i: None, arguments=lambda i: ()):
    """``train(kind)`` of :func:`ours_is_pyros`: eighteen steps with something done before each."""

    def train(kind):
        pyro.clear_param_store()
        vae, values = make(), []
        svi = svi_of(kind, vae)
        for i, x in enumerate(batches(18)):
            between(vae, svi, i)
            values.append(float(svi.step(x, *arguments(i))))
        return svi, (torch.tensor(values),)

    return train


def require(vae, svi, i):
    vae.encoder.requires_grad_(not 6 <= i < 12)


def replace(vae, svi, i):
    if i == 8:
        vae.encoder.weight = nn.Parameter(torch.randn(4, PIXELS))


def assign(vae, svi, i):
    if i == 8:
        vae.encoder.weight.data = torch.randn(4, PIXELS)


def forget(vae, svi, i):
    if i == 8:
        pyro.clear_param_store()


def decay(vae, svi, i):
    if i == 8:
        for optimizer in svi.optim.optim_objs.values():
            optimizer.param_groups[0].update(weight_decay=5.0, betas=(0.5, 0.9))


class Shifted(Weighted):
    def __init__(self):
        super().__init__()
        self.mode, self.none, self.entries = "full", None, [1.0]
        self.nested = SimpleNamespace(of=SimpleNamespace(beta=1.0))

    def model(self, x):
        weight = self.entries[0] * self.nested.of.beta * (1.0 if self.none is None else self.none)
        super().model(x, weight if self.mode == "full" else 0.3, pyro.param("shift", torch.zeros(PIXELS)))


class ByHelper(Weighted):
    def model(self, x):
        self.helper(x)

    def helper(self, x):
        super().model(x, BETA)


class Late(Weighted):
    """A parameter comes in, at random, some steps after the others."""

    def model(self, x, late):
        super().model(x, 1.0, pyro.param("late", torch.randn(PIXELS)) if late else 0.0)


class Plain:
    """No module itself."""

    def __init__(self):
        own = StockVAE()
        self.decoder, self.encoder = own.decoder, nn.Sequential(own.encoder, nn.Dropout(0.5))

    model, guide = StockVAE.model, StockVAE.guide


def setting(name, value):
    return lambda vae, svi, i: setattr(vae, name, value) if i == 8 else None


def global_beta(vae, svi, i):
    global BETA
    BETA = 1.0 if i < 8 else 0.3


HAPPENINGS = {
    "requires_grad": followed(StockVAE, require),
    "another parameter": followed(StockVAE, replace),
    "other data": followed(StockVAE, assign),
    "store cleared": followed(Shifted, forget),
    "other options": followed(StockVAE, decay),
    "word": followed(Shifted, setting("mode", "short")),
    "none": followed(Shifted, setting("none", 0.3)),
    "list": followed(Shifted, lambda vae, svi, i: vae.entries.__setitem__(0, 1.0 if i < 8 else 0.3)),
    "nested": followed(Shifted, lambda vae, svi, i: setattr(vae.nested.of, "beta", 1.0 if i < 8 else 0.3)),
    "global of a method": followed(ByHelper, global_beta),
    "late parameter": followed(Late, arguments=lambda i: (i > 7,)),
    "mode of a module in an object": followed(Plain, lambda vae, svi, i: vae.encoder.train(i < 8)),
}


@pytest.mark.filterwarnings("ignore:.* was not registered in the param store because requires_grad=False")
@pytest.mark.parametrize("name", HAPPENINGS)
def test_what_happens_between_steps_is_seen(name):
    assert ours_is_pyros(HAPPENINGS[name]) > 0


def alternating(others, turn=lambda i: i % 3):
    """Two engines step in turn on one optimizer, whose counts of steps both change."""

    def train(kind):
        pyro.clear_param_store()
        vae, optim = StockVAE(), pyro.optim.Adam({"lr": 0.05})
        one = svi_of(kind, vae, optim)
        other = others(kind, vae, optim)
        return one, (torch.tensor([float((other if turn(i) else one).step(x)) for i, x in enumerate(batches(18))]),)

    return train


OTHERS = {
    "same": lambda kind, vae, optim: svi_of(kind, vae, optim, MEAN_FIELD),
    "pyro's": lambda kind, vae, optim: svi_of(pyro.infer.SVI, vae, optim, MEAN_FIELD),
}


def test_parameters_that_are_hidden_stay():
    hidden = {"hide_types": ["param"]}
    others = lambda kind, vae, optim: svi_of(kind, vae, optim, guide=poutine.block(vae.guide, **hidden))  # noqa: E731
    assert ours_is_pyros(alternating(others, lambda i: i > 8)) > 0


@pytest.mark.parametrize("name", OTHERS)
def test_optimizers_are_shared(name):
    assert ours_is_pyros(alternating(OTHERS[name])) > 0


def test_parameters_that_a_step_does_not_reach():
    """Pyro steps on all that ``pyro.module`` registers, with gradients of zero on those that were reached before."""

    class Two(Weighted):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(2, PIXELS)

        def model(self, x, other):
            pyro.module("all", self)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
                logits = (self.other if other else self.decoder)(z)
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    assert ours_is_pyros(followed(Two, arguments=lambda i: (i % 3 == 1,))) > 0


READS = {
    "numpy": (lambda x, own: x.numpy().mean(), "value on the host"),
    "tolist": (lambda x, own: sum(x[0].tolist()), "value on the host"),
    "array": (lambda x, own: np.asarray(x).mean(), "value on the host"),
    "generator": (lambda x, own: torch.rand((), generator=own), "a torch.Generator of its own"),
    "numpy's": (lambda x, own: np.random.rand(), "Python's or numpy's generator"),  # noqa: NPY002
}


@pytest.mark.parametrize("name", READS)
def test_what_only_the_host_knows_runs_eagerly_with_the_same_numbers(name):
    read, reason = READS[name]
    found = []
    for kind in (pyro.infer.SVI, plain):
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        own = torch.Generator().manual_seed(0)

        kept = SimpleNamespace(own=own)
        program = {"model": lambda self, x: Weighted.model(self, x, 0.1 + read(x, kept.own))}  # noqa: B023
        Reading = type("Reading", (Weighted,), program)
        with pyro.settings.context(module_local_params=False):
            svi, values = followed(Reading)(kind)
        found.append(values[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)
    assert reason in svi.why_eager
    assert "Trace Shapes" not in svi.why_eager


def test_objects_among_the_arguments_run_eagerly():
    settings = SimpleNamespace(beta=1.0)
    Reading = type("Reading", (Weighted,), {"model": lambda self, x, s: Weighted.model(self, x, s.beta)})
    train = followed(Reading, arguments=lambda i: (settings,))
    with pyro.settings.context(module_local_params=False):
        svi, _ = train(plain)
    assert "argument 2 is a SimpleNamespace" in svi.why_eager


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](PIXELS, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, PIXELS]).to_event(2))

    def forward(self, x):
        scale = pyro.sample("scale", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, scale), obs=x.sum(-1))


@pytest.mark.parametrize("guide", [AutoDiagonalNormal, AutoIAFNormal])
def test_sampled_weights_and_autoguides_are_captured(guide):
    def train(kind):
        pyro.clear_param_store()
        model = Regression()
        svi = kind(model, guide(model), pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.99}), ELBO())
        return svi, (torch.tensor([float(svi.step(x)) for x in batches(12)]),)

    assert ours_is_pyros(train) > 0
