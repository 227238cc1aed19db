"""Score-function gradients and their baselines: for draws that cannot be reparameterized, discrete ones above all."""

from abc import ABC
from collections.abc import Sequence
from dataclasses import replace
from math import log, prod

import torch
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn

from inference.gradients import (
    Bound,
    Draw,
    GradientEstimator,
    expect_density,
    expect_own_targets,
    expect_score_identity,
    with_gradient,
)
from inference.particles import Particles
from inference.structure import StructureError


class ScoreFunction(GradientEstimator, ABC):
    """The draws are constants and their log q is weighted by what they earned (Williams 1992, REINFORCE).

    Needs nothing of the model's dependence on the latents. A mean over particles is credited to each of them by its
    own contribution, any other bound as a whole to all. Subclasses subtract a baseline from the signal, which leaves
    the mean of the gradient as it is as long as the baseline of a particle does not depend on that particle.
    """

    name = "score"

    def check(self, objective: Bound) -> None:
        if not objective.local:
            raise StructureError(
                f"gradient={self.name} credits each datum with its own bound, and that of {type(objective).__name__} "
                "depends on the draws of the whole batch; use gradient=reparameterized"
            )

    def baseline(self, objective: Bound, draws: Particles, signal: Tensor, x: Tensor) -> Tensor:
        """What is subtracted from the ``(K, N)`` signal, in nats; of a shape that broadcasts to it.

        Where it has parameters, they are trained to predict the signal, by least squares.
        """
        return signal.new_zeros(())

    def scale(self) -> Tensor | float:
        """What the signal less its baseline is divided by; the gradient in the guide is the right one over this."""
        return 1.0

    def remember(self, signal: Tensor, centred: Tensor) -> None:
        """Called with the signal, and with what the baseline left of it, after they were used, in training only."""

    def estimate(self, objective: Bound, draw: Draw, x: Tensor) -> tuple[Tensor, Particles]:
        draws = draw(detach_draws=True)
        expect_density(draws, f"gradient={self.name}")
        expect_score_identity(draws, self.name)
        signal, weight = learning_signal(objective, draws)
        baseline = self.baseline(objective, draws, signal, x)
        centred = (signal - baseline).detach()
        score = (weight / self.scale() * centred * draws.log_q).sum(0)
        surrogate = score + direct_part(objective, draws)
        if baseline.requires_grad:
            surrogate = surrogate - 0.5 * (signal - baseline).square().mean(0)
        if torch.is_grad_enabled():
            self.remember(signal, centred)
        return with_gradient(objective.from_particles(draws), surrogate), draws


def learning_signal(objective: Bound, draws: Particles) -> tuple[Tensor, float]:
    """What each particle is credited with, ``(K, N)`` nats without gradient, and how much its credit counts."""
    weight = 1 / draws.log_q.shape[0] if objective.linear else 1.0
    return credit(objective, draws).detach().expand(draws.log_q.shape), weight


def credit(objective: Bound, draws: Particles) -> Tensor:
    """The same before it is shared out: of each particle, ``(K, N)``, or of all together, ``(1, N)``."""
    return objective.contribution(draws) if objective.linear else objective.from_particles(draws).unsqueeze(0)


def direct_part(objective: Bound, draws: Particles) -> Tensor:
    """The bound, whose derivative at fixed draws is the part of the gradient that is not through their distribution.

    Of a mean over particles, the derivative in log q is a score, with mean zero; the estimator goes without it.
    """
    return objective.from_particles(replace(draws, log_q=draws.log_q.detach()) if objective.linear else draws)


class DecayingAverage(ScoreFunction):
    """Score function with the running average of past signals as baseline (Mnih and Gregor 2014, section 2.3).

    Args:
        decay: of the average, per step; the bias towards its start at zero is divided out.
    """

    name = "score_average"
    total: Tensor
    weight: Tensor

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))

    def average(self) -> Tensor:
        """The average so far, shape ``()``, in nats; 0 before the first step."""
        return torch.where(self.weight > 0, self.total / self.weight.clamp(min=1 - self.decay), 0.0)

    def baseline(self, objective: Bound, draws: Particles, signal: Tensor, x: Tensor) -> Tensor:
        return self.average()

    def remember(self, signal: Tensor, centred: Tensor) -> None:
        self.total.mul_(self.decay).add_(signal.mean(), alpha=1 - self.decay)
        self.weight.mul_(self.decay).add_(1 - self.decay)


class NVIL(DecayingAverage):
    """Score function with a running average plus a net that reads the baseline off the datum (Mnih and Gregor 2014).

    Neural variational inference and learning, sections 2.3.1 and 2.3.2; :class:`NormalizedNVIL` has the rest of it.

    Args:
        net: reads one number in nats off each datum, ``(N, *event_shape) -> (N, 1)`` or ``(N,)``; by default a net
            with one hidden layer, which is built when the shape of a datum is known.
        decay: see :class:`DecayingAverage`.
        hidden: units of the default net.
    """

    name = "nvil"

    def __init__(self, net: nn.Module | None = None, decay: float = 0.9, hidden: int = 100) -> None:
        super().__init__(decay)
        self.hidden = hidden
        self.net = None if net is None else Visible(net)

    def prepare(self, event_shape: Sequence[int], latent_shape: Sequence[int] | None = None) -> None:
        if self.net is None:
            size = prod(event_shape)
            net = nn.Sequential(nn.Flatten(), nn.Linear(size, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 1))
            self.net = Visible(net)

    def baseline(self, objective: Bound, draws: Particles, signal: Tensor, x: Tensor) -> Tensor:
        if self.net is None:
            raise StructureError(
                "the baseline of gradient=nvil is a net that is not built yet: call objective.prepare(event_shape) "
                "with the shape of a datum, before the optimizer is made"
            )
        if x.shape[0] != signal.shape[1]:
            raise StructureError("gradient=nvil reads its baseline off the data: subsample them before, not inside")
        return self.average() + self.net(x).reshape(-1)  # (N, 1) -> (N,)


