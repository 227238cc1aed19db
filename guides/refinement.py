"""A diagonal normal fitted to each datum by gradient ascent on its own ELBO."""

from collections.abc import Callable

import torch
from pyro.nn import PyroModule
from torch import Tensor

from guides.gaussian import vector_size
from models.vamp import Aggregate

LogJoint = Callable[[Tensor], Tensor]


def nodes(dim: int, like: Tensor | None = None) -> Tensor:
    """Points with entries -1 and 1, mean zero and the identity as covariance, ``(S, dim)``, dim < S <= 2 dim.

    They stand for standard normal noise: an average over them is the exact expectation of any quadratic function,
    with no randomness. Columns of a Hadamard matrix, in Sylvester's construction, without the constant one. On the
    device of ``like``, where it is given, and of its dtype.
    """
    matrix = torch.ones(1, 1) if like is None else like.new_ones(1, 1)
    while matrix.shape[0] <= dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix[:, 1 : dim + 1]


def refine(
    log_joint: LogJoint, loc: Tensor, log_scale: Tensor, steps: int, step_size: float, unroll: bool = False
) -> tuple[Tensor, Tensor]:
    """Take ``steps`` natural-gradient steps on E_q log p(x, z) + H(q) from q = N(loc, exp(log_scale)^2).

    The expectation is over :func:`nodes`. A step moves each precision the fraction ``step_size`` of the way to the
    curvature that q sees, and the mean along its gradient over that precision (Khan and Lin 2017): scale-free, and
    one step of size 1 solves a problem without correlations.

    Args:
        log_joint: log p(x, z) of each datum for latents ``(S, N, D)``; returns ``(S, N)``, in nats.
        loc: means to start from, ``(N, D)``.
        log_scale: log standard deviations to start from, ``(N, D)``.
        steps: number of steps.
        step_size: between 0 and 1; correlated posteriors want a small one.
        unroll: let gradients flow through the steps, to where they started and to the parameters of ``log_joint``.
    """
    unroll = unroll and torch.is_grad_enabled()
    points = nodes(loc.shape[-1], loc).unsqueeze(1)  # (S, D) -> (S, 1, D)
    for _ in range(steps):
        with torch.enable_grad():
            if not unroll or not loc.requires_grad:
                loc, log_scale = loc.detach().requires_grad_(), log_scale.detach().requires_grad_()
            # The mean of one step depends on its scale: of copies, each has its own derivative alone.
            loc, log_scale = loc.clone(), log_scale.clone()
            elbo = log_joint(loc + log_scale.exp() * points).mean(0).sum() + log_scale.sum()
            by_loc, by_log_scale = torch.autograd.grad(elbo, (loc, log_scale), create_graph=unroll)
            # new precision over old; q may see negative curvature, which a precision cannot have
            ratio = (1 - step_size * by_log_scale).clamp(min=0.5)
            log_scale = log_scale - 0.5 * ratio.log()
            loc = loc + step_size * (2 * log_scale).exp() * by_loc
    return (loc, log_scale) if unroll else (loc.detach(), log_scale.detach())


class JointDensity:
    """log p(x, z) of a model that is made of a prior and a likelihood, which it refers to and does not own.

    Args:
        model: has a ``prior`` over vectors and a ``likelihood``.
        owner: who asks, for messages.
    """

    def __init__(self, model: PyroModule, owner: str) -> None:
        if not hasattr(model, "prior") or not hasattr(model, "likelihood"):
            raise ValueError(f"{owner} needs a model made of a prior and a likelihood, such as model=composed")
        if isinstance(model.prior, Aggregate):
            raise ValueError(
                f"{owner} climbs log p(z), and this prior is itself made of q(z|x); accepted: one that is not, such "
                "as prior=standard, mixture or realnvp"
            )
        if model.prior().has_enumerate_support or not model.prior().has_rsample:
            raise ValueError(f"{owner} follows gradients with respect to latents: the prior must be continuous")
        self.event_shape = torch.Size(model.prior.event_shape)
        self.context_shape = torch.Size(model.likelihood.event_shape)
        vector_size(self.event_shape, owner)
        self.model = model

    def of(self, x: Tensor) -> LogJoint:
        """The function of z, for data ``(N, *event_shape)``."""
        return lambda z: self.model.prior().log_prob(z) + self.model.likelihood(z).log_prob(x)


def check_steps(steps: int, step_size: float) -> None:
    """Raise a ValueError unless both can be."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 < step_size <= 1:
        raise ValueError(f"step_size must lie in (0, 1], got {step_size}")
