"""Score-function gradients of bits and one-hot vectors with control variates that know how the bound depends on them.

Each evaluates the bound at a point between the draws, by the linear extension of their log-masses, and what it
subtracts there it adds again as a gradient along a path. The mean of the gradient stays that of the bound.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import log, prod

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from inference.baselines import DecayingAverage, ScoreFunction, Visible, credit, direct_part, learning_signal
from inference.gradients import Bound, Draw, along_site, with_gradient
from inference.particles import Latent, Particles
from inference.structure import StructureError
from models.discrete import Bits, OneHots, base_of, extended, scores_given


@dataclass(frozen=True)
class DiscreteSite:
    """The one latent of a bound over bits or one-hot vectors."""

    name: str
    latent: Latent
    draws: Particles

    @property
    def logits(self) -> Tensor:
        """Log-odds, or log-probabilities of classes, ``(K, ..., N, *event_shape)``; they lead to the guide."""
        return base_of(extended(self.latent.q)).logits

    @property
    def event_dim(self) -> int:
        """Number of dimensions of one latent."""
        return len(self.latent.q.event_shape)

    def loose(self) -> tuple[Tensor, Bits | OneHots]:
        """Logits that lead nowhere, to be differentiated in, and the distribution of single entries that they give."""
        logits = self.logits.detach().requires_grad_()
        kind = OneHots if isinstance(base_of(self.latent.q), torch.distributions.OneHotCategorical) else Bits
        return logits, kind(logits, validate_args=False)

    def at(self, value: Tensor) -> Particles:
        """The particles with another value in the place of the draw; the guide is held constant."""
        assert self.draws.rescore is not None
        return self.draws.rescore({self.name: value}, _held)

    def spread(self, factor: Tensor) -> Tensor:
        """``(K, N)`` to a shape that multiplies a latent."""
        return along_site(factor.expand(self.draws.log_q.shape), self.latent.value.dim(), self.event_dim)

    def gathered(self, value: Tensor) -> Tensor:
        """``(K, N)``: the sum over all entries of each draw."""
        flat = value.flatten(value.dim() - self.event_dim).sum(-1)  # (K, ..., N, *event) -> (K, ..., N)
        num_particles, num_data = self.draws.log_q.shape
        return flat.reshape(num_particles, -1, num_data).sum(1)


def _held(distribution: object) -> object:
    q = extended(distribution)
    return type(q)(type(q.base_dist)(q.base_dist.logits.detach(), validate_args=False), q.reinterpreted_batch_ndims)


def discrete_site(draws: Particles, name: str) -> DiscreteSite:
    """The latent, once it is known to be one whose log-mass can be extended.

    Raises:
        StructureError: there are several latents, or one of another kind.
    """
    others = "use gradient=score_average, nvil or loo"
    if len(draws.latents) != 1 or draws.auxiliary:
        sites = [*draws.latents, *draws.auxiliary]
        raise StructureError(f"gradient={name} is for one latent site, and there are {sites}; {others}")
    ((site, latent),) = draws.latents.items()
    if latent.q_mask is not None or latent.p_mask is not None:
        raise StructureError(
            f"gradient={name} takes all of the latent '{site}' into account, and some is masked; {others}"
        )
    try:
        extended(latent.q), extended(latent.p)
    except ValueError as error:
        continuous = "use gradient=reparameterized" if latent.q.has_rsample else others
        raise StructureError(
            f"gradient={name} is for bits and one-hot vectors; for the latent '{site}', {error}; {continuous}"
        ) from None
    return DiscreteSite(site, latent, draws)


class LogitGradient(ScoreFunction):
    """Estimates the gradient in the logits of the guide; leaves say how, and autograd takes it from there."""

    @abstractmethod
    def of_logits(self, objective: Bound, site: DiscreteSite, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the bound in the logits, of their shape, and a term for each datum that trains this."""

    def estimate(self, objective: Bound, draw: Draw, x: Tensor) -> tuple[Tensor, Particles]:
        draws = draw(detach_draws=True)
        site = discrete_site(draws, self.name)
        if not torch.is_grad_enabled():
            return objective.from_particles(draws), draws
        gradient, training = self.of_logits(objective, site, x)
        through_logits = site.gathered(gradient.detach() * site.logits).sum(0)
        surrogate = through_logits + direct_part(objective, draws) + training
        return with_gradient(objective.from_particles(draws), surrogate), draws


class MuProp(LogitGradient, DecayingAverage):
    """The bound's first-order expansion about the mean of the draws as control variate (Gu et al. 2016, section 3).

    What the expansion leaves goes with the score, less its running average; the gradient of the expansion's mean is
    known.

    Args:
        decay: of that average, see :class:`~inference.baselines.DecayingAverage`.
    """

    name = "muprop"

    def of_logits(self, objective: Bound, site: DiscreteSite, x: Tensor) -> tuple[Tensor, Tensor]:
        signal, weight = learning_signal(objective, site.draws)
        logits, q = site.loose()
        mean = q.mean
        centre = mean.detach().requires_grad_()
        control = credit(objective, site.at(centre))
        (slope,) = torch.autograd.grad(control.sum(), centre)
        along = site.gathered(slope * (site.latent.value - centre.detach()))
        expansion = control.detach() + (along if objective.linear else along.sum(0, keepdim=True))
        residual = signal - expansion
        self.remember(residual, residual - self.average())
        score = site.latent.value - mean.detach()
        gradient = site.spread(residual - self.average()) * score + self.mean_part(slope, mean, logits)
        return weight * gradient, signal.new_zeros(())

    def mean_part(self, slope: Tensor, mean: Tensor, logits: Tensor) -> Tensor:
        """The gradient of the mean of the expansion."""
        return torch.autograd.grad((slope * mean).sum(), logits)[0]