class NormalizedNVIL(NVIL):
    """NVIL with the signal divided by its running standard deviation (Mnih and Gregor 2014, section 2.3.3).

    What the baseline leaves of the signal is divided by the root of a running average of its variance,
    where that is above 1 nat. The gradient in the guide is then the bound's over a positive number that changes slowly
    (:meth:`scale`), the one in the model the bound's own: one rate suits both throughout a run.
    """

    name = "nvil_normalized"
    variance: Tensor

    def __init__(self, net: nn.Module | None = None, decay: float = 0.9, hidden: int = 100) -> None:
        super().__init__(net, decay, hidden)
        self.register_buffer("variance", torch.zeros(()))

    def check(self, objective: Bound) -> None:
        super().check(objective)
        if not (objective.linear and objective.log_q_is_sampled):
            raise StructureError(
                f"gradient={self.name} divides the whole gradient in the guide, and a part of that of "
                f"{type(objective).__name__} does not come by the score; use gradient=nvil, or objective=elbo with "
                "objective.kl=monte_carlo"
            )

    def estimate(self, objective: Bound, draw: Draw, x: Tensor) -> tuple[Tensor, Particles]:
        expect_own_targets(draw, f"gradient={self.name}", "use gradient=nvil")
        return super().estimate(objective, draw, x)

    def scale(self) -> Tensor:
        """Standard deviation of the signal less its baseline, in nats, but at least 1; shape ``()``."""
        return (self.variance / self.weight.clamp(min=1 - self.decay)).clamp(min=1).sqrt()

    def remember(self, signal: Tensor, centred: Tensor) -> None:
        super().remember(signal, centred)
        self.variance.mul_(self.decay).add_(centred.var(correction=0), alpha=1 - self.decay)


class Visible(PyroModule):
    """A net whose parameters Pyro's own SVI finds, under a name that no part of model or guide has."""

    def __init__(self, net: nn.Module, name: str = "baseline") -> None:
        super().__init__(name)
        to_pyro_module_(net)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Compared(ScoreFunction, ABC):
    """A baseline for each particle, made of the other particles."""

    def check(self, objective: Bound) -> None:
        super().check(objective)
        if objective.num_particles < 2:
            raise StructureError(
                f"gradient={self.name} compares particles, so it needs objective.particles=2 or more; with one "
                "particle use gradient=score_average or nvil"
            )


class LeaveOneOut(_Compared):
    """Score function in which the mean of the other particles is the baseline of each (Kool et al. 2019), RLOO.

    For means over particles; where a bound is a function of all of them together, the same idea is :class:`VIMCO`.
    """

    name = "loo"

    def check(self, objective: Bound) -> None:
        super().check(objective)
        if not objective.linear:
            raise StructureError(
                f"gradient=loo credits each particle with its own contribution to a mean, and "
                f"{type(objective).__name__} is none; use gradient=vimco, which leaves one out of the whole bound"
            )

    def baseline(self, objective: Bound, draws: Particles, signal: Tensor, x: Tensor) -> Tensor:
        return (signal.sum(0) - signal) / (signal.shape[0] - 1)


class VIMCO(_Compared):
    """Score function in which the bound without a particle is the baseline of that particle (Mnih and Rezende 2016).

    The bound is computed once more for each particle, whose weight is replaced by the geometric mean of the others'
    (eq. 10; the paper's for the importance-weighted bound, here for any function of the log-weights).
    """

    name = "vimco"

    def check(self, objective: Bound) -> None:
        super().check(objective)
        if objective.linear:
            raise StructureError(
                f"gradient={self.name} leaves a particle out of a bound that all make together, and "
                f"{type(objective).__name__} with {objective.num_particles} particles is a mean over them; use "
                "gradient=loo"
            )

    def substitute(self, contributions: Tensor) -> Tensor:
        """What stands in for the log-weight of each particle, made of the others', ``(K, N)``."""
        return (contributions.sum(0) - contributions) / (contributions.shape[0] - 1)

    def baseline(self, objective: Bound, draws: Particles, signal: Tensor, x: Tensor) -> Tensor:
        contributions = objective.contribution(draws).detach()
        own = torch.eye(contributions.shape[0], dtype=torch.bool, device=contributions.device).unsqueeze(-1)
        # (K particles, K left out, N): in column k, particle k is replaced
        return objective.combine(torch.where(own, self.substitute(contributions), contributions.unsqueeze(1)))


class ArithmeticVIMCO(VIMCO):
    """VIMCO with the arithmetic mean of the other weights (Mnih and Rezende 2016)."""

    name = "vimco_arithmetic"

    def substitute(self, contributions: Tensor) -> Tensor:
        count = contributions.shape[0]
        own = torch.eye(count, dtype=torch.bool, device=contributions.device).unsqueeze(-1)
        others = contributions.unsqueeze(1).expand(count, count, -1).masked_fill(own, -torch.inf)
        return others.logsumexp(0) - log(count - 1)
