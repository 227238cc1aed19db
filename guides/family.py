"""Any reparameterizable family as a guide core."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from models.conditional import Conditional, NetFactory
from models.families import FAMILIES, families_inside, find, region
from models.vamp import Aggregate


class FamilyConditional(Conditional):
    """Any reparameterizable family (Laplace, logistic, Student-t, elliptical, gamma, ...), every parameter amortized.

    The ELBO is a bound on log p(x) wherever the support of q(z|x) lies in that of the prior and has volume there. So
    positive families and the beta distribution may be used under N(0, I), on one orthant or in one cube of R^D: their
    bound is valid, but with the latents of the whole posterior it cannot be tight, and an importance-weighted bound
    rises to the evidence of that orthant alone. Not valid, and refused, are families that leave the prior's support,
    and the Dirichlet under a density on R^D: its draws are points of the simplex, of volume zero there, so that the
    divergence is infinite and a difference of the two log-densities means nothing. Its place is under a prior on the
    simplex, where it takes the last dimension of an event as one vector of probabilities. Nor are families without the
    moments that the prior's log-density needs: the mean of z^2 under a Cauchy distribution is infinite, so that under a
    normal prior its bound is minus infinity, though every estimate of it is finite.

    Args:
        event_shape: shape of one draw.
        context_shape: shape of one context.
        net: builds the net, whose output is the unconstrained parameters, one after the other in the table's order.
        family: one of :data:`~models.families.FAMILIES`.
        model: the model whose prior support and tails are checked against, where one is given.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_shape: Sequence[int],
        net: NetFactory,
        family: str = "gaussian",
        model: Any = None,
    ) -> None:
        super().__init__(event_shape, context_shape)
        self.family = family
        self.output_shape = find(family).output_shape(event_shape)
        _check_divergence(family, model)
        self.net = net(self.context_shape, self.output_shape)

    def forward(self, *context: Tensor) -> dist.Distribution:
        return FAMILIES[self.family].distribution(self.net(*context), self.event_shape)


def _check_divergence(family: str, model: Any) -> None:
    """Refuse a family whose divergence from a known prior is infinite."""
    support = _support_of_prior(model)
    if support is None:
        return
    where, tail_order = region(support), model.prior.tail_order or 0
    steep = model.prior.steep
    accepted = families_inside(where, tail_order, steep)
    if family not in accepted:
        listed = f"a family inside it: {', '.join(accepted)}" if accepted else "no family under that prior"
        if family in families_inside(where, tail_order):
            reason = (
                f"-log p(z) of the prior grows exponentially to the {steep}, and the mean of an exponential is "
                f"infinite for members of {family}, whose tail there is too heavy"
            )
        elif family in families_inside(where):
            reason = (
                f"{family} has absolute moments up to order {FAMILIES[family].moments:g}, and -log p(z) of the prior "
                f"grows like order {tail_order:g}"
            )
        else:
            reason = (
                f"draws of {family} ({FAMILIES[family].support}) have no density inside the prior's support "
                f"({where or 'discrete or bounded by parameters'})"
            )
        raise ValueError(f"KL(q || p) is infinite, for {reason}; accepted: {_elsewhere(family, where)}{listed}")


def _elsewhere(family: str, where: str | None) -> str:
    """What to ask for instead of the prior."""
    moving = FAMILIES[family].moving_support
    real = FAMILIES[family].support == "real" and where != "real"
    return "prior=standard, or " if moving or real else f"prior=family prior.family={family}, or "


def _support_of_prior(model: Any) -> constraints.Constraint | None:
    """None for a program of its own, or a hierarchy: the first step scores its draws with all checks on.

    None, too, for a prior that is made of this very family.
    """
    prior = getattr(model, "prior", None)
    if not isinstance(prior, Conditional) or prior.context_shape or isinstance(prior, Aggregate):
        return None
    try:
        with torch.no_grad():
            return prior().support
    except NotImplementedError:
        return None
