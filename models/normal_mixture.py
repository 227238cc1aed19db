"""Mixtures of normals whose draws carry gradients."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import linear


class ReparameterizedMixture(dist.MixtureSameFamily):
    """A mixture of diagonal normals over vectors whose draws carry gradients.

    Which component a draw comes from is not differentiable, but where it lies is: the distribution functions
    F_d(z_d | z_1 ... z_{d-1}) of a draw are uniform whatever the parameters, so that keeping them fixed says how the
    draw moves with the parameters (implicit reparameterization; Figurnov, Mohamed and Mnih 2018, equation 5). The
    density is the mixture's, exactly; where all data share the components, two matrix products give it, in double
    precision, since the square is taken apart. A draw of D entries from C components costs C D^2.

    Args:
        mixture_distribution: categorical over the components.
        component_distribution: independent normals, batch shape ``(*batch, C)``, event shape ``(D,)``.
    """

    has_rsample = True

    def log_prob(self, value: Tensor) -> Tensor:
        normal = self.component_distribution.base_dist
        loc, scale = (_shared(parameter) for parameter in (normal.loc, normal.scale))
        if loc is None or scale is None:
            return super().log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        # sum_d (z_d - m_d)^2 / s_d^2 = z^2 . s^-2 - 2 z . (m s^-2) + m^2 . s^-2, without a tensor of size (..., C, D)
        z, loc, precision = value.double(), loc.double(), scale.double() ** -2  # (..., D), (C, D), (C, D)
        constant = (loc**2 * precision - precision.log() + math.log(2 * math.pi)).sum(-1)  # (C,)
        squares = linear(z**2, precision) - 2 * linear(z, loc * precision)  # (..., C)
        log_weight = self.mixture_distribution.logits.log_softmax(-1)
        return (log_weight - 0.5 * (squares + constant)).logsumexp(-1).to(value.dtype)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        z = self.sample(sample_shape)
        return z + self._motion(z) if torch.is_grad_enabled() else z

    def _motion(self, z: Tensor) -> Tensor:
        """Zeros, with the derivative of the draws ``(..., D)`` with respect to the parameters."""
        normal = self.component_distribution.base_dist
        standard = (z.unsqueeze(-2) - normal.loc) / normal.scale  # (..., C, D)
        log_density = normal.log_prob(z.unsqueeze(-2))
        before = log_density.cumsum(-1) - log_density  # of the entries before each
        log_weight = (self.mixture_distribution.logits.unsqueeze(-1) + before).log_softmax(-2)
        weight = log_weight.exp()  # of the components, given the entries before each
        below, above = (0.5 * torch.erfc(sign * standard / 2**0.5) for sign in (-1, 1))
        # The weights add up to one: in the upper tail F - 1 has the same derivative and does not round to one.
        upper = (weight * below).sum(-2, keepdim=True).detach() > 0.5
        share = torch.where(upper, -above, below)  # (..., C, D)
        level = (weight * share).sum(-2)  # F, or F - 1: (..., D)
        with torch.no_grad():
            slope = -standard / normal.scale  # of the log densities
            off = torch.einsum("...cd,...ce->...de", weight * (share - level.unsqueeze(-2)), slope).tril(-1)
            density = (weight * log_density.exp()).sum(-2).clamp(min=torch.finfo(z.dtype).tiny)
            jacobian = off + torch.diag_embed(density)  # dF_d / dz_e
        change = (level - level.detach()).unsqueeze(-1)
        return -torch.linalg.solve_triangular(jacobian, change, upper=False).squeeze(-1)


def _shared(parameter: Tensor) -> Tensor | None:
    """The parameter ``(C, D)`` of components that are the same for every datum, or None where they are not."""
    batch = range(parameter.dim() - 2)
    if any(parameter.stride(dim) and parameter.shape[dim] > 1 for dim in batch):
        return None
    return parameter[(0,) * len(batch)]


def mixture_of(parts: Any, logits: Tensor) -> dist.TorchDistribution:
    """The mixture of a batch of distributions; its draws carry gradients where these are independent normals.

    Args:
        parts: batch shape ``(C,)``.
        logits: logarithms of the weights, up to a constant, ``(C,)``.
    """
    normal = isinstance(parts, dist.Independent) and isinstance(parts.base_dist, torch.distributions.Normal)
    kind = ReparameterizedMixture if normal and len(parts.event_shape) == 1 else dist.MixtureSameFamily
    return kind(dist.Categorical(logits=logits), parts)
