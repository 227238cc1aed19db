"""Score-function gradients and their baselines: for draws that cannot be reparameterized, discrete ones above all."""

from abc import ABC
from collections.abc import Sequence
from dataclasses import replace
from math import log, prod

import torch
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn

from inference.gradients import Bound, Draw, GradientEstimator, expect_score_identity, with_gradient
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

    def remember(self, signal: Tensor) -> None:
        """Called with the signal after it was used, in training only."""

    def estimate(self, objective: Bound, draw: Draw, x: Tensor) -> tuple[Tensor, Particles]:
        draws = draw(detach_draws=True)
        expect_score_identity(draws, self.name)
        signal, weight = learning_signal(objective, draws)
        baseline = self.baseline(objective, draws, signal, x)
        score = (weight * (signal - baseline).detach() * draws.log_q).sum(0)
        surrogate = score + direct_part(objective, draws)
        if baseline.requires_grad:
            surrogate = surrogate - 0.5 * (signal - baseline).square().mean(0)
        if torch.is_grad_enabled():
            self.remember(signal)
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

    def remember(self, signal: Tensor) -> None:
        self.total.mul_(self.decay).add_(signal.mean(), alpha=1 - self.decay)
        self.weight.mul_(self.decay).add_(1 - self.decay)


class NVIL(DecayingAverage):
    """Score function with a running average plus a net that reads the baseline off the datum (Mnih and Gregor 2014).

    Neural variational inference and learning, section 2.3. The paper also divides the signal by a running estimate of
    its standard deviation; that rescales the gradient with the state of the training, which an optimizer that divides
    by the size of the gradient does already, and is left out: the gradient here has the right mean.

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


class Visible(PyroModule):
    """A net whose parameters Pyro's own SVI finds, under a name that no part of model or guide has."""

    def __init__(self, net: nn.Module, name: str = "baseline") -> None:
        super().__init__(name)
        to_pyro_module_(net)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class LeaveOneOut(ScoreFunction):
    """Score function in which the other particles are the baseline of each: RLOO, and VIMCO.

    The bound is computed once more without each particle, whose contribution is replaced by the mean of the others'.
    For a mean over particles that is the leave-one-out baseline (Kool et al. 2019), for the importance-weighted
    bound the geometric mean of VIMCO (Mnih and Rezende 2016).
    """

    name = "loo"

    def check(self, objective: Bound) -> None:
        super().check(objective)
        if objective.num_particles < 2:
            raise StructureError(
                f"gradient={self.name} compares particles, so it needs objective.particles=2 or more; with one "
                "particle use gradient=score_average or nvil"
            )

    def substitute(self, contributions: Tensor) -> Tensor:
        """What stands in for each particle, made of the others, ``(K, N)``."""
        return (contributions.sum(0) - contributions) / (contributions.shape[0] - 1)

    def baseline(self, objective: Bound, draws: Particles, signal: Tensor, x: Tensor) -> Tensor:
        contributions = objective.contribution(draws).detach()
        substitute = self.substitute(contributions)
        if objective.linear:
            return substitute
        own = torch.eye(contributions.shape[0], dtype=torch.bool, device=contributions.device).unsqueeze(-1)
        # (K particles, K left out, N): in column k, particle k is replaced
        return objective.combine(torch.where(own, substitute, contributions.unsqueeze(1)))


class ArithmeticVIMCO(LeaveOneOut):
    """VIMCO with the arithmetic mean of the other weights (Mnih and Rezende 2016)."""

    name = "vimco_arithmetic"

    def substitute(self, contributions: Tensor) -> Tensor:
        count = contributions.shape[0]
        own = torch.eye(count, dtype=torch.bool, device=contributions.device).unsqueeze(-1)
        others = contributions.unsqueeze(1).expand(count, count, -1).masked_fill(own, -torch.inf)
        return others.logsumexp(0) - log(count - 1)
