"""Places where gradients are measured: a model, a guide, data, and the exact answers that are known there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from guides.amortized import Amortized
from guides.discrete import BernoulliBits
from guides.enumerated import Enumerated
from guides.gaussian import DiagonalNormal
from guides.relaxed import MeanPathBernoulliBits, RelaxedBernoulliBits
from inference.thermodynamic import TVO
from models.discrete import UniformBits
from models.latent import LatentVariableModel
from models.likelihoods import Bernoulli
from models.nets import Linear
from models.ppca import PPCA

Exact = Callable[[], Tensor]
DRAWN = "drawn"  # the guide as it is, where a testbed has others with the same parameters
TEMPERATURES = {"relaxed, cool": (0.3, False), "relaxed": (1.0, False), "straight-through": (1.0, True)}


@dataclass(frozen=True)
class Testbed:
    """A model, one or more guides with the same parameters in the same order, and data ``(N, *event_shape)``.

    ``exact`` gives, by the name of a target, a sum over latents in closed form, ``(N,)`` nats, whose gradient in the
    guide, and but for the wake phase's in the model, is the exact one.
    """

    where: str
    model: nn.Module
    guides: Mapping[str, nn.Module]
    x: Tensor
    exact: Mapping[str, Exact] = field(default_factory=dict)

    @property
    def guide(self) -> nn.Module:
        return self.guides[DRAWN]

    @property
    def discrete(self) -> bool:
        return len(self.guides) > 1


# --- Normal latents, affine nets: all is in closed form -----------------------------------------------------------


def linear_testbed(x: Tensor, latent_dim: int = 4) -> Testbed:
    """Probabilistic PCA under a diagonal guide with an affine encoder; data ``(N, *event_shape)`` are flattened."""
    flat = x.flatten(1) - x.flatten(1).mean(0)
    model = PPCA(flat.shape[1:], latent_dim).to(x)
    guide = Amortized(DiagonalNormal((latent_dim,), flat.shape[1:], Linear)).to(x)
    exact = {
        "ELBO": lambda: linear_elbo(model, guide, flat),
        "TVO": lambda: thermodynamic(lambda b: tempered_log_weight(model, guide, flat, b)),
        "wake": lambda: linear_wake(model, guide, flat),
    }
    return Testbed("linear-Gaussian", model, {DRAWN: guide}, flat, exact)


def linear_elbo(model: PPCA, guide: nn.Module, x: Tensor) -> Tensor:
    """The ELBO of each datum, ``(N,)`` nats, of the linear-Gaussian model under a diagonal guide, in closed form."""
    return tempered_log_weight(model, guide, x, 0.0)


def tempered_log_weight(model: PPCA, guide: nn.Module, x: Tensor, b: float) -> Tensor:
    """The mean of log p(x, z)/q(z|x) under the normal in proportion to q(z|x)^(1-b) p(x, z)^b, ``(N,)`` nats."""
    q, p = guide.core(x).base_dist, model.likelihood  # type: ignore[operator]
    mean, covariance = _tempered(model, q.loc, q.variance, x, b)
    own = covariance.diagonal(dim1=-2, dim2=-1)  # (N, Q)
    residual = x.flatten(1) - p.loc - mean @ p.weight.T
    spread = torch.einsum("dq,nqr,dr->n", p.weight, covariance, p.weight)
    size = residual.shape[1]
    reconstruction = -0.5 * size * (2 * torch.pi * p.scale.square()).log()
    reconstruction = reconstruction - 0.5 * (residual.square().sum(1) + spread) / p.scale.square()
    log_prior = -0.5 * (mean.square() + own + torch.tensor(2 * torch.pi).log()).sum(1)
    return reconstruction + log_prior - _mean_log_q(q.loc, q.variance, mean, own)


def linear_wake(model: PPCA, guide: nn.Module, x: Tensor) -> Tensor:
    """The mean of log q(z|x) under the posterior p(z|x), which is held constant, ``(N,)`` nats."""
    q = guide.core(x).base_dist  # type: ignore[operator]
    mean, covariance = _tempered(model, q.loc, q.variance, x, 1.0)
    return _mean_log_q(q.loc, q.variance, mean.detach(), covariance.diagonal(dim1=-2, dim2=-1).detach())


def _tempered(model: PPCA, loc: Tensor, variance: Tensor, x: Tensor, b: float) -> tuple[Tensor, Tensor]:
    """Mean ``(N, Q)`` and covariance ``(N, Q, Q)`` of the normal between q and the posterior."""
    weight, noise = model.likelihood.weight, model.likelihood.scale.square()
    identity = torch.eye(weight.shape[1], dtype=x.dtype, device=x.device)
    precision = (1 - b) * torch.diag_embed(1 / variance) + b * (identity + weight.T @ weight / noise)
    pull = (1 - b) * loc / variance + b * (x.flatten(1) - model.likelihood.loc) @ weight / noise
    covariance = torch.linalg.inv(precision)
    return torch.einsum("nqr,nr->nq", covariance, pull), covariance


def _mean_log_q(loc: Tensor, variance: Tensor, mean: Tensor, own: Tensor) -> Tensor:
    return -0.5 * ((2 * torch.pi * variance).log() + ((mean - loc).square() + own) / variance).sum(1)


# --- Bits: all is a finite sum ------------------------------------------------------------------------------------


def bits_testbed(x: Tensor, steps: int, batch_size: int, bits: int = 6, learning_rate: float = 0.01) -> Testbed:
    """A few bits with affine nets, after so many steps along the exact gradient.

    The measured data are the first ``batch_size`` rows of ``x``. Beside the guide that draws bits there are ones that
    relax them and one whose states are summed over, with the same net.
    """
    data = (x > x.mean()).to(x)
    shape = data.shape[1:]
    model = LatentVariableModel(UniformBits((bits,)), Bernoulli(shape, (bits,), Linear)).to(x)
    core = BernoulliBits((bits,), shape, Linear).to(x)
    guides: dict[str, nn.Module] = {DRAWN: Amortized(core), "enumerated": Enumerated(core)}
    for name, (temperature, hard) in TEMPERATURES.items():
        relaxed = RelaxedBernoulliBits((bits,), shape, Linear, hard, temperature, min(temperature, 0.5)).to(x)
        relaxed.net = core.net
        guides[name] = Amortized(relaxed)
    of_means = MeanPathBernoulliBits((bits,), shape, Linear).to(x)
    of_means.net = core.net
    guides["straight-through, of the mean"] = Amortized(of_means)
    train_exactly(model, guides[DRAWN], data, steps, batch_size, learning_rate)
    measured = data[:batch_size]
    exact = {
        "ELBO": lambda: enumerated_elbo(model, guides[DRAWN], measured),
        "TVO": lambda: enumerated_tvo(model, guides[DRAWN], measured),
        "wake": lambda: enumerated_wake(model, guides[DRAWN], measured),
    }
    return Testbed(f"{bits} Bernoulli bits after {steps:,} steps", model, guides, measured, exact)


def train_exactly(
    model: nn.Module, guide: nn.Module, x: Tensor, steps: int, batch_size: int, learning_rate: float
) -> None:
    """Adam along the gradient of the enumerated ELBO, batch after batch."""
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=learning_rate)
    batches = x.split(batch_size)
    for step in range(steps):
        optimizer.zero_grad()
        (-enumerated_elbo(model, guide, batches[step % len(batches)]).mean()).backward()
        optimizer.step()


def enumerated_elbo(model: nn.Module, guide: nn.Module, x: Tensor) -> Tensor:
    """The ELBO of each datum, ``(N,)`` nats, by summing over all states of the bits."""
    log_q, log_joint = _states(model, guide, x)
    return (log_q.exp() * (log_joint - log_q)).sum(0)


def enumerated_tvo(model: nn.Module, guide: nn.Module, x: Tensor) -> Tensor:
    """The thermodynamic objective of each datum without sampling, ``(N,)`` nats."""
    log_q, log_joint = _states(model, guide, x)
    log_weight = log_joint - log_q
    return thermodynamic(lambda b: ((log_q + b * log_weight).softmax(0) * log_weight).sum(0))


def enumerated_wake(model: nn.Module, guide: nn.Module, x: Tensor) -> Tensor:
    """The mean of log q(z|x) under the posterior p(z|x), which is held constant, ``(N,)`` nats."""
    log_q, log_joint = _states(model, guide, x)
    return (log_joint.softmax(0).detach() * log_q).sum(0)


def _states(model: nn.Module, guide: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """log q(z|x) and log p(x, z) of every state, ``(S, N)`` nats."""
    q = guide.core(x)  # type: ignore[operator]
    states = q.enumerate_support(expand=False)  # (S, 1, B)
    log_joint = model.likelihood(states).log_prob(x) + model.prior().log_prob(states)  # type: ignore[operator]
    return q.log_prob(states), log_joint


def thermodynamic(mean_log_weight: Callable[[float], Tensor], objective: TVO | None = None) -> Tensor:
    """A Riemann sum of exact tempered means, at the temperatures of :class:`~inference.thermodynamic.TVO`."""
    objective = objective or TVO()
    pairs: Sequence[tuple[float, float]] = list(
        zip(objective.temperatures.tolist(), objective.widths.tolist(), strict=True)
    )
    return torch.stack([width * mean_log_weight(b) for b, width in pairs]).sum(0)
