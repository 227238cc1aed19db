"""Mixtures of normals as posteriors, with gradients through their draws."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

from guides.gaussian import vector_size
from models.conditional import Conditional, NetFactory


class ReparameterizedMixture(dist.MixtureSameFamily):
    """A mixture of diagonal normals over vectors whose draws carry gradients.

    Which component a draw comes from is not differentiable, but where it lies is: the distribution functions
    F_d(z_d | z_1 ... z_{d-1}) of a draw are uniform whatever the parameters, so that keeping them fixed says how the
    draw moves with the parameters (implicit reparameterization; Figurnov, Mohamed and Mnih 2018, equation 5). The
    density is the mixture's, exactly. A draw of D entries from C components costs C D^2.

    Args:
        mixture_distribution: categorical over the components.
        component_distribution: independent normals, batch shape ``(*batch, C)``, event shape ``(D,)``.
    """

    has_rsample = True

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


class NormalMixture(Conditional):
    """A mixture of diagonal normals, for posteriors with several modes; read off the context by one net.

    Args:
        event_shape: shape of one draw, ``(D,)``.
        context_shape: shape of one context.
        net: builds the net, whose output is, for each component, its logit, D means and D log standard deviations.
        components: number of components.
    """

    support = "real"

    def __init__(
        self, event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory, components: int = 5
    ) -> None:
        super().__init__(event_shape, context_shape)
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}")
        dim = vector_size(event_shape, "NormalMixture")
        self.components, self.sizes = components, [1, dim, dim]
        self.net = net(self.context_shape, (components * sum(self.sizes),))

    def forward(self, *context: Tensor) -> dist.Distribution:
        output = self.net(*context).unflatten(-1, (self.components, -1))  # (*batch, C (1 + 2 D)) -> (*batch, C, ...)
        logits, loc, log_scale = output.split(self.sizes, dim=-1)
        parts = dist.Normal(loc, log_scale.exp()).to_event(1)
        return ReparameterizedMixture(dist.Categorical(logits=logits.squeeze(-1)), parts)
