"""Residual maps with one hidden layer of tanh, and their inverses by root finding."""

import math

import torch
from pyro.distributions.transforms.planar import ConditionedPlanar
from torch import Tensor
from torch.distributions import Transform, constraints

BISECTIONS, NEWTON_STEPS = 10, 10


def monotone_root(r: Tensor, s: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """The v with ``v + r tanh(s v + b) = t``, unique as ``r s > -1``; all arguments broadcast.

    Bisection and then Newton steps that stay in the bracket, always the same number of them: nothing waits for the
    device. No gradient flows through it; see :func:`newton_step`.
    """
    with torch.no_grad():
        low, high = t - r.abs(), t + r.abs()
        v = t
        for step in range(BISECTIONS + NEWTON_STEPS):
            h = torch.tanh(s * v + b)
            excess = v + r * h - t
            low, high = torch.where(excess < 0, v, low), torch.where(excess < 0, high, v)
            middle = (low + high) / 2
            newton = v - excess / (1 + r * s * (1 - h * h))
            inside = (newton >= low) & (newton <= high)
            v = middle if step < BISECTIONS else torch.where(inside, newton, middle)
    return v


def newton_step(root: Tensor, r: Tensor, s: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """One Newton step from a root: the same number, with the root's derivative by all arguments."""
    h = torch.tanh(s * root + b)
    slope = (1 + r * s * (1 - h * h)).detach()
    return root - (root + r * h - t) / slope


def identity_shift(w: Tensor) -> Tensor:
    """What to add to the u of a planar map so that u = 0 is the identity, ``(..., D)``.

    Pyro keeps ``w'u > -1`` by moving ``w'u`` to ``softplus(w'u) - 1``, which is zero at log(e - 1).
    """
    return math.log(math.e - 1) * w / w.square().sum(-1, keepdim=True)


class InvertiblePlanar(ConditionedPlanar):
    """Pyro's planar map with an inverse: ``w'x`` is the root of an increasing function of one variable.

    Args:
        params: b, u, w with trailing dimensions 1, D and D.
    """

    def _inverse(self, y: Tensor) -> Tensor:
        b, u, w = self._params
        u = self.u_hat(u, w)
        r, t = (w * u).sum(-1, keepdim=True), (w * y).sum(-1, keepdim=True)
        one = torch.ones_like(r)
        root = newton_step(monotone_root(r, one, b, t), r, one, b, t)
        return y - u * torch.tanh(root + b)


def upper_triangle(strict: Tensor, diagonal: Tensor) -> Tensor:
    """Upper triangular matrices ``(..., D, D)`` of the entries above the diagonal, by rows, and those on it."""
    dim = diagonal.shape[-1]
    rows, columns = torch.triu_indices(dim, dim, 1, device=diagonal.device).unbind()
    matrix = torch.diag_embed(diagonal)
    matrix[..., rows, columns] = strict
    return matrix


def orthogonal(reflections: Tensor) -> Tensor:
    """The product of Householder reflections along vectors ``(..., H, D)``, an orthogonal ``(..., D, D)``."""
    unit = reflections / reflections.norm(dim=-1, keepdim=True)
    product = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
    for v in unit.unbind(-2):
        product = product - 2 * (product @ v.unsqueeze(-1)) * v.unsqueeze(-2)
    return product


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)  # (..., D, D) x (..., D) -> (..., D)


class SylvesterTransform(Transform):
    """``y = x + Q R tanh(S Q'x + b)`` (van den Berg et al. 2018, equation 13).

    Args:
        reflections: the vectors of Q's Householder reflections, ``(..., H, D)``.
        r: upper triangular ``(..., D, D)``.
        s: upper triangular ``(..., D, D)``; every ``r_ii s_ii`` exceeds -1.
        b: ``(..., D)``.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, reflections: Tensor, r: Tensor, s: Tensor, b: Tensor) -> None:
        super().__init__()
        self.q, self.r, self.s, self.b = orthogonal(reflections), r, s, b
        self.product = r.diagonal(dim1=-2, dim2=-1) * s.diagonal(dim1=-2, dim2=-1)

    def _hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(_times(self.s, _times(self.q.mT, x)) + self.b)

    def _call(self, x: Tensor) -> Tensor:
        return x + _times(self.q, _times(self.r, self._hidden(x)))

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self._hidden(x)
        return x + _times(self.q, _times(self.r, h)), self._log_det(h)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self._log_det(self._hidden(x))

    def _log_det(self, h: Tensor) -> Tensor:
        # det(I + Q R H S Q') = det(I + H S R), upper triangular, for H the diagonal of slopes of tanh
        return torch.log1p((1 - h * h) * self.product).sum(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        """In the basis of Q the map is triangular: the last entry is the root of a function of it alone, and so on."""
        target = _times(self.q.mT, y)
        found: list[Tensor] = []  # entries i+1 ... D of Q'x
        hidden: list[Tensor] = []  # the same entries of tanh(S Q'x + b)
        for i in reversed(range(y.shape[-1])):
            b, t = self.b[..., i], target[..., i]
            for j, (v, h) in enumerate(zip(found, hidden, strict=True), start=i + 1):
                b, t = b + self.s[..., i, j] * v, t - self.r[..., i, j] * h
            r, s = self.r[..., i, i], self.s[..., i, i]
            root = newton_step(monotone_root(r, s, b, t), r, s, b, t)
            found.insert(0, root)
            hidden.insert(0, torch.tanh(s * root + b))
        return y - _times(self.q, _times(self.r, torch.stack(hidden, dim=-1)))