class REBAR(LogitGradient):
    """The bound at a relaxed draw as control variate (Tucker et al. 2017, section 3).

    The relaxed draw is subtracted where the score is, conditional on the draw, and comes back along its path. The noise
    of both is the same, so that they lie at one point and the bound is evaluated there once. Temperature and scale of
    the control variate are trained to lower the variance, per datum, of the gradient in the logits.

    Args:
        temperature: of the relaxation, at the start.
        scale: of the control variate, at the start; the paper's eta.
    """

    name = "rebar"

    def __init__(self, temperature: float = 0.5, scale: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.control = _Control(temperature, scale)

    def surrogate(self, objective: Bound, soft: Particles, relaxed: Tensor, x: Tensor) -> Tensor:
        """The control variate at the relaxed draw, ``(K, N)`` or ``(1, N)`` nats."""
        return credit(objective, soft)

    def learned(self) -> list[nn.Parameter]:
        """What is trained to lower the variance."""
        return list(self.parameters())

    def of_logits(self, objective: Bound, site: DiscreteSite, x: Tensor) -> tuple[Tensor, Tensor]:
        signal, weight = learning_signal(objective, site.draws)
        logits, q = site.loose()
        temperature, scale = self.control()
        conditional = scores_given(site.latent.value, q)  # moves with the logits, the draw held still
        free = q.logits + (conditional - q.logits).detach()  # the same, the noise held still
        relaxed = _relaxed(q, conditional.detach(), temperature)
        control = self.surrogate(objective, site.at(relaxed), relaxed, x)
        (slope,) = torch.autograd.grad(control.sum(), relaxed, create_graph=True)
        paths = self.paths(slope, [_relaxed(q, scores, temperature) for scores in (free, conditional)], logits)
        score = site.latent.value - q.mean.detach()
        gradient = weight * (site.spread(signal - scale * control) * score + scale * paths)
        return gradient, self.training_term(gradient, site)

    def paths(self, slope: Tensor, relaxed: Sequence[Tensor], logits: Tensor) -> Tensor:
        """The gradient along the path of the free draw, less that along the path of the conditional one."""
        free, conditional = relaxed
        return torch.autograd.grad((slope * (free - conditional)).sum(), logits, create_graph=True)[0]

    def training_term(self, gradient: Tensor, site: DiscreteSite) -> Tensor:
        """A number whose gradient is that of minus half the log of the squared gradient, which stands for the variance.

        The logarithm keeps it of the size of one, whatever the bound is. It reaches what is learned here alone; the
        squared gradient depends on model and guide as well.
        """
        num_particles, num_data = site.draws.log_q.shape
        square = (gradient.sum(0) if num_particles > 1 else gradient).square().sum()
        parameters = self.learned()
        found = torch.autograd.grad(0.5 * square.clamp(min=torch.finfo(square.dtype).tiny).log(), parameters)
        return -torch.stack([(g * p).sum() for g, p in zip(found, parameters, strict=True)]).sum() / num_data


class RELAX(REBAR):
    """REBAR with a net added to the control variate (Grathwohl et al. 2018, section 3).

    The net reads the relaxed draw and the datum, and is trained with the rest.

    Args:
        temperature: see :class:`REBAR`.
        scale: see :class:`REBAR`.
        net: ``(N, L + D) -> (N, 1)``, of the L numbers of a latent and the D of a datum; by default one hidden layer,
            which is built when their shapes are known.
        hidden: units of the default net.
    """

    name = "relax"

    def __init__(
        self, temperature: float = 0.5, scale: float = 1.0, net: nn.Module | None = None, hidden: int = 100
    ) -> None:
        super().__init__(temperature, scale)
        self.hidden = hidden
        self.net = None if net is None else Visible(net, "surrogate")

    def prepare(self, event_shape: Sequence[int], latent_shape: Sequence[int] | None = None) -> None:
        if self.net is None and latent_shape is not None:
            size = prod(event_shape) + prod(latent_shape)
            net = nn.Sequential(nn.Linear(size, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 1))
            self.net = Visible(net, "surrogate")

    def surrogate(self, objective: Bound, soft: Particles, relaxed: Tensor, x: Tensor) -> Tensor:
        if self.net is None:
            raise StructureError(
                "the control variate of gradient=relax is a net that is not built yet: call "
                "objective.prepare(event_shape, latent_shape) with the shapes of a datum and of its latent, before the "
                "optimizer is made"
            )
        num_particles, num_data = soft.log_q.shape
        if x.shape[0] != num_data:
            raise StructureError("gradient=relax reads its control variate off the data: subsample them before")
        latents = relaxed.reshape(num_particles, num_data, -1)  # (K, N, *event) -> (K, N, L)
        data = x.reshape(num_data, -1).expand(num_particles, -1, -1)
        added = self.net(torch.cat([latents, data], -1)).squeeze(-1)  # (K, N)
        return super().surrogate(objective, soft, relaxed, x) + (
            added if objective.linear else added.mean(0, keepdim=True)
        )


class _Control(PyroModule):
    """Temperature and scale, where Pyro's own SVI finds them."""

    def __init__(self, temperature: float, scale: float) -> None:
        super().__init__("control")
        self.log_temperature = nn.Parameter(torch.tensor(log(temperature)))
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.log_temperature.exp(), self.scale


def _relaxed(q: Bits | OneHots, scores: Tensor, temperature: Tensor) -> Tensor:
    tempered = scores / temperature
    return tempered.softmax(-1) if isinstance(q, OneHots) else tempered.sigmoid()
