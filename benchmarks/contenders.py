"""The same variational autoencoder, trained in different ways.

784-200-200-50 and back, tanh, Bernoulli pixels, a diagonal normal posterior, one draw for each datum, Adam at 1e-3.
Each contender takes one optimization step for each batch that it is given.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIXELS, HIDDEN, LATENT, RATE, RUNS = 784, 200, 50, 1e-3, 8
Steps = Callable[[Sequence[Tensor]], Any]


def net(fan_in: int, fan_out: int) -> nn.Sequential:
    """Two hidden layers."""
    hidden = [nn.Linear(fan_in, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, fan_out))


class HandWritten(nn.Module):
    """What one writes without a library; the loss is summed over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = net(PIXELS, 2 * LATENT), net(LATENT, PIXELS)

    def forward(self, x: Tensor) -> Tensor:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        kl = 0.5 * (loc.square() + (2 * log_scale).exp() - 2 * log_scale - 1).sum()
        return F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum") + kl


def hand_written(compile: bool = False) -> Steps:
    """PyTorch by hand with fused Adam; the net under torch.compile if asked."""
    vae = HandWritten()
    optimizer = torch.optim.Adam(vae.parameters(), lr=RATE, fused=True)
    forward = torch.compile(vae) if compile else vae

    def steps(batches: Sequence[Tensor]) -> None:
        for x in batches:
            forward(x).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return steps


class Stock(nn.Module):
    """A Pyro model and guide as Pyro's own tutorial writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = net(PIXELS, 2 * LATENT), net(LATENT, PIXELS)

    def model(self, x: Tensor) -> None:
        """p(x, z)."""
        import pyro
        import pyro.distributions as dist

        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            zeros = x.new_zeros((x.shape[0], LATENT))
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z|x)."""
        import pyro
        import pyro.distributions as dist

        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def stock_pyro(jit: bool = False, validate: bool = False) -> Steps:
    """Pyro's SVI with Pyro's ELBO and optimizer."""
    import pyro
    import pyro.infer
    import pyro.optim

    vae, own_store = Stock(), type(pyro.get_param_store())()
    elbo = pyro.infer.JitTrace_ELBO(ignore_jit_warnings=True) if jit else pyro.infer.Trace_ELBO()
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": RATE}), elbo)

    def steps(batches: Sequence[Tensor]) -> None:
        # a store of one's own, for others may train parameters of the same names; as Pyro comes, not as set up here
        with (
            _param_store(own_store),
            pyro.settings.context(module_local_params=False),
            pyro.validation_enabled(validate),
        ):
            for x in batches:
                svi.step(x)

    return steps


class _param_store:
    """Pyro's global store of parameters replaced by another."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *error: Any) -> None:
        self._swap()

    def _swap(self) -> None:
        import pyro

        current = pyro.get_param_store()
        current.__dict__, self.store.__dict__ = self.store.__dict__, current.__dict__


def parts(seed: int = 0) -> tuple[Any, Any, Any]:
    from guides.amortized import Amortized
    from guides.gaussian import DiagonalNormal
    from inference.engine import SharedOptimizer
    from models.latent import LatentVariableModel
    from models.likelihoods import Bernoulli
    from models.nets import MLP
    from models.priors import StandardNormal

    torch.manual_seed(seed)
    make = partial(MLP, hidden=(HIDDEN, HIDDEN))
    model = LatentVariableModel(StandardNormal((LATENT,)), Bernoulli((PIXELS,), (LATENT,), make))
    guide = Amortized(DiagonalNormal((LATENT,), (PIXELS,), make))
    adam = partial(torch.optim.Adam, fused=True)
    return model, guide, SharedOptimizer([*model.parameters(), *guide.parameters()], adam, RATE)


def ours(engine: str = "eager", pyro_loss: bool = False) -> Steps:
    """This project's SVI; with Pyro's Trace_ELBO if asked, else with its own ELBO."""
    import pyro.infer

    from inference.compiled import CompiledSVI
    from inference.engine import SVI
    from inference.objectives import ELBO
    from inference.particles import validation

    model, guide, optimizer = parts()
    kind = CompiledSVI if engine == "compiled" else SVI
    svi = kind(model, guide, optimizer, pyro.infer.Trace_ELBO() if pyro_loss else ELBO())

    def steps(batches: Sequence[Tensor]) -> None:
        with validation(False):
            for x in batches:
                svi.step(x)
        if why := getattr(svi, "why_eager", None):
            raise RuntimeError(f"not compiled: {why}")

    return steps


def together() -> Steps:
    """Several runs in one compiled step; a step of all of them for each batch."""
    from inference.compiled import CompiledSVI
    from inference.objectives import ELBO
    from inference.particles import validation
    from inference.vectorized import VectorizedSVI

    runs = [CompiledSVI(*parts(seed), ELBO()) for seed in range(RUNS)]
    svi = VectorizedSVI(runs, [torch.Generator().manual_seed(seed) for seed in range(RUNS)])

    def steps(batches: Sequence[Tensor]) -> None:
        with validation(False):
            for x in batches:
                svi.step([x] * RUNS)
        if svi.why_eager:
            raise RuntimeError(f"not together: {svi.why_eager}")

    return steps


CONTENDERS: dict[str, Callable[[], Steps]] = {
    "PyTorch by hand, fused Adam": hand_written,
    "PyTorch by hand, torch.compile": partial(hand_written, compile=True),
    "Pyro SVI, Trace_ELBO": stock_pyro,
    "Pyro SVI, Trace_ELBO, validation on (its default)": partial(stock_pyro, validate=True),
    "Pyro SVI, JitTrace_ELBO": partial(stock_pyro, jit=True),
    "ours, eager": ours,
    "ours, eager, Pyro's Trace_ELBO": partial(ours, pyro_loss=True),
    "ours, compiled": partial(ours, "compiled"),
    "ours, compiled, Pyro's Trace_ELBO": partial(ours, "compiled", pyro_loss=True),
    f"ours, {RUNS} runs in one step, for each": together,
}
RUNS_IN = {f"ours, {RUNS} runs in one step, for each": RUNS}
if importlib.util.find_spec("numpyro"):
    from benchmarks.numpyro_contender import numpyro_scan, numpyro_update

    CONTENDERS["NumPyro SVI, jitted update"] = numpyro_update
    CONTENDERS["NumPyro SVI, lax.scan"] = numpyro_scan
