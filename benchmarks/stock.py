"""The same models as Pyro programs, written as Pyro's own tutorials do, for ``pyro.infer.SVI``."""

from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import torch
from pyro.distributions.transforms import ConditionalAffineAutoregressive
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn

from benchmarks import by_hand
from benchmarks.by_hand import FEATURES, FLOW_HIDDEN, FLOWS, LATENT, PARTICLES, PSEUDO_INPUTS


class VAE(by_hand.VAE):
    """A standard normal prior and a diagonal normal posterior."""

    def model(self, x: Tensor) -> None:
        """p(x, z)."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            zeros = x.new_zeros((x.shape[0], self.decoder[0].in_features))
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z|x)."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class IAF(VAE):
    """Pyro's conditional inverse autoregressive maps."""

    def __init__(self) -> None:
        super().__init__(outputs=2 * LATENT + FEATURES)
        orders = [torch.arange(LATENT), torch.arange(LATENT).flip(0)]
        self.maps = nn.ModuleList(
            ConditionalAffineAutoregressive(
                ConditionalAutoRegressiveNN(
                    LATENT, FEATURES, [FLOW_HIDDEN], permutation=orders[i % 2], nonlinearity=nn.ELU()
                )
            )
            for i in range(FLOWS)
        )

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        pyro.module("maps", self.maps)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale, features = self.encoder(x).split([LATENT, LATENT, FEATURES], -1)
            base = dist.Normal(loc, log_scale.exp()).to_event(1)
            maps = [transform.condition(features) for transform in self.maps]
            pyro.sample("z", dist.TransformedDistribution(base, maps))


class Vamp(VAE):
    """The prior as a mixture distribution of the encoder's outputs for learned inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.pseudo_inputs = nn.Parameter(torch.rand(PSEUDO_INPUTS, by_hand.PIXELS))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        pyro.module("encoder", self.encoder)
        inputs = pyro.param("pseudo_inputs", self.pseudo_inputs)
        loc, log_scale = self.encoder(inputs).chunk(2, -1)
        parts = dist.Normal(loc, log_scale.exp()).to_event(1)
        prior = dist.MixtureSameFamily(dist.Categorical(logits=x.new_zeros(PSEUDO_INPUTS)), parts)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


class Mixture(by_hand.Mixture):
    """The component is summed out by ``TraceEnum_ELBO``; there is nothing to guide."""

    def model(self, x: Tensor) -> None:
        """p(x, z)."""
        logits = pyro.param("logits", self.logits)
        loc, log_scale = pyro.param("loc", self.loc), pyro.param("log_scale", self.log_scale)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[z], log_scale.exp()[z]).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Empty."""


class VQ(by_hand.VQ):
    """Codes are no random variables here; the losses between them and their vectors are factors."""

    def model(self, x: Tensor) -> None:
        """The likelihood and the losses."""
        pyro.module("vq", self)
        with pyro.plate("data", x.shape[0]):
            z, losses = self.quantize(x)
            pyro.factor("losses", -losses)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Empty."""


PROGRAMS = {"vae": VAE, "iaf": IAF, "iwae": VAE, "vamp": Vamp, "gmm": Mixture, "vq": VQ}


def elbo(case: str, jit: bool = False) -> Any:
    """Pyro's own ELBO for a case, in the version that its jit traces if asked; None where Pyro has none."""
    if case == "iwae":
        options = {"num_particles": PARTICLES, "vectorize_particles": True, "max_plate_nesting": 1}
        return None if jit else pyro.infer.RenyiELBO(alpha=0, **options)
    if case == "gmm":
        if jit:
            return pyro.infer.JitTraceEnum_ELBO(max_plate_nesting=1, ignore_jit_warnings=True)
        return pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
    return pyro.infer.JitTrace_ELBO(ignore_jit_warnings=True) if jit else pyro.infer.Trace_ELBO()
