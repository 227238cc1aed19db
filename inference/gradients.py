"""How the gradient of a bound is estimated, whatever the bound: the pathwise estimators.

An objective says what is bounded, an estimator how its gradient with respect to the guide is taken. It decides how the
particles are drawn (with a gradient through their values or not, with one through the parameters of log q or not) and
returns the bound of each datum with its right value and a gradient whose expectation is right too.

What an estimator asks of an objective: ``from_particles(draws)``, the bound; ``contribution(draws)``, the ``(K, N)``
numbers it is made of; ``combine``, which makes the bound of them; and ``linear``, whether that is their mean.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from inference.particles import Particles
from inference.structure import Program, StructureError, expect_separate

Draw = Callable[..., Particles]  # particles(...) with everything given but how gradients flow


class Bound(Protocol):
    """What an estimator sees of an objective."""

    num_particles: int
    linear: bool
    local: bool
    log_q_is_sampled: bool

    def contribution(self, draws: Particles) -> Tensor: ...

    def combine(self, contributions: Tensor) -> Tensor: ...

    def from_particles(self, draws: Particles) -> Tensor: ...

    def double_reparameterization(self, contributions: Tensor) -> Tensor: ...


def with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value of one tensor with the gradient of another."""
    return value.detach() + (surrogate - surrogate.detach())


class GradientEstimator(nn.Module, ABC):
    """A way to take the gradient of a bound. A module, for what it learns or remembers."""

    name: ClassVar[str]

    def check(self, objective: Bound) -> None:
        """Refuse an objective whose gradient this does not estimate.

        Raises:
            StructureError: with the reason, and what would do.
        """

    def prepare(self, event_shape: Sequence[int], latent_shape: Sequence[int] | None = None) -> None:
        """Build what depends on the shape of a datum, and of its latent where there is one."""

    @abstractmethod
    def estimate(self, objective: Bound, draw: Draw, x: Tensor) -> tuple[Tensor, Particles]:
        """The bound of each datum, ``(N,)`` nats, right in value and gradient, and the particles behind it.

        Args:
            objective: the bound.
            draw: draws the particles; takes ``detach_draws``, ``detach_guide`` and ``through`` of
                :func:`inference.particles.particles`.
            x: data, ``(N, *event_shape)``.
        """


def expect_reparameterized(draws: Particles, name: str) -> None:
    """Refuse draws that gradients do not flow through."""
    if sites := draws.not_reparameterized:
        raise StructureError(
            f"the guide's sites {sites} cannot be reparameterized, and the {name} gradient through them would silently "
            "be zero; use objective.gradient=score_average, nvil, loo or vimco (for bits and one-hot vectors also "
            "muprop, rebar, relax or arm), or objective=trace_elbo or trace_enum"
        )


def expect_density(draws: Particles, name: str) -> None:
    """Refuse a guide without noise, of which there is no density to divide by."""
    if sites := draws.point_masses:
        raise StructureError(
            f"the guide gives one point for each datum at {sites}, which has no density, and {name} is about log q of "
            "its draws: several are copies of one, and their weights mean nothing. Use objective=elbo or trace_elbo, "
            "which then maximize log p(x, z), objective=beta with objective.beta=0, which maximizes log p(x|z), or a "
            "guide with a density"
        )


def expect_score_identity(draws: Particles, name: str) -> None:
    """Refuse draws whose score has a mean other than zero, for the density jumps at an edge that moves."""
    drawn = {**{site: latent.q for site, latent in draws.latents.items()}, **draws.auxiliary}
    if sites := [site for site, q in drawn.items() if not _has_score_identity(q)]:
        raise StructureError(
            f"the support of the guide's sites {sites} moves with its parameters and the density jumps at its edge, so "
            f"that the mean of the score is not zero and the {name} gradient is biased; use gradient=reparameterized"
        )


def expect_own_targets(draw: Draw, who: str, instead: str, programs: Iterable[Program] = ()) -> None:
    """Refuse programs with a parameter in common, while arguments are checked; see :func:`expect_separate`.

    Draws once more, for the check of a whole run is made without gradients.
    """
    if is_validation_enabled():
        with torch.random.fork_rng(), torch.enable_grad():
            draws = draw(detach_draws=True)
            expect_separate(draws.log_likelihood + draws.log_prior, draws.log_q, who, instead, programs)


