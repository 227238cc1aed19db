"""Guides that draw bits and one-hot vectors: for score-function gradients, and for sums over states."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import pyro.distributions as dist
from torch import Tensor, nn

from models.conditional import Conditional, NetFactory
from models.discrete import Bits, OneHots, check_states, joint
from models.vamp import Aggregate


class IndependentDraws(Conditional):
    """Independent discrete variables, whose logits one net reads off the context; leaves say of which kind.

    Args:
        event_shape: shape of one latent.
        context_shape: shape of one context.
        net: builds the net.
        model: the model whose prior the draws are checked against, where one is given.
    """

    entry: ClassVar[type[Bits] | type[OneHots]]  # the distribution of one variable
    expects: ClassVar[tuple[type, str, str]]  # what the prior is over, what the draws are, the prior's word

    def __init__(
        self, event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory, model: Any = None
    ) -> None:
        super().__init__(event_shape, context_shape)
        expect_prior(model, *self.expects)
        self.net = net(self.context_shape, self.event_shape)

    def forward(self, *context: Tensor) -> dist.Distribution:
        return joint(self.draws(self.net(*context)), len(self.event_shape))

    def draws(self, logits: Tensor) -> Bits | OneHots:
        """The distribution of single variables with these logits."""
        return self.entry(logits)


class BernoulliBits(IndependentDraws):
    """Independent bits, whose log-odds one net reads off the context; for prior=bits.

    Their draws have no path to a parameter: use gradient=score_average, nvil, loo, vimco, muprop, rebar, relax or arm.

    Args:
        event_shape: shape of one latent, a bit at each place.
        context_shape: shape of one context.
        net: builds the net, whose output is the log-odds.
        model: the model whose prior the draws are checked against, where one is given.
    """

    entry = Bits
    expects = dist.Bernoulli, "draws bits", "bits"


class OneHotCategoricals(IndependentDraws):
    """Independent one-hot vectors, whose class logits one net reads off the context; for prior=onehot.

    Their draws have no path to a parameter: use gradient=score_average, nvil, loo, vimco, muprop, rebar, relax or arm.

    Args:
        event_shape: shape of one latent, ``(variables, classes)``, or ``(H, W, classes)`` of a grid.
        context_shape: shape of one context.
        net: builds the net, whose output is the logits of the classes; for a grid it writes an image of them.
        model: the model whose prior the draws are checked against, where one is given.
    """

    entry = OneHots
    expects = dist.OneHotCategorical, "draws one-hot vectors", "onehot"

    def __init__(
        self, event_shape: Sequence[int], context_shape: Sequence[int], net: NetFactory, model: Any = None
    ) -> None:
        super().__init__(event_shape, context_shape, partial(ClassesLast, net) if len(event_shape) > 2 else net, model)


class ClassesLast(nn.Module):
    """A net that writes images, one channel for each class, with the classes put last.

    Args:
        net: builds the net.
        in_shape: shape of its input.
        out_shape: ``(H, W, classes)``.
    """

    def __init__(self, net: NetFactory, in_shape: Sequence[int], out_shape: Sequence[int]) -> None:
        super().__init__()
        self.image = net(in_shape, (out_shape[-1], *out_shape[:-1]))
        self.places = len(out_shape) - 1

    def forward(self, x: Tensor) -> Tensor:
        """(*batch, *in_shape) -> (*batch, K, H, W) -> (*batch, H, W, K)."""
        return self.image(x).movedim(-1 - self.places, -1)


def summable(model: Any, context_shape: Sequence[int], net: NetFactory) -> Conditional | None:
    """q(z|x) over the bits or one-hot vectors of a model, few enough to sum over; None where it has neither.

    Raises:
        ValueError: their joint states are too many.
    """
    base = kind_of_prior(model)
    if not isinstance(base, dist.Bernoulli | dist.OneHotCategorical):
        return None
    shape = model.prior.event_shape
    classes, variables = (shape[-1], shape[:-1]) if isinstance(base, dist.OneHotCategorical) else (2, shape)
    check_states(classes ** variables.numel())
    core = OneHotCategoricals if isinstance(base, dist.OneHotCategorical) else BernoulliBits
    return core(shape, context_shape, net)


def kind_of_prior(model: Any) -> Any:
    """The distribution of a single entry under the prior of a model; None where it has no prior to ask."""
    prior = getattr(model, "prior", None)
    if not isinstance(prior, Conditional) or prior.context_shape or isinstance(prior, Aggregate):
        return None
    p = prior()
    while hasattr(p, "base_dist"):
        p = p.base_dist
    return getattr(p, "entry", p)


def expect_prior(model: Any, kind: type, what: str, word: str) -> None:
    """Refuse a model whose prior is known, and over something else.

    Raises:
        ValueError: with the prior that would do.
    """
    found = kind_of_prior(model)
    if found is not None and not isinstance(found, kind):
        raise ValueError(f"it {what}, and the prior is over draws of {type(found).__name__}; accepted: prior={word}")
