"""Finite mixtures: one categorical latent per datum, summed out exactly."""

from collections.abc import Sequence
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F

from models.nets import batch_shape
from models.tractable import DegenerateError, Statistics


class FiniteMixture(PyroModule):
    """p(x) = sum_k weight_k p(x|z=k); leaves define the components.

    One Pyro program, with a latent site ``z`` and an observed site ``x`` in a plate ``data`` at dim -1, serves
    enumeration by guide or model, sampling, and EM (:class:`models.tractable.EMModel`).

    Args:
        event_shape: shape of one datum; components see it flattened to D numbers.
        states: number of components, K.
    """

    e_step_guide: ClassVar[str] = "enumerated_exact"

    def __init__(self, event_shape: Sequence[int], states: int) -> None:
        super().__init__()
        if states < 1:
            raise ValueError(f"a mixture has at least one component, got {states}")
        self.event_shape, self.num_states = torch.Size(event_shape), states
        self.logits = nn.Parameter(torch.zeros(states))

    def component(self, z: Tensor) -> dist.TorchDistribution:
        """p(x|z) for states ``(*batch)``: batch shape ``batch``, event shape :attr:`event_shape`."""
        raise NotImplementedError

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log p(x|z) of flat data ``(N, D)`` under every state, ``(N, K)`` nats."""
        raise NotImplementedError

    def component_statistics(self, x: Tensor, q: Tensor) -> Statistics:
        """Sums over flat data ``(N, D)`` weighted by ``q`` (N, K)."""
        raise NotImplementedError

    def expected_log_likelihood(self, statistics: Statistics) -> Tensor:
        """E_q log p(x|z), nats summed over the data, ``()``."""
        raise NotImplementedError

    def fit_components(self, statistics: Statistics) -> None:
        """The M step of everything but the weights."""
        raise NotImplementedError

    @property
    def weights(self) -> Tensor:
        """p(z), ``(K,)``."""
        return self.logits.softmax(0)

    @property
    def numbers_per_datum(self) -> int:
        """About how many numbers an E step makes for each datum."""
        return 4 * (self.num_states + self.event_shape.numel())

    def forward(self, x: Tensor) -> Tensor:
        """Run the program on data ``(N, *event_shape)``; returns the states, ``(..., N)``."""
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=self.logits))
            pyro.sample("x", self.component(z), obs=x)
        return z

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, z) for every state, ``(N, *event_shape) -> (N, K)`` nats."""
        return self.log_likelihood(self._flat(x)) + self.logits.log_softmax(0)

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) in nats, ``(N,)``."""
        return self.log_joint(x).logsumexp(1)

    def posterior(self, x: Tensor) -> dist.Categorical:
        """p(z|x), the responsibilities; batch shape ``(N,)``."""
        return dist.Categorical(logits=self.log_joint(x))

    def sample_posterior(self, x: Tensor) -> Tensor:
        """A guide program that draws ``z`` from p(z|x)."""
        with pyro.plate("data", x.shape[0], dim=-1):
            return pyro.sample("z", self.posterior(x))

    @torch.no_grad()
    def e_step(self, x: Tensor, hard: bool = False) -> tuple[Statistics, Tensor]:
        """See :class:`models.tractable.EMModel`."""
        x = self._flat(x)
        log_joint = self.log_likelihood(x) + self.logits.log_softmax(0)
        if hard:
            best, state = log_joint.max(1)
            return self._statistics(x, F.one_hot(state, self.num_states).to(x.dtype)), best
        evidence = log_joint.logsumexp(1)
        return self._statistics(x, (log_joint - evidence.unsqueeze(1)).exp_()), evidence

    @torch.no_grad()
    def statistics(self, x: Tensor, q: Tensor) -> Statistics:
        """Statistics of data ``(N, *event_shape)`` under any q(z|x), rows of probabilities ``(N, K)``."""
        return self._statistics(self._flat(x), q)

    def _statistics(self, x: Tensor, q: Tensor) -> Statistics:
        count, entropy = q.sum(0), torch.special.entr(q).sum()
        return {"count": count.double(), "entropy": entropy.double(), **self.component_statistics(x, q)}

    def expected_log_joint(self, statistics: Statistics) -> Tensor:
        """See :class:`models.tractable.EMModel`."""
        about_weights = (statistics["count"] * self.logits.double().log_softmax(0)).sum()
        return about_weights + self.expected_log_likelihood(statistics)

    @torch.no_grad()
    def m_step(self, statistics: Statistics) -> None:
        """See :class:`models.tractable.EMModel`.

        Raises:
            DegenerateError: a component without data, or components that the data do not determine.
        """
        count = statistics["count"]
        total = count.sum()
        empty = (count <= 10 * torch.finfo(self.logits.dtype).eps * total).nonzero().flatten().tolist()
        if empty:
            raise DegenerateError(
                f"component {empty[0]} of {self.num_states} is empty: no datum belongs to it any more; try fewer "
                "components, more restarts, or another start"
            )
        self.fit_components(statistics)
        self.logits.copy_((count / total).log())

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape((*batch_shape(x, self.event_shape), self.event_shape.numel()))  # (*batch, *event) -> (*, D)