def _has_score_identity(q: Any) -> bool:
    while getattr(q, "score_identity", True) and hasattr(q, "base_dist"):
        q = q.base_dist
    return getattr(q, "score_identity", True)


class Reparameterized(GradientEstimator):
    """Differentiates through the draws as functions of noise (Kingma and Welling 2014; Rezende et al. 2014)."""

    name = "reparameterized"
    detach_guide: ClassVar[bool] = False

    def estimate(self, objective: Bound, draw: Draw, x: Tensor) -> tuple[Tensor, Particles]:
        draws = draw(detach_guide=self.detach_guide)
        expect_reparameterized(draws, self.name)
        if self.detach_guide:
            expect_score_identity(draws, self.name)
        return objective.from_particles(draws), draws


class StickingTheLanding(Reparameterized):
    """The path derivative alone: log q is a function of the draws, its parameters held constant (Roeder et al. 2017).

    What is left out is the score of q, whose mean is zero. The gradient of a bound that is tight vanishes draw by
    draw, not on average only. In an average of weights inside a logarithm each score has a weight that depends on
    its own draw, and a mean that is not zero: there leaving it out is biased, and it is refused.
    """

    name = "stl"
    detach_guide = True

    def check(self, objective: Bound) -> None:
        _expect_sampled_log_q(objective, self.name)
        if not objective.linear:
            raise StructureError(
                f"gradient=stl is biased for {type(objective).__name__} with {objective.num_particles} particles: the "
                "score it leaves out has zero mean only where the bound is a mean over particles. Use gradient=dreg, "
                "its unbiased form for importance-weighted bounds, or one particle"
            )


class DoublyReparameterized(GradientEstimator):
    """Reparameterizes the score of q as well (Tucker et al. 2019): unbiased for importance-weighted bounds.

    With g the derivative of a bound in the log-weight of a draw, the score enters as -g times the score; as g depends
    on the same draw, its mean is that of minus the derivative of g along the path. Together with the path derivative
    of the bound, the one of each log-weight is multiplied by g minus dg/dlog w, which for the importance-weighted
    bound is the squared normalized weight. The model's gradient is the usual one.
    """

    name = "dreg"

    def check(self, objective: Bound) -> None:
        _expect_sampled_log_q(objective, self.name)

    def estimate(self, objective: Bound, draw: Draw, x: Tensor) -> tuple[Tensor, Particles]:
        scaling = PathScaling()
        draws = draw(detach_guide=True, through=scaling)
        expect_reparameterized(draws, self.name)
        expect_score_identity(draws, self.name)
        scaling.factor = objective.double_reparameterization(objective.contribution(draws).detach())
        return objective.from_particles(draws), draws


class PathScaling:
    """Multiplies the gradient that reaches the guide through its draws by a factor known after they are scored."""

    factor: Tensor  # (K, N)

    def __call__(self, value: Tensor, event_dim: int) -> Tensor:
        if not value.requires_grad:
            return value
        seen = value.view_as(value)
        seen.register_hook(lambda gradient: gradient * along_site(self.factor, gradient.dim(), event_dim))
        return seen


def along_site(factor: Tensor, dim: int, event_dim: int) -> Tensor:
    """(K, N) -> (K, *1 for other plates, N, *1 for the event) of ``dim``; without the K where the draws have none."""
    num_particles, num_data = factor.shape
    batch_dim = dim - event_dim
    leading = () if num_particles == 1 else (num_particles, *(1,) * (batch_dim - 2))
    return factor.reshape(*leading, num_data, *(1,) * event_dim)


def _expect_sampled_log_q(objective: Bound, name: str) -> None:
    if not objective.log_q_is_sampled:
        raise StructureError(
            f"gradient={name} is about log q of the draws, and {type(objective).__name__} takes its KL in closed form; "
            "use objective.kl=monte_carlo where it has that option, or gradient=reparameterized"
        )
