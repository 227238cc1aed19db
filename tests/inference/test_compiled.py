"""Compiled steps are eager steps: the same losses at the same noise, whatever changes from step to step."""

import json
import logging
import random
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from scipy.stats import ks_2samp
from torch import nn

from inference import compiled as compiled_module
from inference.annealing import AnnealedELBO
from inference.checkpoint import rng_state, set_rng_state
from inference.compiled import CompiledSVI
from inference.engine import SVI
from inference.objectives import ELBO, IWAE
from inference.particles import validation
from tests.inference.engines import PIXELS, batches, losses, pair, parameters, plain, shared, vae_svi

RATES = [0.05, 0.05, 0.02, 0.1, 0.03, 0.03]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_inductor_follows_eager_training(dtype, tolerance):
    """Schedule, annealing, clipping and a last partial batch at once."""
    torch.set_default_dtype(dtype)
    xs = batches(6, last=3)
    eager = vae_svi(SVI, AnnealedELBO(warmup=0.8), clip=0.5)
    compiled = vae_svi(CompiledSVI, AnnealedELBO(warmup=0.8), clip=0.5)
    expected = losses(eager, xs, rates=RATES)
    found = losses(compiled, xs, rates=RATES)
    assert compiled.why_eager is None
    assert len(compiled._graphs) == 2  # one for each size: neither rate nor weight compiles again
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(parameters(compiled), parameters(eager), rtol=tolerance, atol=tolerance)
    other_noise = losses(vae_svi(SVI, AnnealedELBO(warmup=0.8), clip=0.5), xs, seed=2, rates=RATES)
    assert (other_noise / expected - 1).abs().max() > 100 * tolerance


LOSSES = [
    pyro.infer.Trace_ELBO(),
    pyro.infer.Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    pyro.infer.TraceMeanField_ELBO(),
    ELBO(kl="analytic"),
    IWAE(5),
    IWAE(5, gradient="dreg"),
    IWAE(5, gradient="vimco"),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_losses_of_pyro_and_of_ours_are_captured(loss):
    xs = batches(5)
    compiled = vae_svi(plain, loss)
    found = losses(compiled, xs)
    assert compiled.why_eager is None
    torch.testing.assert_close(found, losses(vae_svi(SVI, loss), xs), rtol=1e-10, atol=0)


OPTIMIZERS = {
    "adam": lambda ps, lr: torch.optim.Adam(ps, lr=lr, fused=True),
    "adam with decay": lambda ps, lr: torch.optim.Adam(ps, lr=lr, weight_decay=0.1, betas=(0.8, 0.9)),
    "adamw": lambda ps, lr: torch.optim.AdamW(ps, lr=lr, weight_decay=0.1, eps=1e-4),
    "adamax": lambda ps, lr: torch.optim.Adamax(ps, lr=lr),
    "adagrad": lambda ps, lr: torch.optim.Adagrad(ps, lr=lr, lr_decay=0.1),
    "sgd": lambda ps, lr: torch.optim.SGD(ps, lr=lr),
    "sgd with momentum": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9, dampening=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.3])
def test_optimizers_as_arithmetic(name, clip):
    xs = batches(6)
    eager = vae_svi(SVI, ELBO(), factory=OPTIMIZERS[name], clip=clip)
    compiled = vae_svi(plain, ELBO(), factory=OPTIMIZERS[name], clip=clip)
    rates = [rate / 50 if "sgd" in name else rate for rate in RATES]
    losses(eager, xs, rates=rates)
    before = parameters(compiled)
    losses(compiled, xs, rates=rates)
    assert compiled.why_eager is None
    assert (parameters(compiled) - before).abs().max() > 1e-4
    torch.testing.assert_close(parameters(compiled), parameters(eager), rtol=1e-9, atol=1e-11)


