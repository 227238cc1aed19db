"""A guide without noise: the autoencoder."""

from collections.abc import Sequence

import pyro.distributions as dist
from torch import Tensor

from models.conditional import Conditional, NetFactory


class Deterministic(Conditional):
    """One point for each datum: the autoencoder, to which a VAE tends as its posterior's scale goes to zero.

    What the ELBO's objectives then maximize is log p(x|z) + log p(z) at the encoder's output, for the point mass is
    scored with log q = 0: their gradient is the limit's, their value that less an infinite constant, and so no bound on
    log p(x). With objective=beta objective.beta=0 it is log p(x|z) alone, the plain autoencoder. What compares draws by
    their weights or their scores, several copies of one point, is refused.

    Args:
        event_shape: shape of one latent.
        context_shape: shape of one datum.
        net: builds the encoder, whose output is the latent.
    """

    support = "real"
    has_density = False

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory) -> None:
        super().__init__(event_shape, context_shape)
        self.net = net(self.context_shape, self.event_shape)

    def forward(self, *context: Tensor) -> dist.Distribution:
        return dist.Delta(self.net(*context), event_dim=len(self.event_shape))
