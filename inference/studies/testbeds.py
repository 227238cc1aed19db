"""Small programs whose exact gradients are known, to hold estimators against."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from models.ppca import PPCA


class BitModel(PyroModule):
    """B fair bits and an affine Bernoulli decoder: 2^B states, so that every expectation is a finite sum."""

    def __init__(self, event_shape: Sequence[int], bits: int) -> None:
        super().__init__()
        self.bits, self.event_shape = bits, torch.Size(event_shape)
        self.decoder = nn.Linear(bits, self.event_shape.numel())

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((self.bits,), 0.5)).to_event(1))
            pyro.sample("x", self.likelihood(z), obs=x)

    def likelihood(self, z: Tensor) -> dist.Distribution:
        """p(x|z) for bits ``(*batch, B)``."""
        logits = self.decoder(z).unflatten(-1, self.event_shape)  # (*batch, D) -> (*batch, *event)
        return dist.Bernoulli(logits=logits).to_event(len(self.event_shape))


class BitGuide(PyroModule):
    """q(z|x): independent bits whose logits are affine in the datum."""

    def __init__(self, event_shape: Sequence[int], bits: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(torch.Size(event_shape).numel(), bits)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", self.posterior(x))

    def posterior(self, x: Tensor) -> dist.Distribution:
        """q(z|x) of data ``(N, *event_shape)``."""
        return dist.Bernoulli(logits=self.encoder(x.flatten(1))).to_event(1)


def enumerated_elbo(model: BitModel, guide: BitGuide, x: Tensor) -> Tensor:
    """The ELBO of each datum, ``(N,)`` nats, by summing over all states of the bits."""
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=x.dtype, device=x.device)] * model.bits)
    states = states.reshape(-1, 1, model.bits)  # (2^B, 1, B)
    log_q = guide.posterior(x).log_prob(states)  # (2^B, N)
    log_joint = model.likelihood(states).log_prob(x) - model.bits * torch.tensor(2.0).log()
    return (log_q.exp() * (log_joint - log_q)).sum(0)


def linear_elbo(model: PPCA, guide: nn.Module, x: Tensor) -> Tensor:
    """The ELBO of each datum, ``(N,)`` nats, of the linear-Gaussian model under a diagonal guide, in closed form.

    E_q log N(x; W z + mu, s^2 I) = -D/2 log(2 pi s^2) - (|x - mu - W m|^2 + sum_d v_d |W_d|^2) / 2 s^2.
    """
    q = guide.core(x).base_dist  # type: ignore[operator]
    p = model.likelihood
    residual = x.flatten(1) - p.loc - q.loc @ p.weight.T
    spread = (q.variance * p.weight.square().sum(0)).sum(1)
    variance = p.scale.square()
    size = residual.shape[1]
    reconstruction = (
        -0.5 * size * (2 * torch.pi * variance).log() - 0.5 * (residual.square().sum(1) + spread) / variance
    )
    kl = 0.5 * (q.variance + q.loc.square() - 1 - q.variance.log()).sum(1)
    return reconstruction - kl
