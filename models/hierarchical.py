"""Two layers of latents."""

from typing import ClassVar

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from models.conditional import Conditional


class TwoLayerModel(PyroModule):
    """p(z2) p(z1|z2) p(x|z1), or p(x|z1, z2) with a skip connection.

    The first is the two-layer model of Burda et al. (2016, section 5), the second that of Tomczak and Welling (2018,
    section 4). A Pyro model with sites ``z2``, ``z1`` and the observed ``x`` inside a plate ``data`` at dim -1.

    Args:
        top: p(z2).
        middle: p(z1|z2).
        likelihood: p(x|z1); with a skip connection p(x|z1, z2), whose context is z1 followed by z2.
        skip: whether the likelihood reads z2 as well.
    """

    guides: ClassVar[tuple[str, ...]] = ("bottom_up", "top_down", "ladder")  # the words of those made for it

    def __init__(self, top: Conditional, middle: Conditional, likelihood: Conditional, skip: bool = False) -> None:
        super().__init__()
        top_dim, latent_dim = _size(top), _size(middle)
        if middle.context_shape != top.event_shape:
            raise ValueError(f"p(z1|z2) reads {tuple(middle.context_shape)}, z2 has shape {tuple(top.event_shape)}")
        if likelihood.context_shape != (latent_dim + (top_dim if skip else 0),):
            raise ValueError(
                f"the likelihood reads latents of shape {tuple(likelihood.context_shape)}, "
                f"accepted: {(latent_dim + (top_dim if skip else 0),)}"
            )
        self.top, self.middle, self.likelihood, self.skip = top, middle, likelihood, skip

    def forward(self, x: Tensor) -> Tensor:
        """Run the program on data of shape ``(N, *event_shape)``; returns z1, ``(..., N, latent_dim)``."""
        with pyro.plate("data", x.shape[0], dim=-1):
            z2 = pyro.sample("z2", self.top())
            z1 = pyro.sample("z1", self.middle(z2))
            pyro.sample("x", self.likelihood(torch.cat([z1, z2], dim=-1) if self.skip else z1), obs=x)
        return z1


def _size(layer: Conditional) -> int:
    if len(layer.event_shape) != 1:
        raise ValueError(f"the layers of latents are vectors: accepted: event_shape (D,), got {layer.event_shape}")
    return layer.event_shape[0]
