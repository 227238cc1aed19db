"""The tabular discrete VAE: every p(z) and p(pixel|z) a number of its own, every sum exact."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.mixture import FiniteMixture
from models.tractable import Statistics, check_finite


class TabularVAE(FiniteMixture):
    """A latent of a few states and Bernoulli pixels, both as tables: a VAE in which log p(x) and p(z|x) are exact.

    Args:
        event_shape: shape of one datum of zeros and ones, D pixels.
        states: number of latent states.
        pseudo_count: ones and zeros added to each pixel of each state in the M step, so that no pixel is certain; the
            log-likelihood is then penalized by as many Bernoulli observations. 0 for plain maximum likelihood.
    """

    support = "binary"

    def __init__(self, event_shape: Sequence[int], states: int = 8, pseudo_count: float = 0.0) -> None:
        super().__init__(event_shape, states)
        if not pseudo_count >= 0:
            raise ValueError(f"pseudo_count must be 0 or above, got {pseudo_count}")
        self.pseudo_count = pseudo_count
        self.pixel_logits = nn.Parameter(0.1 * torch.randn(states, self.event_shape.numel()))

    def component(self, z: Tensor) -> dist.TorchDistribution:
        """See :class:`models.mixture.FiniteMixture`."""
        logits = self.pixel_logits.reshape(self.num_states, *self.event_shape)
        return dist.Bernoulli(logits=logits[z]).to_event(len(self.event_shape))

    def log_likelihood(self, x: Tensor) -> Tensor:
        """See :class:`models.mixture.FiniteMixture`."""
        return x @ self.pixel_logits.T + F.logsigmoid(-self.pixel_logits).sum(1)

    def log_prior(self) -> Tensor:
        """The penalty that ``pseudo_count`` puts on the parameters, ``()`` nats."""
        logits = self.pixel_logits.double()
        return self.pseudo_count * (F.logsigmoid(logits) + F.logsigmoid(-logits)).sum()

    def component_statistics(self, x: Tensor, q: Tensor) -> Statistics:
        """See :class:`models.mixture.FiniteMixture`."""
        return {"ones": (q.T @ x).double()}

    def expected_log_likelihood(self, statistics: Statistics) -> Tensor:
        """See :class:`models.mixture.FiniteMixture`."""
        logits = self.pixel_logits.double()
        normalizers = statistics["count"] * F.logsigmoid(-logits).sum(1)
        return (statistics["ones"] * logits).sum() + normalizers.sum()

    def fit_components(self, statistics: Statistics) -> None:
        """See :class:`models.mixture.FiniteMixture`; a pixel that is certain keeps a logit that is finite."""
        ones = statistics["ones"] + self.pseudo_count
        probability = ones / (statistics["count"].unsqueeze(1) + 2 * self.pseudo_count)
        self.pixel_logits.copy_(torch.logit(probability, eps=torch.finfo(self.pixel_logits.dtype).eps))

    @torch.no_grad()
    def initialize(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        """Equal weights, and each state near the mean of the data, at random."""
        check_finite(x)
        mean = self._flat(x).mean(0).clamp(0.05, 0.95)
        noise = torch.randn(self.pixel_logits.shape, generator=generator, device=x.device, dtype=x.dtype)
        self.pixel_logits.copy_(torch.logit(mean) + noise)
        self.logits.zero_()
