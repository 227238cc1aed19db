"""Mixtures whose latent is a one-hot vector, so that guides that draw or relax such vectors can infer it."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from models.conditional import Conditional
from models.discrete import OneHots, joint
from models.gmm import GaussianMixture
from models.latent import LatentVariableModel
from models.mixture import FiniteMixture


class Chosen(dist.TorchDistribution):
    """p(x|z) of a mixture for one-hot z: log p(x|z) = sum_k z_k log p(x|k), and what is linear in between.

    Args:
        mixture: its components.
        z: ``(*batch, 1, K)``.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.real

    def __init__(self, mixture: FiniteMixture, z: Tensor, validate_args: bool | None = None) -> None:
        self.mixture, self.z = mixture, z
        super().__init__(z.shape[:-2], mixture.event_shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Chosen":
        return Chosen(self.mixture, self.z.expand(*batch_shape, *self.z.shape[-2:]))

    def log_prob(self, x: Tensor) -> Tensor:
        """``(*batch, *event_shape) -> (*batch,)`` nats."""
        flat = x.reshape(-1, self.event_shape.numel())  # (*batch, *event) -> (B, D)
        each = self.mixture.log_likelihood(flat).reshape(*x.shape[: x.dim() - len(self.event_shape)], -1)
        return (self.z.squeeze(-2) * each).sum(-1)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self._component().sample(sample_shape)

    @property
    def mean(self) -> Tensor:
        return self._component().mean

    def _component(self) -> dist.TorchDistribution:
        return self.mixture.component(self.z.squeeze(-2).argmax(-1))


class _Weights(Conditional):
    """p(z) of a mixture over one-hot vectors ``(1, K)``."""

    def __init__(self, mixture: FiniteMixture) -> None:
        super().__init__((1, mixture.num_states))
        self.mixture = mixture

    def forward(self, *context: Tensor) -> dist.Distribution:
        return joint(OneHots(self.mixture.logits.unsqueeze(0)), 2)


class _Components(Conditional):
    """p(x|z) of a mixture given one-hot vectors ``(1, K)``."""

    def __init__(self, mixture: FiniteMixture) -> None:
        super().__init__(mixture.event_shape, (1, mixture.num_states))
        self.mixture = mixture

    def forward(self, *context: Tensor) -> dist.Distribution:
        return Chosen(self.mixture, context[0])


class OneHotMixture(LatentVariableModel):
    """The same p(x) as a finite mixture's, with a one-hot latent ``(1, K)``.

    Args:
        mixture: whose parameters it has.
    """

    def __init__(self, mixture: FiniteMixture) -> None:
        super().__init__(_Weights(mixture), _Components(mixture))
        self.mixture = mixture

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) in nats, ``(N,)``."""
        return self.mixture.log_evidence(x)


def one_hot_gmm(
    event_shape: Sequence[int], components: int = 3, covariance: str = "full", ridge: float = 0.0
) -> OneHotMixture:
    """model=gmm with a one-hot latent, for guides that draw or relax one: onehot, concrete, straight_through."""
    return OneHotMixture(GaussianMixture(event_shape, components, covariance, ridge))
