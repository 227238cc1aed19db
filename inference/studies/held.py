"""The bound of a mixture or of probabilistic PCA under any guide without sampling noise, and half steps up it."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor, nn

from inference.ascent import ascend
from inference.em import added
from inference.particles import encode
from models.discrete import base_of
from models.one_hot_mixture import OneHotMixture
from models.ppca import PPCA
from models.tractable import Statistics

CHUNK = 4096  # data at a time


@torch.no_grad()
def standing(model: Any, guide: nn.Module, x: Tensor) -> tuple[float, float]:
    """The bound under the guide, by a sum over states or a Gaussian integral, and log p(x); nats per datum.

    Relaxed guides are taken as the discrete distributions that they relax.
    """
    guide.eval()
    try:
        pairs = [_standing(model, guide, some) for some in x.split(CHUNK)]
    finally:
        guide.train()
    bound, log_p = torch.stack([torch.stack(pair).double() for pair in pairs]).sum(0).tolist()
    return bound / x.shape[0], log_p / x.shape[0]


@torch.no_grad()
def log_evidence(model: Any, x: Tensor) -> float:
    """log p(x) in nats per datum."""
    return float(torch.cat([model.log_evidence(some) for some in x.split(CHUNK)]).mean())


class HeldELBO:
    """What variational EM climbs, half step by half step: the guide by gradient steps, the model to its maximum.

    An E half step works log p(x, z) of every datum out once for all its gradient steps; an M half step is that of EM,
    of the guide's q in place of the posterior.
    """

    def half_step(self, kind: str, model: Any, guide: nn.Module, x: Tensor, steps: int) -> tuple[Tensor, float]:
        """See :class:`inference.ascent.VariationalEM`."""
        parts = x.split(CHUNK)
        if kind == "M":
            with torch.no_grad():
                statistics = reduce(added, [_statistics(model, guide, some) for some in parts])
                model.m_step(statistics)
                return _free_energy(model, statistics) / x.shape[0], 1
        bounds = [_held(model, guide, some) for some in parts]
        evaluations = 0

        def bound() -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return torch.stack([each() for each in bounds]).sum() / x.shape[0]

        return ascend(guide.parameters(), bound, steps), evaluations


def _held(model: Any, guide: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The bound, summed over the data, as a function of the guide."""
    if isinstance(model, PPCA):
        return lambda: _free_energy(model, _statistics(model, guide, x))
    with torch.no_grad():
        joint = model.log_joint(x)
    return lambda: _bound(_probs(guide, x, joint), joint)


def _standing(model: Any, guide: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(model, PPCA):
        return _free_energy(model, _statistics(model, guide, x)), model.log_evidence(x).sum()
    joint = _mixture(model).log_joint(x)
    return _bound(_probs(guide, x, joint), joint), joint.logsumexp(1).sum()


def _bound(probs: Tensor, joint: Tensor) -> Tensor:
    """E_q log p(x, z) + H(q), summed over the data, of ``(N, K)`` and ``(N, K)``."""
    return (probs * joint).sum() + torch.special.entr(probs).sum()


def _free_energy(model: Any, statistics: Statistics) -> Tensor:
    """The same of the statistics under q."""
    return model.expected_log_joint(statistics) + statistics["entropy"]


def _statistics(model: Any, guide: nn.Module, x: Tensor) -> Statistics:
    if isinstance(model, PPCA):
        q: Any = encode(guide, x)["z"]
        factors = q.scale_tril if isinstance(q, MultivariateNormal) else torch.diag_embed(q.stddev)
        return model.statistics(x, q.mean, factors.expand(x.shape[0], -1, -1))
    mixture = _mixture(model)
    return mixture.statistics(x, _probs(guide, x, x.new_empty(x.shape[0], mixture.num_states)))


def _probs(guide: nn.Module, x: Tensor, like: Tensor) -> Tensor:
    """q(z|x), ``(N, K)``."""
    q: Any = base_of(encode(guide, x)["z"])
    return q.probs.reshape(-1, like.shape[1]).expand_as(like)  # (N, 1, K) -> (N, K), of one q for all (1, K)


def _mixture(model: Any) -> Any:
    return model.mixture if isinstance(model, OneHotMixture) else model
