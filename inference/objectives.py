"""Bounds on log p(x), each a few lines over the particles.

An objective maps ``(model, guide, x)`` to a bound per datum in nats, higher is better, whose gradient with respect to
the parameters of model and guide is right too. It is also a :class:`pyro.infer.ELBO`, so
``SVI(model, guide, optim, loss=IWAE(50))`` works in any Pyro script; only there, and in the trainer, is it negated.
What is bounded and how its gradient is taken are two choices: ``IWAE(50, gradient="dreg")``. Nothing in a step waits
for the device.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import pyro.infer
import torch
from torch import Tensor, nn

from inference.antithetic import ARM
from inference.baselines import (
    NVIL,
    VIMCO,
    ArithmeticVIMCO,
    DecayingAverage,
    LeaveOneOut,
    NormalizedNVIL,
    ScoreFunction,
)
from inference.control_variates import REBAR, RELAX, MuProp
from inference.covariance import Covariance
from inference.gradients import (
    DoublyReparameterized,
    Draw,
    GradientEstimator,
    Reparameterized,
    StickingTheLanding,
    expect_density,
)
from inference.particles import Particles, Program, StructureError, guess_max_plate_nesting, particles

GRADIENTS: dict[str, type[GradientEstimator]] = {
    "reparameterized": Reparameterized,
    "stl": StickingTheLanding,
    "dreg": DoublyReparameterized,
    "score": ScoreFunction,
    "score_average": DecayingAverage,
    "nvil": NVIL,
    "nvil_normalized": NormalizedNVIL,
    "loo": LeaveOneOut,
    "vimco": VIMCO,
    "vimco_arithmetic": ArithmeticVIMCO,
    "muprop": MuProp,
    "rebar": REBAR,
    "relax": RELAX,
    "arm": ARM,
    "covariance": Covariance,
}


def gradient_estimator(gradient: str | GradientEstimator) -> GradientEstimator:
    """The estimator of that name; one that is given is taken as it is."""
    if isinstance(gradient, GradientEstimator):
        return gradient
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    return GRADIENTS[gradient]()


class Objective(pyro.infer.ELBO, nn.Module):
    """A bound on log p(x) per datum; leaves define :meth:`combine`, or all of :meth:`from_particles`.

    A module, for what its gradient estimator learns and for weights that change during a run: optimize its parameters
    along with those of model and guide, and keep its state with theirs.

    Args:
        particles: K, the number of draws from the guide for each datum.
        max_plate_nesting: the deepest plate of model and guide; found by running them once where not given.
        gradient: how the gradient with respect to the guide is estimated: a word of :data:`GRADIENTS`, or an estimator.
    """

    num_particles: int
    linear: bool = False  # the bound is the mean over particles of their contributions
    local: bool = True  # the bound of a datum is a function of its own draws
    log_q_is_sampled: bool = True  # the bound is a function of log q at the draws

    @property
    def needs_density(self) -> bool:
        """Whether it means nothing for a guide without noise, whose log q is an infinite constant."""
        return not self.linear

    def __init__(
        self,
        particles: int = 1,
        max_plate_nesting: int | None = None,
        gradient: str | GradientEstimator = "reparameterized",
    ) -> None:
        nn.Module.__init__(self)
        pyro.infer.ELBO.__init__(self, num_particles=particles)
        self.nesting = max_plate_nesting
        if particles < 1:
            raise ValueError(f"particles must be at least 1, got {particles}")
        self.gradient = gradient_estimator(gradient)

    def prepare(self, event_shape: Sequence[int], latent_shape: Sequence[int] | None = None) -> None:
        """Build what depends on the shape of a datum, before the optimizer is made, and check that all fits together.

        Args:
            event_shape: of one datum.
            latent_shape: of its latent, for estimators that learn a function of it.

        Raises:
            StructureError: the gradient estimator is not valid for this bound.
        """
        self.gradient.check(self)
        self.gradient.prepare(event_shape, latent_shape)

    def at(self, progress: float) -> None:
        """The trainer says before each step how far it is, from 0 to 1; annealed objectives listen."""

    def info(self) -> dict[str, float]:
        """What is worth a place in each row of the log, besides the bound; may wait for the device."""
        return {}

    def contribution(self, draws: Particles) -> Tensor:
        """What each particle brings to the bound, ``(K, N)`` nats: its log-weight, unless a leaf says otherwise."""
        return draws.log_weight

    def combine(self, contributions: Tensor) -> Tensor:
        """The bound, of the contributions along the first dimension: ``(K, *rest)`` nats to ``rest``."""
        raise StructureError(
            f"{type(self).__name__} does not define combine, which this gradient estimator needs; use "
            "gradient=reparameterized or score"
        )

    def double_reparameterization(self, contributions: Tensor) -> Tensor:
        """The factors of the path derivatives of the ``(K, N)`` log-weights under gradient=dreg, relative to their own.

        They are 1 - (dg/dlog w)/g, with g the derivative of :meth:`combine` in a log-weight.
        """
        if self.linear:
            return torch.ones_like(contributions)
        raise StructureError(
            f"no doubly reparameterized gradient of {type(self).__name__} is known; use gradient=reparameterized"
        )

    def from_particles(self, draws: Particles) -> Tensor:
        """The bound, ``(N,)`` nats, from ``(K, N)`` log-densities."""
        return self.combine(self.contribution(draws))

    def bound(self, model: Program, guide: Program, *args: Any, **kw: Any) -> Tensor:
        """The bound for each datum, ``(N,)`` nats, higher is better, differentiable."""
        return self.estimate(model, guide, *args, **kw)[0]

    def estimate(self, model: Program, guide: Program, *args: Any, **kw: Any) -> tuple[Tensor, Particles]:
        """:meth:`bound`, and the particles behind it."""
        self.gradient.check(self)
        bound, draws = self.gradient.estimate(self, self.drawing(model, guide, *args, **kw), args[0])
        self.check_draws(draws)
        return bound, draws

    def check_draws(self, draws: Particles) -> None:
        """Refuse draws that this objective means nothing for.

        Raises:
            StructureError: with the reason, and what would do.
        """
        if self.needs_density:
            expect_density(draws, f"{type(self).__name__} with {self.num_particles} particles")

    def __call__(self, model: Program, guide: Program, *args: Any, **kw: Any) -> Any:
        """With data, :meth:`bound`; without, Pyro's :class:`~pyro.infer.elbo.ELBOModule` of this pair."""
        return self.bound(model, guide, *args, **kw) if args or kw else super().__call__(model, guide)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kw: Any) -> Tensor:
        """Minus the bound, summed over the data (and scaled to the full data under a subsampled plate), as in Pyro."""
        bound, draws = self.estimate(model, guide, *args, **kw)
        return -draws.data_scale * bound.sum()

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

    def drawing(self, model: Program, guide: Program, *args: Any, **kw: Any) -> Draw:
        """:func:`~inference.particles.particles` of this pair and data, all but how gradients flow through it."""
        if not args:
            raise StructureError("hand the data to model and guide as their first argument, not by keyword")
        if self.nesting is None:
            self.nesting = guess_max_plate_nesting(model, guide, *args, **kw)
        x, *rest = args
        return partial(particles, model, guide, x, self.num_particles, *rest, max_plate_nesting=self.nesting, **kw)


