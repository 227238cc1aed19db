"""Latent classes: every p(z) and p(x_d|z) of a few symbols a number of its own."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.distributions import CategoricalLevels
from models.mixture import FiniteMixture
from models.tractable import Statistics, check_finite


class LatentClassModel(FiniteMixture):
    """A latent of a few states, under which every entry of a datum is one of L symbols (Goodman 1974).

    Over data of a single entry, p(z) and p(x|z) are any tables whatever: no triple of encoder, prior and decoder is
    out of reach, which makes it the model to check claims about all VAEs on.

    Args:
        event_shape: shape of one datum, D symbols 0 ... L-1.
        states: number of latent states.
        symbols: L.
        pseudo_count: added to the count of each symbol in the M step, so that none is impossible; the log-likelihood
            is then penalized by as many observations. 0 for plain maximum likelihood.
    """

    support = "levels"

    def __init__(
        self, event_shape: Sequence[int], states: int = 8, symbols: int = 2, pseudo_count: float = 0.0
    ) -> None:
        super().__init__(event_shape, states)
        if symbols < 2:
            raise ValueError(f"symbols must be at least 2, got {symbols}")
        if not pseudo_count >= 0:
            raise ValueError(f"pseudo_count must be 0 or above, got {pseudo_count}")
        self.num_symbols, self.pseudo_count = symbols, pseudo_count
        self.symbol_logits = nn.Parameter(0.1 * torch.randn(states, self.event_shape.numel(), symbols))

    def component(self, z: Tensor) -> dist.TorchDistribution:
        """See :class:`models.mixture.FiniteMixture`."""
        logits = self.symbol_logits.reshape(self.num_states, *self.event_shape, self.num_symbols)
        return CategoricalLevels(logits=logits[z]).to_event(len(self.event_shape))

    def log_likelihood(self, x: Tensor) -> Tensor:
        """See :class:`models.mixture.FiniteMixture`."""
        return self._indicators(x) @ self.symbol_logits.log_softmax(2).flatten(1).T

    def _indicators(self, x: Tensor) -> Tensor:
        """One-hot codes of symbols ``(N, D)``, ``(N, D L)``."""
        return F.one_hot(x.long(), self.num_symbols).to(self.symbol_logits.dtype).flatten(1)

    def log_prior(self) -> Tensor:
        """The penalty that ``pseudo_count`` puts on the parameters, ``()`` nats."""
        return self.pseudo_count * self.symbol_logits.double().log_softmax(2).sum()

    def component_statistics(self, x: Tensor, q: Tensor) -> Statistics:
        """See :class:`models.mixture.FiniteMixture`."""
        return {"symbols": (q.T @ self._indicators(x)).double()}

    def expected_log_likelihood(self, statistics: Statistics) -> Tensor:
        """See :class:`models.mixture.FiniteMixture`."""
        return (statistics["symbols"] * self.symbol_logits.double().log_softmax(2).flatten(1)).sum()

    def fit_components(self, statistics: Statistics) -> None:
        """See :class:`models.mixture.FiniteMixture`; a symbol that never occurs keeps a logit that is finite."""
        counts = statistics["symbols"].reshape(self.symbol_logits.shape) + self.pseudo_count
        floor = torch.finfo(self.symbol_logits.dtype).tiny
        self.symbol_logits.copy_((counts / counts.sum(2, keepdim=True)).clamp(min=floor).log())

    @torch.no_grad()
    def initialize(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        """Equal weights, and each state near the frequencies in the data, at random.

        Raises:
            ValueError: data that are no symbols.
        """
        check_finite(x)
        x = self._flat(x)
        if not bool(((x >= 0) & (x < self.num_symbols) & (x == x.round())).all()):
            raise ValueError(f"the model's symbols are 0 to {self.num_symbols - 1}; the data hold others")
        counts = self._indicators(x).sum(0).reshape(self.symbol_logits.shape[1:])
        noise = torch.randn(self.symbol_logits.shape, generator=generator, device=x.device, dtype=counts.dtype)
        self.symbol_logits.copy_((counts + 1).log() + noise)
        self.logits.zero_()
