"""Bounds on log p(x), each a few lines over the particles.

An objective maps ``(model, guide, x)`` to a bound per datum in nats, higher is better, whose gradient with respect to
the parameters of model and guide is right too. It is also a :class:`pyro.infer.ELBO`, so
``SVI(model, guide, optim, loss=IWAE(50))`` works in any Pyro script; only there, and in the trainer, is it negated.
Nothing in a step waits for the device.
"""

import math
from abc import abstractmethod
from typing import Any, Literal

import pyro.infer
import torch
from torch import Tensor

from inference.particles import Particles, Program, StructureError, guess_max_plate_nesting, particles


class Objective(pyro.infer.ELBO):
    """A bound on log p(x) per datum; leaves define :meth:`from_particles`.

    Args:
        particles: K, the number of draws from the guide for each datum.
        max_plate_nesting: the deepest plate of model and guide; found by running them once where not given.
    """

    def __init__(self, particles: int = 1, max_plate_nesting: int | None = None) -> None:
        super().__init__(num_particles=particles)
        self.nesting = max_plate_nesting
        if particles < 1:
            raise ValueError(f"particles must be at least 1, got {particles}")

    def at(self, progress: float) -> None:
        """The trainer says before each step how far it is, from 0 to 1; annealed objectives listen."""

    @abstractmethod
    def from_particles(self, draws: Particles) -> Tensor:
        """The bound, ``(N,)`` nats, from ``(K, N)`` log-densities."""

    def bound(self, model: Program, guide: Program, *args: Any, **kw: Any) -> Tensor:
        """The bound for each datum, ``(N,)`` nats, higher is better, differentiable."""
        return self.from_particles(self._draw(model, guide, *args, **kw))

    def __call__(self, model: Program, guide: Program, *args: Any, **kw: Any) -> Any:
        """With data, :meth:`bound`; without, Pyro's :class:`~pyro.infer.elbo.ELBOModule` of this pair."""
        return self.bound(model, guide, *args, **kw) if args or kw else super().__call__(model, guide)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kw: Any) -> Tensor:
        """Minus the bound, summed over the data (and scaled to the full data under a subsampled plate), as in Pyro."""
        draws = self._draw(model, guide, *args, **kw)
        return -draws.data_scale * self.from_particles(draws).sum()

    def loss(self, model: Program, guide: Program, *args: Any, **kw: Any) -> Tensor:
        """:meth:`differentiable_loss` without its gradient; a tensor on the device, not a float."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kw)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kw: Any) -> Tensor:
        """Adds the gradient of the loss to every parameter and returns the loss as a tensor on the device."""
        loss = self.differentiable_loss(model, guide, *args, **kw)
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> None:
        raise NotImplementedError("objectives read particles, not traces")

    def _draw(self, model: Program, guide: Program, *args: Any, **kw: Any) -> Particles:
        if not args:
            raise StructureError("hand the data to model and guide as their first argument, not by keyword")
        if self.nesting is None:
            self.nesting = guess_max_plate_nesting(model, guide, *args, **kw)
        draws = particles(model, guide, args[0], self.num_particles, *args[1:], max_plate_nesting=self.nesting, **kw)
        if sites := draws.not_reparameterized:
            raise StructureError(
                f"the guide's sites {sites} cannot be reparameterized, and the gradient of {type(self).__name__} "
                "through them would silently be zero; use objective=trace_elbo or objective=tracegraph_elbo"
            )
        return draws


class ELBO(Objective):
    """The evidence lower bound E_q[log p(x, z) - log q(z|x)] (Jordan et al. 1999; Kingma and Welling 2014, eq. 3).

    Equal in value and gradient to Pyro's ``Trace_ELBO`` (``kl="monte_carlo"``) and ``TraceMeanField_ELBO``
    (``kl="analytic"``) for reparameterized guides, without their host syncs.

    Args:
        particles: number of draws whose average estimates the expectation.
        kl: ``"analytic"`` takes KL(q(z|x) || p(z)) in closed form and fails where there is none; ``"monte_carlo"``
            estimates it with the same draws.
        max_plate_nesting: see :class:`Objective`.
    """

    def __init__(
        self,
        particles: int = 1,
        kl: Literal["analytic", "monte_carlo"] = "monte_carlo",
        max_plate_nesting: int | None = None,
    ) -> None:
        super().__init__(particles, max_plate_nesting)
        if kl not in ("analytic", "monte_carlo"):
            raise ValueError(f"kl must be 'analytic' or 'monte_carlo', got {kl!r}")
        self.kl = kl

    def from_particles(self, draws: Particles) -> Tensor:
        kl = draws.analytic_kl() if self.kl == "analytic" else draws.log_q - draws.log_prior
        return (draws.log_likelihood - kl).mean(0)


class IWAE(Objective):
    """The importance-weighted bound E log (1/K) sum_k p(x, z_k)/q(z_k|x) (Burda et al. 2016, eq. 8).

    Rises to log p(x) with K. The size of the data and any weight stay outside the logarithm, so it remains a bound
    under a subsampled plate.

    Args:
        particles: K.
        max_plate_nesting: see :class:`Objective`.
    """

    def __init__(self, particles: int = 50, max_plate_nesting: int | None = None) -> None:
        super().__init__(particles, max_plate_nesting)

    def from_particles(self, draws: Particles) -> Tensor:
        return draws.log_weight.logsumexp(0) - math.log(draws.log_weight.shape[0])
