"""The exact posterior of a model that has one in closed form."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from pyro.distributions import Distribution
from torch import Tensor

from models.conditional import Conditional


class TractableModel(Protocol):
    """A model with a closed-form posterior."""

    def posterior(self, x: Tensor) -> Distribution: ...


class ExactPosterior(Conditional):
    """q(z|x) = p(z|x): closes the gap between the bound and log p(x).

    It has no parameters of its own. The model is referred to and not owned, so that its parameters are the model's
    alone, and no gradient reaches them through the guide: q is held fixed, as in the E-step of EM.

    Args:
        model: its ``posterior(x)`` gives the distribution of z for each datum.
        event_shape: shape of one latent; that of the model's prior unless given.
        context_shape: shape of one datum; that of the model's likelihood unless given.
    """

    amortized: ClassVar[bool] = False  # nothing is lost to a network that serves all data

    def __init__(
        self,
        model: TractableModel,
        event_shape: Sequence[int] | None = None,
        context_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            model.prior.event_shape if event_shape is None else event_shape,  # type: ignore[attr-defined]
            model.likelihood.event_shape if context_shape is None else context_shape,  # type: ignore[attr-defined]
        )
        object.__setattr__(self, "model", model)  # not a submodule

    def forward(self, *context: Tensor) -> Distribution:
        with torch.no_grad():
            return self.model.posterior(*context)
