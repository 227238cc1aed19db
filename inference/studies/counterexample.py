"""A step that raises the bound and lowers log p(x), and EM from the same start, which cannot: one datum, one number.

x = 1 lies between the fixed components N(-1, 1) and N(1, 1); learned is theta, the log-odds of the second, from 0. With
s = sigmoid(theta), log p(x) = log((1 - s) a + s b) has slope r - s, where r is the posterior of the second component,
and the bound under a held q of the second component has slope q - s. At theta = 0, r = 0.88 > 1/2: under q = 0.1 the
bound rises to the left, where log p(x) falls.
"""

import math
from dataclasses import dataclass

import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from guides.enumerated import Enumerated, FreeCategorical
from inference.em import e_step
from inference.engine import SVI, SharedOptimizer
from models.gmm import GaussianMixture

DATUM, HELD, STEP = 1.0, 0.1, 0.5


@dataclass(frozen=True)
class Outcome:
    """Where one step from theta = 0 leads; log-densities in nats."""

    theta: float
    bound_before: float
    bound_after: float
    log_p_before: float
    log_p_after: float


def log_densities(theta: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x) and the bound under the held q, as functions of theta, by the formulas above."""
    a, b = (math.exp(-0.5 * (DATUM - mean) ** 2) / math.sqrt(2 * math.pi) for mean in (-1.0, 1.0))
    s = theta.sigmoid()
    entropy = -HELD * math.log(HELD) - (1 - HELD) * math.log(1 - HELD)
    bound = HELD * (s.log() + math.log(b)) + (1 - HELD) * ((1 - s).log() + math.log(a)) + entropy
    return ((1 - s) * a + s * b).log(), bound


def svi_step() -> Outcome:
    """One gradient step of SVI on the bound, q held at 0.1."""
    model, x = _mixture(), torch.full((1, 1), DATUM, dtype=torch.float64)
    guide = Enumerated(FreeCategorical(1, 2)).double()
    with torch.no_grad():
        guide.core.logits.copy_(torch.tensor([[1 - HELD, HELD]]).log())
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    bound, log_p = -elbo.loss(model, guide, x), _evidence(model, x)
    SVI(model, guide, SharedOptimizer([model.logits], torch.optim.SGD, STEP), elbo).step(x)
    return Outcome(_theta(model), bound, -elbo.loss(model, guide, x), log_p, _evidence(model, x))


def em_step() -> Outcome:
    """One iteration of EM from the same start; its bound is taken under its own q, the posterior at the start."""
    model, x = _mixture(), torch.full((1, 1), DATUM, dtype=torch.float64)
    statistics, log_p = e_step(model, x)
    with torch.no_grad():
        model.logits.copy_((statistics["count"] / statistics["count"].sum()).log())  # the M step of theta alone
        bound = float(model.expected_log_joint(statistics) + statistics["entropy"])
    return Outcome(_theta(model), float(log_p), bound, float(log_p), _evidence(model, x))


def _mixture() -> GaussianMixture:
    model = GaussianMixture((1,), 2, "spherical").double()
    with torch.no_grad():
        model.loc.copy_(torch.tensor([[-1.0], [1.0]]))
    return model


def _theta(model: GaussianMixture) -> float:
    return float((model.logits[1] - model.logits[0]).detach())


def _evidence(model: GaussianMixture, x: Tensor) -> float:
    return float(model.log_evidence(x).sum().detach())
