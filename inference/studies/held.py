"""The bound of a mixture or of probabilistic PCA under any guide, without sampling noise, and of one block alone.

An E half step moves the guide only, so that log p(x, z) of every datum is worked out once for all its gradient steps.
An M half step moves the model only, and sees the data through the statistics of the posteriors it is given.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor, nn

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
    """What variational EM climbs: the bound as a function of one block, of which the other is worked out once."""

    def half(self, kind: str, model: Any, guide: nn.Module, x: Tensor) -> tuple[Callable[[], Tensor], bool]:
        """See :class:`inference.ascent.VariationalEM`."""
        parts = x.split(CHUNK)
        if kind == "M":
            with torch.no_grad():
                statistics = reduce(added, [_statistics(model, guide, some) for some in parts])
            return lambda: (model.expected_log_joint(statistics) + statistics["entropy"]) / x.shape[0], False
        if isinstance(model, PPCA):
            return lambda: torch.stack([_bound_of_ppca(model, guide, some) for some in parts]).sum() / x.shape[0], True
        with torch.no_grad():
            joints = [model.log_joint(some) for some in parts]

        def bound() -> Tensor:
            pairs = zip(parts, joints, strict=True)
            return torch.stack([_bound(_probs(guide, some, joint), joint) for some, joint in pairs]).sum() / x.shape[0]

        return bound, True


def _standing(model: Any, guide: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(model, PPCA):
        return _bound_of_ppca(model, guide, x), model.log_evidence(x).sum()
    joint = _mixture(model).log_joint(x)
    return _bound(_probs(guide, x, joint), joint), joint.logsumexp(1).sum()


def _bound(probs: Tensor, joint: Tensor) -> Tensor:
    """E_q log p(x, z) + H(q), summed over the data, of ``(N, K)`` and ``(N, K)``."""
    return (probs * joint).sum() + torch.special.entr(probs).sum()


def _bound_of_ppca(model: PPCA, guide: nn.Module, x: Tensor) -> Tensor:
    statistics = _statistics(model, guide, x)
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