class StockVAE(nn.Module):
    """A model and guide that register themselves in Pyro's global store."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(2, PIXELS), nn.Linear(PIXELS, 4)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def ours_is_pyros(train):
    """What ``train(kind)`` returns beside the engine that it made is the same for Pyro's and for ours, uncompiled.

    Returns how many graphs ours captured: none would compare Pyro with itself.
    """
    found = []
    with pyro.settings.context(module_local_params=False):
        for kind in (pyro.infer.SVI, plain):
            pyro.clear_param_store()
            torch.manual_seed(0)
            svi, values = train(kind)
            assert getattr(svi, "why_eager", None) is None
            found.append(values)
    for stock, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-9, atol=1e-11)
    return len(svi._graphs)


class Mixture(nn.Module):
    """Three normals, the last of which is impossible; its data would cost infinitely much."""

    def __init__(self):
        super().__init__()
        self.loc, self.logits = nn.Parameter(torch.randn(3, PIXELS)), nn.Parameter(torch.tensor([0.0, 0.3, -2000.0]))

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(self.loc[z], 1.0).to_event(1), obs=x)


class Responsibilities(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.impossible = nn.Linear(PIXELS, 3), torch.tensor([0.0, 0.0, -2000.0])

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            logits = self.net(x) + self.impossible
            pyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})


@pytest.mark.parametrize("guided", [True, False])
def test_sums_over_states_are_captured(guided):
    found = []
    for kind in (SVI, plain):
        torch.manual_seed(0)
        model, guide = Mixture(), Responsibilities() if guided else nn.Identity()
        svi = kind(model, guide, shared(model, guide), pyro.infer.TraceEnum_ELBO(max_plate_nesting=1))
        found.append((losses(svi, batches(5)), parameters(svi)))
        assert getattr(svi, "why_eager", None) is None
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)
    assert torch.isfinite(found[0][0]).all()


def test_noise_is_fresh_reproducible_and_distributed_as_in_eager_steps():
    xs = batches(1) * 600
    still = {"rate": 0.0}
    found = losses(vae_svi(plain, ELBO(), **still), xs)
    assert len(found.unique()) == len(found)
    assert torch.equal(found, losses(vae_svi(plain, ELBO(), **still), xs))
    eager = losses(vae_svi(SVI, ELBO(), **still), xs, seed=9)
    assert ks_2samp(found, eager).pvalue > 1e-3
    assert ks_2samp(found, 1.05 * eager).pvalue < 1e-3


def test_resume_is_exact():
    xs = batches(8)
    whole = vae_svi(plain, ELBO())
    first = losses(whole, xs[:4])
    state = {n: {k: t.clone() for k, t in p.state_dict().items()} for n, p in vars(whole).items() if n in NAMES}
    kept = {name: tensor.clone() for name, tensor in whole.optim.tensors().items()}
    noise = rng_state()
    rest = _continue(whole, xs[4:])

    resumed = vae_svi(plain, ELBO(), seed=5)
    for name, tensors in state.items():
        getattr(resumed, name).load_state_dict(tensors)
    resumed.optim.load_tensors({name: tensor.clone() for name, tensor in kept.items()})
    set_rng_state(noise)
    assert torch.equal(_continue(resumed, xs[4:]), rest)
    assert torch.equal(parameters(resumed), parameters(whole))

    set_rng_state(noise)  # the same object goes back to where it was
    for name, tensors in state.items():
        getattr(whole, name).load_state_dict(tensors)
    whole.optim.load_tensors(kept)
    assert torch.equal(_continue(whole, xs[4:]), rest)
    assert not torch.equal(first, rest)


NAMES = ("model", "guide")


def _continue(svi, xs):
    with validation(False):
        return torch.stack([svi.step(x) for x in xs])


class Model(nn.Module):
    """A linear model that does what it is told beside its sampling."""

    def __init__(self, quirk):
        super().__init__()
        self.decoder, self.quirk, self.calls = nn.Linear(2, PIXELS), quirk, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            logits = self.decoder(z) + self.quirk(self, z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def count_calls(model, z):
    model.calls += 1
    return 0.0


def replace_buffer(model, z):
    model.seen = model.seen + 1
    return 0.0


def flip(model, z):
    return z[:, :1] if random.random() < 0.5 else z[:, :1].exp()


def alternate(model, z):
    model.turn = [*getattr(model, "turn", []), 0]
    return z[:, :1] if len(model.turn) % 2 else z[:, :1].exp()


QUIRKS = {
    "host": (lambda model, z: float(z.detach().sum()), "on the host"),
    "branch": (lambda model, z: 1.0 if z.sum() > 0 else 0.0, "on the host"),
    "mask": (lambda model, z: z[z > 0].sum(), "depends on the values"),
    "python noise": (flip, "Python's or numpy's generator"),
    "alternation": (alternate, "differ from call to call"),
    "count": (count_calls, "'calls' is replaced"),
    "buffer": (replace_buffer, "'seen' is replaced"),
}


@pytest.mark.parametrize("name", QUIRKS)
def test_what_cannot_be_captured_runs_eagerly_and_says_why(name, caplog):
    random.seed(3)
    quirk, reason = QUIRKS[name]
    torch.manual_seed(0)
    model, guide = Model(quirk), pair()[1]
    svi = CompiledSVI(model, guide, shared(model, guide), ELBO())
    before = parameters(svi)
    with caplog.at_level(logging.WARNING):
        found = losses(svi, batches(3))
    assert reason in svi.why_eager
    assert [record.getMessage() for record in caplog.records] == [f"steps run eagerly: {svi.why_eager}"]
    assert "\n" not in caplog.records[0].getMessage()
    assert torch.isfinite(found).all()
    assert not torch.equal(parameters(svi), before)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (pyro.infer.TraceGraph_ELBO(), "TraceGraph_ELBO takes gradients in its own loss_and_grads"),
        (pyro.infer.RenyiELBO(alpha=0.5, num_particles=2), "RenyiELBO takes gradients in its own loss_and_grads"),
    ],
)
def test_estimators_that_read_the_device_run_eagerly(loss, reason):
    svi = vae_svi(plain, loss)
    expected = losses(vae_svi(SVI, loss), batches(3))
    assert torch.equal(losses(svi, batches(3)), expected)
    assert reason in svi.why_eager


def test_optimizers_without_a_rule_run_eagerly():
    svi = vae_svi(plain, ELBO(), factory=torch.optim.Adadelta)
    losses(svi, batches(3))
    assert svi.why_eager.startswith("Adadelta has no rule; those with one: Adam")


def test_state_written_in_place_is_kept():
    def count(model, z):
        model.seen.add_(1)
        return 0.01 * model.seen

    found = []
    for kind in (SVI, plain):
        torch.manual_seed(0)
        model, guide = Model(count), pair()[1]
        svi = kind(model, guide, shared(model, guide), ELBO(max_plate_nesting=1))
        found.append((losses(svi, batches(5)), float(model.seen)))
        assert getattr(svi, "why_eager", None) is None
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=0)
    assert found[0][1] == 5


class Weighted(ELBO):
    """An ELBO whose weight is a plain number that changes."""

    weight = 1.0

    def __init__(self):
        super().__init__()
        self.weight = 1.0

    def at(self, progress):
        self.weight = 1.0 - progress

    def from_particles(self, draws):
        return (draws.log_likelihood - self.weight * (draws.log_q - draws.log_prior)).mean(0)


def test_numbers_that_change_are_never_stale(monkeypatch):
    """A plain number costs a graph for each of its values, and in the end the compiled steps."""
    monkeypatch.setattr(compiled_module, "MAX_GRAPHS", 3)
    xs = batches(6)
    svi = vae_svi(plain, Weighted())
    torch.testing.assert_close(losses(svi, xs), losses(vae_svi(SVI, Weighted()), xs), rtol=1e-10, atol=0)
    assert "'weight' changes from step to step" in svi.why_eager


def test_frozen_parameters_stay():
    svi, eager = vae_svi(plain, ELBO()), vae_svi(SVI, ELBO())
    for engine in (svi, eager):
        losses(engine, batches(3))
        for p in engine.model.parameters():
            p.requires_grad_(False)
        losses(engine, batches(3), seed=2)
    assert svi.why_eager is None
    torch.testing.assert_close(parameters(svi), parameters(eager), rtol=1e-9, atol=1e-11)


def test_batches_of_other_sizes_can_stay_eager():
    model, guide = pair()
    svi = CompiledSVI(model, guide, shared(model, guide), ELBO(), batch_size=4, inductor=False)
    xs = [*batches(4, last=3), *batches(3, last=2)]
    torch.testing.assert_close(losses(svi, xs), losses(vae_svi(SVI, ELBO()), xs), rtol=1e-10, atol=0)
    assert len(svi._graphs) == 1


def test_without_a_compiler_steps_run_eagerly(caplog):
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    svi = vae_svi(CompiledSVI, IWAE(3))
    broken = config.patch({"cpp.cxx": ("/nonexistent/g++",)})  # and nothing compiled before is there to be found
    with fresh_cache(), broken, caplog.at_level(logging.WARNING):
        found = losses(svi, batches(3))
    assert "the compiler failed" in svi.why_eager
    assert len(caplog.records) == 1
    assert torch.equal(found, losses(vae_svi(SVI, IWAE(3)), batches(3)))


@pytest.mark.gpu
@pytest.mark.parametrize("inductor", [True, False])
def test_cuda_graph_follows_eager_training(inductor):
    found = []
    for kind in (SVI, lambda *parts: CompiledSVI(*parts, inductor=inductor)):
        model, guide = (program.cuda() for program in pair())
        svi = kind(model, guide, shared(model, guide, clip=0.5), AnnealedELBO().cuda())
        found.append(losses(svi, [x.cuda() for x in batches(6, last=3)], rates=RATES))
        assert getattr(svi, "why_eager", None) is None
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=0)


@pytest.mark.slow
def test_digits_end_at_the_bound_of_eager_training(tmp_path):
    """One seed under both engines lies far closer than two seeds do; the untrained model is elsewhere."""
    from inference.config import load
    from inference.console import Console
    from inference.experiment import train

    torch.set_default_dtype(torch.float32)

    def bound(seed: int, **options: str) -> float:
        folder = tmp_path / "-".join([str(seed), *options.values()])
        given = {"trainer.steps": "400", "evaluation.particles": "20", "evaluation.data": "100", **options}
        arguments = [f"{name}={value}" for name, value in given.items()]
        train(load([f"seed={seed}", f"run.dir={folder}", "trainer.validations=0", *arguments]), Console())
        return json.loads((folder / "summary.json").read_text())["test/elbo"]

    compiled, eager, other = bound(0, **{"trainer.engine": "compiled"}), bound(0), bound(1)
    untrained = bound(0, **{"trainer.steps": "1"})
    assert abs(compiled - eager) < 0.1 * abs(other - eager)
    assert untrained < eager - 5


class Idiomatic(StockVAE):
    """Pyro's usual shape: the programs are methods, and a number, a mode and buffers change along the training."""

    def __init__(self):
        super().__init__()
        self.beta, self.norm = 1.0, nn.BatchNorm1d(PIXELS)
        self.noise = nn.Dropout(0.5)

    def guide(self, x):
        with pyro.poutine.scale(scale=self.beta):
            super().guide(self.noise(self.norm(x)))


@pytest.mark.parametrize("wrapped", [lambda f: f, lambda f: partial(f), lambda f: lambda x: f(x)])
def test_what_methods_and_closures_work_on_is_watched(wrapped):
    def train(kind):
        vae, values = Idiomatic(), []
        svi = kind(wrapped(vae.model), wrapped(vae.guide), pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        for step, x in enumerate(batches(9)):
            vae.beta = 1.0 if step < 3 else 0.5
            vae.train(step < 6)
            values.append(float(svi.step(x)))
        assert vae.norm.num_batches_tracked == 6
        return svi, (torch.tensor(values), vae.norm.running_mean, vae.norm.running_var)

    assert ours_is_pyros(train) > 0
