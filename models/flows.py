"""Normalizing flows: invertible maps from Pyro, zuko and here, behind one distribution.

A layer is a module whose ``forward(context)`` returns a :class:`torch.distributions.Transform` over vectors; zuko's
lazy transforms are of this type, and :class:`PyroLayer` gives it to Pyro's. ``context`` is ``(*batch, context_dim)``
features, or ``None`` for a layer made with ``context_dim=0``, whose map is the same for all data. Every layer made
here starts as the identity, so that an untrained flow is its base distribution.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import ConditionalTransformModule, constraints
from torch import Tensor, nn
from torch.distributions import Transform

from models.invertible import InvertiblePlanar, SylvesterTransform, identity_shift, upper_triangle
from models.zuko_maps import (
    AutoregressiveTransform,
    CouplingTransform,
    GeneralCouplingTransform,
    MaskedAutoregressiveTransform,
    MonotonicRQSTransform,
)


class Flow(dist.TorchDistribution):
    """A base distribution over vectors, pushed through invertible maps (Rezende and Mohamed 2015, equation 7).

    The density of its latest draw is known from the drawing, and :meth:`log_prob` returns it without inverting
    anything; every other value is pulled back through the maps. Nothing else is remembered: not by the maps, whose
    own caches are emptied after use, nor beyond this object, so that a second backward pass, a copied module or a
    draw scored under other gradients never meets an old graph. Costs are those of the maps, see their layers.

    Args:
        base: distribution with event shape ``(D,)``.
        transforms: maps of vectors ``(..., D)``, the first of which meets the base's draws.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(
        self, base: dist.TorchDistribution, transforms: Sequence[Transform], validate_args: bool | None = None
    ) -> None:
        self.base, self.transforms = base, list(transforms)
        self._latest: tuple[Tensor, Tensor] | None = None
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        return self.base.has_rsample

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Flow":
        new = self._get_checked_instance(Flow, _instance)
        new.base, new.transforms, new._latest = self.base.expand(batch_shape), self.transforms, None
        super(Flow, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self._push(self.base.sample(sample_shape))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self._push(self.base.rsample(sample_shape))

    def _push(self, value: Tensor) -> Tensor:
        log_prob = self.base.log_prob(value)
        for transform in self.transforms:
            value, log_det = push(transform, value)
            log_prob = log_prob - log_det
        self._latest = value, log_prob
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if self._latest is not None and value is self._latest[0]:
            known = self._latest[1]
            if known.requires_grad or not torch.is_grad_enabled():  # else it was drawn without the graph wanted now
                return known
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))
        total = torch.zeros_like(value[..., 0])
        for transform in reversed(self.transforms):
            value, log_det = pull(transform, value)
            total = total + log_det
        return self.base.log_prob(value) - total


