"""Variational parameters of each datum's own: classical inference, without amortization."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from guides.refinement import JointDensity, check_steps, refine
from models.conditional import Conditional


class LocallyFitted(Conditional):
    """A diagonal normal fitted to each datum by itself, whenever it is asked for; no encoder, no parameters.

    The local step of stochastic variational inference (Hoffman et al. 2013): with the model as it is,
    the parameters of each datum in the batch are optimized from N(0, I), and the model then takes its step with them
    held fixed, which by the envelope theorem is the whole gradient at their optimum. A table of parameters would
    have to be told which rows a batch holds, against the contract that a program takes ``x``, and would have none
    for held-out data; this needs neither, so that batches, validation and evaluation work as with any guide. The
    price is ``steps`` decoder passes, forward and backward, at each call, for S latents per datum, S the smallest
    power of two above the number of latents. :class:`FreeNormal` is the table.

    Args:
        model: p(x, z), made of a prior and a likelihood; referred to and not owned.
        steps: number of steps.
        step_size: the fraction of the way to the optimum that a step takes; see :func:`guides.refinement.refine`.
    """

    def __init__(self, model: PyroModule, steps: int = 30, step_size: float = 0.3) -> None:
        check_steps(steps, step_size)
        joint = JointDensity(model, "LocallyFitted")
        super().__init__(joint.event_shape, joint.context_shape)
        self.steps, self.step_size = steps, step_size
        object.__setattr__(self, "joint", joint)  # holds the model, which is not a submodule

    def forward(self, *context: Tensor) -> dist.Distribution:
        (x,) = context
        batch = x.shape[: x.dim() - len(self.context_shape)]
        start = torch.zeros(batch + self.event_shape, dtype=x.dtype, device=x.device)
        loc, log_scale = refine(self.joint.of(x), start, start, self.steps, self.step_size)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def localized(self, x: Tensor) -> Conditional:
        """The same family with parameters for each of the data ``(N, *context_shape)``, which start from this fit."""
        q = self(x).base_dist
        return _Fitted(q.loc, q.scale.log(), self.context_shape)


class _Fitted(Conditional):
    """Diagonal normals, one for each of N data: locations and log standard deviations ``(N, *event_shape)``."""

    def __init__(self, loc: Tensor, log_scale: Tensor, context_shape: Sequence[int]) -> None:
        super().__init__(loc.shape[1:], context_shape)
        self.loc, self.log_scale = nn.Parameter(loc.detach().clone()), nn.Parameter(log_scale.detach().clone())

    def forward(self, *context: Tensor) -> dist.Distribution:
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


class FreeNormal(PyroModule):
    """A table of diagonal normals, one for each of a given number of data: a guide that grows with the data.

    The program's second argument says which rows the data are; without it they are all the rows in order, so that
    whole-data training needs nothing else. In a script with batches, ``svi.step(x, rows)`` hands the rows to guide
    and model alike.

    Args:
        event_shape: shape of one latent.
        size: number of data, N.
    """

    def __init__(self, event_shape: Sequence[int], size: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(size, *event_shape))
        self.log_scale = nn.Parameter(torch.zeros(size, *event_shape))

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Draw the latents of data ``(B, *shape)`` in the given rows ``(B,)``; returns ``(..., B, *event_shape)``."""
        if len(x) != (len(self.loc) if rows is None else len(rows)):
            raise ValueError(
                f"FreeNormal has parameters for {len(self.loc)} data and was given {len(x)}; accepted: all of them in "
                "order, or any of them with their rows as second argument"
            )
        loc, log_scale = (self.loc, self.log_scale) if rows is None else (self.loc[rows], self.log_scale[rows])
        with pyro.plate("data", x.shape[0], dim=-1):
            return pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(loc.dim() - 1))
