"""The reparameterizable families by name, and a prior made of any of them.

A family draws z = g(noise, parameters) with g differentiable in every parameter, so that the gradient of an expectation
is the expectation of a gradient (Kingma and Welling 2014, section 2.4). It gets there by one of three routes: the
inverse CDF, location plus scale, or composition of other draws. ``FAMILIES`` says for each which parameters it has and
what they may be; real numbers are mapped there by :func:`torch.distributions.transform_to`, a positive parameter by the
exponential.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import transform_to

from models.composition import Erlang
from models.conditional import Conditional
from models.inverse_cdf import Cauchy, Gompertz, Logistic, Pareto, Rayleigh, Reciprocal
from models.location_scale import Elliptical, Triangular, uniform
from models.nets import stacked_shape

INVERSE_CDF, LOCATION_SCALE, COMPOSITION = "inverse CDF", "location-scale", "composition"


@dataclass(frozen=True)
class Family:
    """How to make the distributions of one family out of real numbers.

    Args:
        constructor: takes the parameters by name.
        parameters: name to constraint, in the order in which a net writes them.
        routes: the ways to reparameterize it: inverse CDF, location-scale or composition.
        support: the smallest of ``"real"``, ``"positive"``, ``"unit interval"`` and ``"simplex"`` that has the
            supports of all its members.
        event_dim: 0 where the coordinates are independent, 1 where the last dimension of an event is drawn jointly.
        moving_support: whether the support depends on the parameters.
        score_identity: whether the mean of the gradient of log q(z) with respect to each parameter is zero. Where
            the density jumps at a moving edge it is not, and neither score-function gradients nor estimators that
            leave that term out (sticking the landing, DReG) are right; pathwise gradients are.
        moments: the largest whole order of which every member has a finite absolute moment.
        tail_order: minus the log-density of every member grows no faster than this power of |z|; infinite where
            no one power will do. The mean of one family's log-density under another is finite where the other has
            moments of this order, and is light where this one is steep.
        steep: the side on which minus the log-density of members grows exponentially: ``"left"`` or ``"right"``.
        light: the side on which E exp(t |z|) is finite for every t, or ``"both"``; none need say so of the left
            whose draws are not negative.
    """

    constructor: Callable[..., dist.TorchDistribution]
    parameters: Mapping[str, constraints.Constraint]
    routes: tuple[str, ...]
    support: str = "real"
    event_dim: int = 0
    moving_support: bool = False
    score_identity: bool = True
    moments: float = math.inf
    tail_order: float = math.inf
    steep: str = ""
    light: str = ""

    def is_light(self, side: str) -> bool:
        """Whether exponentials of any rate have a mean on that side."""
        return self.light in (side, "both") or (side == "left" and self.support != "real")

    def shapes(self, event_shape: Sequence[int]) -> dict[str, torch.Size]:
        """The shape of each parameter, batch dimensions apart.

        Raises:
            ValueError: on events that have no such distribution.
        """
        event = torch.Size(event_shape)
        if len(event) == 0 or (self.support == "simplex" and event[-1] < 2):
            least = "a last dimension of at least 2" if self.support == "simplex" else "at least one dimension"
            raise ValueError(f"a draw needs {least}, got event_shape {tuple(event)}")
        if self.event_dim == 0:
            return dict.fromkeys(self.parameters, event)
        by_dim = (event[:-1], event, event + event[-1:])  # one for each event, a vector, a matrix
        return {name: by_dim[constraint.event_dim] for name, constraint in self.parameters.items()}

    def output_shape(self, event_shape: Sequence[int]) -> torch.Size:
        """The shape of all parameters together, as a net writes them: stacked over images, otherwise a vector."""
        shapes = self.shapes(event_shape)
        if self.event_dim == 0:
            return stacked_shape(event_shape, len(shapes))
        return torch.Size((sum(math.prod(shape) for shape in shapes.values()),))

    def distribution(self, output: Tensor, event_shape: Sequence[int]) -> dist.TorchDistribution:
        """The member with unconstrained parameters ``output``, ``(*batch, *output_shape)``; one draw is its event."""
        shapes = self.shapes(event_shape)
        flat = output.flatten(-len(self.output_shape(event_shape)))  # (*batch, all parameters)
        parts = flat.split([math.prod(shape) for shape in shapes.values()], dim=-1)
        parameters = {
            name: transform_to(self.parameters[name])(part.reshape(part.shape[:-1] + shape))
            for part, (name, shape) in zip(parts, shapes.items(), strict=True)
        }
        return self.constructor(**parameters).to_event(len(event_shape) - self.event_dim)


def _above(bound: float) -> constraints.Constraint:
    return constraints.greater_than(bound)


_real, _positive, _vector = constraints.real, constraints.positive, constraints.real_vector
_loc_scale = {"loc": _real, "scale": _positive}

# Where the table asks a tail exponent for more than its distribution does, the second moment is finite, and with it the
# mean of a Gaussian log-density. The Cauchy distribution has no moments: under a Gaussian prior its bound is minus
# infinity, and each estimate of it finite.
FAMILIES: dict[str, Family] = {
    "exponential": Family(dist.Exponential, {"rate": _positive}, (INVERSE_CDF,), "positive", tail_order=1),
    "cauchy": Family(Cauchy, _loc_scale, (INVERSE_CDF,), moments=0, tail_order=0),
    "logistic": Family(Logistic, _loc_scale, (INVERSE_CDF, LOCATION_SCALE), tail_order=1),
    "rayleigh": Family(Rayleigh, {"scale": _positive}, (INVERSE_CDF,), "positive", tail_order=2, light="right"),
    "pareto": Family(
        Pareto,
        {"scale": _positive, "alpha": _above(2.0)},
        (INVERSE_CDF,),
        "positive",
        moving_support=True,
        score_identity=False,
        moments=2,
    ),
    "weibull": Family(dist.Weibull, {"scale": _positive, "concentration": _positive}, (INVERSE_CDF,), "positive"),
    "reciprocal": Family(
        Reciprocal,
        {"low": _positive, "ratio": _above(1.0)},
        (INVERSE_CDF,),
        "positive",
        moving_support=True,
        score_identity=False,
        light="right",
    ),
    "gompertz": Family(
        Gompertz,
        {"concentration": _positive, "rate": _positive},
        (INVERSE_CDF,),
        "positive",
        steep="right",
        light="right",
    ),
    "gumbel": Family(dist.Gumbel, _loc_scale, (INVERSE_CDF,), steep="left", light="left"),
    "erlang": Family(Erlang, {"rate": _positive}, (COMPOSITION,), "positive", tail_order=1),
    "laplace": Family(dist.Laplace, _loc_scale, (LOCATION_SCALE,), tail_order=1),
    "elliptical": Family(
        Elliptical,
        {"loc": _vector, "scale_tril": constraints.lower_cholesky, "power": _positive},
        (LOCATION_SCALE,),
        event_dim=1,
    ),
    "student_t": Family(dist.StudentT, {"df": _above(2.0), **_loc_scale}, (LOCATION_SCALE,), moments=2, tail_order=0),
    "uniform": Family(
        uniform,
        {"loc": _real, "width": _positive},
        (LOCATION_SCALE,),
        moving_support=True,
        score_identity=False,
        light="both",
    ),
    "triangular": Family(
        Triangular,
        {"loc": _real, "width": _positive, "peak": constraints.unit_interval},
        (LOCATION_SCALE,),
        moving_support=True,
        light="both",
    ),
    "gaussian": Family(dist.Normal, _loc_scale, (LOCATION_SCALE,), tail_order=2, light="both"),
    "lognormal": Family(dist.LogNormal, _loc_scale, (COMPOSITION,), "positive", tail_order=1),
    "gamma": Family(
        dist.Gamma, {"concentration": _positive, "rate": _positive}, (COMPOSITION,), "positive", tail_order=1
    ),
    "dirichlet": Family(
        dist.Dirichlet,
        {"concentration": constraints.independent(_positive, 1)},
        (COMPOSITION,),
        "simplex",
        event_dim=1,
        tail_order=0,
        light="both",
    ),
    "beta": Family(
        dist.Beta,
        {"concentration1": _positive, "concentration0": _positive},
        (COMPOSITION,),
        "unit interval",
        tail_order=0,
        light="both",
    ),
    "chi2": Family(dist.Chi2, {"df": _positive}, (COMPOSITION,), "positive", tail_order=1),
    "f": Family(
        dist.FisherSnedecor,
        {"df1": _positive, "df2": _above(4.0)},
        (COMPOSITION,),
        "positive",
        moments=2,
        tail_order=1,
    ),
}

# Support of p -> supports of q that lie in it and have volume there. The simplex has none in R^D.
_CONTAINS: dict[str, tuple[str, ...]] = {
    "real": ("real", "positive", "unit interval"),
    "positive": ("positive", "unit interval"),
    "unit interval": ("unit interval",),
    "simplex": ("simplex",),
}


def find(family: str) -> Family:
    """A family by its word."""
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; accepted: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[family]


def region(support: constraints.Constraint) -> str | None:
    """What a support is called in the table; None where it is discrete, none of those, or moves with parameters."""
    while hasattr(support, "base_constraint"):  # independent coordinates, mixtures
        support = support.base_constraint
    bounds = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    if support.is_discrete or any(isinstance(bound, Tensor) for bound in bounds):
        return None
    if bounds == [0, 1]:
        return "unit interval"
    if bounds == [0, None]:
        return "positive"
    by_type: dict[Any, str] = {type(constraints.real): "real", type(constraints.simplex): "simplex"}
    return by_type.get(type(support))


def families_inside(where: str | None, tail_order: float = 0, steep: str = "") -> list[str]:
    """The words of all families that have a finite divergence from a density on that region with such tails.

    For ``tail_order`` and ``steep``, see :class:`Family`.
    """
    inside = _CONTAINS.get(where or "", ())
    finite = {w: f for w, f in FAMILIES.items() if f.support in inside and f.moments >= tail_order}
    return sorted(word for word, family in finite.items() if not steep or family.is_light(steep))


class FamilyPrior(Conditional):
    """One learned member of any reparameterizable family, the same for all data.

    It starts where all unconstrained parameters are zero: at N(0, I), at rate 1, at the flat Dirichlet. The guide's
    draws must lie in its support, which families with moving ends cannot promise: those are refused.

    Args:
        event_shape: shape of one latent.
        context_shape: shape of a context to ignore, where one is given.
        family: one of :data:`FAMILIES`.
    """

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int] = (), family: str = "gaussian") -> None:
        super().__init__(event_shape, context_shape)
        if find(family).moving_support:
            fixed = ", ".join(sorted(word for word, other in FAMILIES.items() if not other.moving_support))
            raise ValueError(f"the support of {family} moves with its parameters, away from latents; accepted: {fixed}")
        self.family, self.tail_order, self.steep = family, find(family).tail_order, find(family).steep
        self.unconstrained = nn.Parameter(torch.zeros(find(family).output_shape(event_shape)))

    def forward(self, *context: Tensor) -> dist.Distribution:
        return find(self.family).distribution(self.unconstrained, self.event_shape)