class ELBO(Objective):
    """The evidence lower bound E_q[log p(x, z) - log q(z|x)] (Jordan et al. 1999; Kingma and Welling 2014, eq. 3).

    Equal in value and gradient to Pyro's ``Trace_ELBO`` (``kl="monte_carlo"``) and ``TraceMeanField_ELBO``
    (``kl="analytic"``) for reparameterized guides, without their host syncs.

    Args:
        particles: number of draws whose average estimates the expectation.
        kl: ``"analytic"`` takes KL(q(z|x) || p(z)) in closed form and fails where there is none; ``"monte_carlo"``
            estimates it with the same draws, except that of relaxed ones (guide=concrete), which tell nothing of it:
            there it is that of the discrete distributions, with their entropy in closed form.
        max_plate_nesting: see :class:`Objective`.
        gradient: see :class:`Objective`.
    """

    linear = True

    def __init__(
        self,
        particles: int = 1,
        kl: Literal["analytic", "monte_carlo"] = "monte_carlo",
        max_plate_nesting: int | None = None,
        gradient: str | GradientEstimator = "reparameterized",
    ) -> None:
        super().__init__(particles, max_plate_nesting, gradient)
        if kl not in ("analytic", "monte_carlo"):
            raise ValueError(f"kl must be 'analytic' or 'monte_carlo', got {kl!r}")
        self.kl = kl

    @property
    def log_q_is_sampled(self) -> bool:  # type: ignore[override]
        return self.kl == "monte_carlo"

    def divergence(self, draws: Particles) -> Tensor:
        """KL(q(z|x) || p(z)), or what estimates it, ``(K, N)`` nats."""
        return draws.analytic_kl() if self.kl == "analytic" else draws.sampled_kl()

    def contribution(self, draws: Particles) -> Tensor:
        return draws.log_likelihood - self.divergence(draws)

    def combine(self, contributions: Tensor) -> Tensor:
        return contributions.mean(0)


class IWAE(Objective):
    """The importance-weighted bound E log (1/K) sum_k p(x, z_k)/q(z_k|x) (Burda et al. 2016, eq. 8).

    Rises to log p(x) with K. The size of the data and any weight stay outside the logarithm, so it remains a bound
    under a subsampled plate.

    Args:
        particles: K.
        max_plate_nesting: see :class:`Objective`.
        gradient: see :class:`Objective`.
    """

    def __init__(
        self,
        particles: int = 50,
        max_plate_nesting: int | None = None,
        gradient: str | GradientEstimator = "reparameterized",
    ) -> None:
        super().__init__(particles, max_plate_nesting, gradient)

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.num_particles == 1

    def combine(self, contributions: Tensor) -> Tensor:
        return log_mean_exp(contributions)

    def double_reparameterization(self, contributions: Tensor) -> Tensor:
        return contributions.softmax(0)


def log_mean_exp(values: Tensor) -> Tensor:
    """log of the mean of exp along the first dimension."""
    return values.logsumexp(0) - math.log(values.shape[0])