def push(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    """``y = f(x)`` and log abs det df/dx, ``(..., D) -> (..., D), (...,)``."""
    y, log_det = transform.call_and_ladj(x)  # type: ignore[attr-defined]
    _forget(transform)
    return y, log_det


def pull(transform: Transform, y: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` with ``f(x) = y``, and log abs det df/dx at it, ``(..., D) -> (..., D), (...,)``."""
    if hasattr(transform, "inverse_and_ladj"):
        return transform.inverse_and_ladj(y)
    x = transform.inv(y)
    _forget(transform)  # some of Pyro's now hold the pair (x, y) and no derivative, or an old one
    log_det = transform.log_abs_det_jacobian(x, y)
    _forget(transform)
    return x, log_det


def _forget(transform: Transform) -> None:
    """Empty the caches in which Pyro's transforms keep the graph of their latest call."""
    for name in [name for name in vars(transform) if name.startswith("_cached_")]:
        setattr(transform, name, (None, None) if name == "_cached_x_y" else None)


class PyroLayer(nn.Module):
    """A transform module of Pyro's as a layer.

    Args:
        transform: a ``TransformModule``, or a ``ConditionalTransformModule`` that is to be conditioned on the context.
    """

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, context: Tensor | None = None) -> Transform:
        transform: Any = self.transform
        return transform.condition(context) if isinstance(transform, ConditionalTransformModule) else transform


class Readout(nn.Module):
    """Numbers that are affine in the context, and start the same for all; free parameters where there is none.

    Args:
        context_dim: number of context features; 0 for none.
        start: the numbers to start from, ``(P,)``.
    """

    def __init__(self, context_dim: int, start: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(start)
        self.weight = nn.Parameter(torch.zeros(len(start), context_dim)) if context_dim else None

    def forward(self, context: Tensor | None) -> Tensor:
        return self.bias if self.weight is None else nn.functional.linear(context, self.weight, self.bias)  # type: ignore[arg-type]


class PlanarLayer(nn.Module):
    """``y = x + u tanh(w'x + b)``, Pyro's map with an inverse (Rezende and Mohamed 2015, equation 10).

    Draws cost one evaluation; scoring a foreign value finds one root of one variable.

    Args:
        dim: D.
        context_dim: number of context features that u, w and b are read from.
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__()
        self.sizes = [1, dim, dim]
        self.readout = Readout(context_dim, torch.cat([torch.zeros(1 + dim), torch.randn(dim) / dim**0.5]))

    def forward(self, context: Tensor | None = None) -> Transform:
        b, u, w = self.readout(context).split(self.sizes, dim=-1)
        return InvertiblePlanar((b, u + identity_shift(w), w))


class SylvesterLayer(nn.Module):
    """``y = x + Q R tanh(S Q'x + b)`` with an orthogonal Q of Householder reflections (van den Berg et al. 2018).

    R and S are upper triangular. Pyro's Sylvester transform is not used: its log-determinant is that of Q = I, it
    has no inverse, and its parameters cannot be read off a context. Draws cost one evaluation; scoring a foreign
    value finds D roots, one after the other.

    Args:
        dim: D, also the width of the hidden layer.
        context_dim: number of context features that all parameters are read from.
        householder: number of reflections.
    """

    def __init__(self, dim: int, context_dim: int = 0, householder: int = 4) -> None:
        super().__init__()
        if householder < 1:
            raise ValueError(f"householder must be at least 1, got {householder}")
        self.dim = dim
        strict = dim * (dim - 1) // 2
        self.sizes = [strict, dim, strict, dim, dim, householder * dim]
        reflections = torch.randn(householder * dim)
        # R = 0 makes the map the identity, S and b at random let R learn.
        start = [torch.zeros(strict + dim), torch.randn(strict) / dim**0.5, torch.randn(dim), torch.randn(dim)]
        self.readout = Readout(context_dim, torch.cat([*start, reflections]))

    def forward(self, context: Tensor | None = None) -> Transform:
        r, r_diagonal, s, s_diagonal, b, reflections = self.readout(context).split(self.sizes, dim=-1)
        return SylvesterTransform(
            reflections.unflatten(-1, (-1, self.dim)),  # (..., H D) -> (..., H, D)
            upper_triangle(r, r_diagonal.tanh()),
            upper_triangle(s, s_diagonal.tanh()),
            b,
        )


class _Coupling(CouplingTransform):
    """zuko's coupling with places of the halves that are known beforehand, and its inverse in one network call."""

    def __init__(self, meta: Any, kept: Tensor, changed: Tensor) -> None:
        Transform.__init__(self)
        self.meta, self.idx_a, self.idx_b = meta, kept, changed

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        kept, y_changed = self.split(y)
        transform = self.meta(kept)
        x_changed = transform.inv(y_changed)
        log_det = transform.log_abs_det_jacobian(x_changed, y_changed)
        return self.merge(kept, x_changed, y.shape), log_det


class CouplingLayer(GeneralCouplingTransform):
    """zuko's coupling layer: half of the entries change by an amount read off the others (Dinh et al. 2017).

    One network call in either direction. Its scale lies between 1e-3 and 1e3.

    Args:
        dim: D, at least 2.
        context_dim: number of context features.
        odd: which entries stay as they are: the odd ones, or the even ones.
        hidden: widths of the network's layers.
        univariate: options of zuko's layer that choose the map of one entry; affine where none are given.
    """

    kept: Tensor
    changed: Tensor

    def __new__(cls, *args: Any, **kwargs: Any) -> "CouplingLayer":
        return nn.Module.__new__(cls)  # zuko's own makes something else of one-dimensional layers

    def __init__(
        self, dim: int, context_dim: int = 0, odd: bool = True, hidden: Sequence[int] = (64,), **univariate: Any
    ) -> None:
        mask = torch.arange(_at_least_two(dim, "a coupling flow")) % 2 == int(odd)
        super().__init__(dim, context_dim, mask, hidden_features=tuple(hidden), activation=nn.ELU, **univariate)
        self.register_buffer("kept", mask.nonzero().squeeze(-1), persistent=False)
        self.register_buffer("changed", (~mask).nonzero().squeeze(-1), persistent=False)
        _silence(self.hyper[-1])

    def forward(self, c: Tensor | None = None) -> Transform:
        return _Coupling(partial(self.meta, c), self.kept, self.changed)


def spline_layer(
    dim: int, context_dim: int = 0, odd: bool = True, hidden: Sequence[int] = (64,), bins: int = 8
) -> CouplingLayer:
    """A coupling layer whose entries go through rational-quadratic splines on [-5, 5], the identity beyond.

    Durkan et al. (2019), zuko's spline. Arguments as of :class:`CouplingLayer`; ``bins`` is the number of pieces.
    """
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
    shapes = [(bins,), (bins,), (bins - 1,)]
    return CouplingLayer(dim, context_dim, odd, hidden, univariate=MonotonicRQSTransform, shapes=shapes)


class _Autoregressive(AutoregressiveTransform):
    """zuko's autoregressive map; the inverse's last pass has the derivative already."""

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.zeros_like(y)
        for _ in range(self.passes):
            transform = self.meta(x)
            x = transform.inv(y)
        # Entry i was found in pass i and kept its value since, so that the last pass saw all that it depends on.
        return x, transform.log_abs_det_jacobian(x, y)


class AutoregressiveLayer(MaskedAutoregressiveTransform):
    """zuko's masked autoregressive layer, drawing fast: ``y_i`` is affine in ``x_i``, by ``x_j`` with j < i.

    The inverse autoregressive flow of Kingma et al. (2016): one network call for a draw and its density, D calls,
    one after the other, for a foreign value. Its ``inv`` is the masked autoregressive flow (Papamakarios et al.
    2017), which scores fast and draws slowly. Scales lie between 1e-3 and 1e3.

    Args:
        dim: D, at least 2.
        context_dim: number of context features.
        backwards: count the entries from the last one on.
        hidden: widths of the masked network's layers.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "AutoregressiveLayer":
        return nn.Module.__new__(cls)  # zuko's own makes something else of one-dimensional layers

    def __init__(self, dim: int, context_dim: int = 0, backwards: bool = False, hidden: Sequence[int] = (64,)) -> None:
        order = torch.arange(_at_least_two(dim, "an autoregressive flow"))
        order = order.flip(0) if backwards else order
        super().__init__(dim, context_dim, order=order, hidden_features=tuple(hidden), activation=nn.ELU)
        _silence(self.hyper[-1])

    def forward(self, c: Tensor | None = None) -> Transform:
        return _Autoregressive(partial(self.meta, c), self.passes)


def _silence(layer: nn.Linear) -> None:
    """Let a network start at zero, where the map that it feeds is the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _at_least_two(dim: int, owner: str) -> int:
    if dim < 2:
        raise ValueError(
            f"{owner} needs at least 2 dimensions, got {dim}; accepted with 1: guide=planar, or prior=mixture"
        )
    return dim
