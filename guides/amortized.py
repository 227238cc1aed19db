"""From a conditional q(z|x) to a Pyro guide."""

import pyro
from pyro.nn import PyroModule
from torch import Tensor

from models.conditional import Conditional


class Amortized(PyroModule):
    """A guide that reads q(z|x) off the data with one network for all of them (Kingma and Welling 2014, section 2.1).

    Args:
        core: q(z|x); its context is the shape of one datum, its event the shape of one latent.
    """

    def __init__(self, core: Conditional) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor) -> Tensor:
        """Draw the latents of data ``(N, *context_shape)``; returns ``(..., N, *event_shape)``."""
        with pyro.plate("data", x.shape[0], dim=-1):
            return pyro.sample("z", self.core(x))
