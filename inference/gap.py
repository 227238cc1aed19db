"""How far a bound is from log p(x), and why: the family's fault or the encoder's (Cremer, Li and Duvenaud 2018)."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inference.diagnostics import elbo_terms
from inference.evaluate import evaluating
from inference.objectives import ELBO
from inference.particles import Program, guess_max_plate_nesting
from inference.particles import particles as sample


@dataclass(frozen=True)
class Gaps:
    """log p(x) - ELBO of each datum taken apart, ``(N,)`` nats each; the first two add up to the whole.

    ``approximation`` is what the best member of the family for the datum itself leaves; ``amortization`` what is lost
    because one network has to find it, or an inner optimization that stops short of it. Estimates: the local optimum
    is searched by gradient and log p(x) is importance-sampled from it; both fall short on average, and each datum's
    gaps have Monte-Carlo noise of either sign.
    """

    log_p: Tensor
    elbo: Tensor
    local_elbo: Tensor

    @property
    def approximation(self) -> Tensor:
        return self.log_p - self.local_elbo

    @property
    def amortization(self) -> Tensor:
        return self.local_elbo - self.elbo


class Rows(nn.Module):
    """Stands where a network stood and holds an output for each of N data, to be optimized one by one."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs


def localize(guide: nn.Module, x: Tensor) -> nn.Module:
    """A copy of a guide with parameters of their own for each datum: the family without the amortization.

    Every network that reads the data is replaced by its outputs for ``x``, ``(N, *event_shape)``, and a part that reads
    nothing by as many copies of itself (its ``for_each``); one that fits each datum whenever it is asked, by its fit
    with parameters to go on from (its ``localized``). What else the family has stays as it is for all data: the
    coefficients of a flow, say, that its nets do not read off the datum.

    Raises:
        ValueError: nothing in the guide depends on the datum.
    """
    local = copy.deepcopy(guide)
    for parameter in local.parameters():
        parameter.requires_grad_(False)  # of the copy
    found = False
    for module in list(local.modules()):
        if hasattr(module, "for_each"):
            module.for_each(len(x))  # type: ignore[operator]
            found = True
        for name, child in list(module.named_children()):
            if hasattr(child, "localized"):
                setattr(module, name, child.localized(x))  # type: ignore[operator]
                found = True
            elif getattr(child, "in_shape", None) == x.shape[1:]:
                setattr(module, name, Rows(child(x)))
                found = True
    if not found:
        raise ValueError(f"{type(guide).__name__} has no network that reads the data: nothing to fit for each datum")
    return local


def gaps(
    model: Program,
    guide: nn.Module,
    x: Tensor,
    seed: int,
    steps: int = 300,
    learning_rate: float = 0.02,
    particles: int = 1000,
) -> Gaps:
    """The gap of each datum and its two parts.

    Args:
        model: Pyro program with fixed parameters.
        guide: amortized guide, as trained.
        x: data, ``(N, *event_shape)``.
        seed: of all random numbers used here.
        steps: of Adam on the datum's own variational parameters, from the encoder's answer, with a falling rate.
        learning_rate: at the first step.
        particles: importance samples for log p(x), and draws for each ELBO.
    """
    with evaluating(model, guide, seed=seed):
        local = localize(guide, x)
        fit(model, local, x, steps, learning_rate)
        torch.manual_seed(seed)
        elbo = mean_elbo(model, guide, x, particles)
        torch.manual_seed(seed)  # the same noise for both, which their difference then loses
        local_elbo = mean_elbo(model, local, x, particles)
        log_p = _log_p(model, local, x, particles)
    return Gaps(log_p, elbo, local_elbo)


def fit(model: Program, local: nn.Module, x: Tensor, steps: int, learning_rate: float) -> None:
    """Maximize the ELBO of each datum over its own parameters; the model's are not touched."""
    parameters = [parameter for parameter in local.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    objective = ELBO(particles=8)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        with torch.enable_grad():
            loss = objective.differentiable_loss(model, local, x)
            gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()


def mean_elbo(model: Program, guide: Program, x: Tensor, draws: int, chunk: int = 50) -> Tensor:
    """The ELBO of each datum over many draws, ``(N,)`` nats."""
    counts = _chunks(draws, chunk)
    return torch.stack([elbo_terms(model, guide, x, count).elbo * count for count in counts]).sum(0) / draws


def _log_p(model: Program, guide: Program, x: Tensor, draws: int, chunk: int = 50) -> Tensor:
    """Importance-sampled log p(x), ``(N,)``, from a guide that can only be asked for all of its data at once."""
    nesting = guess_max_plate_nesting(model, guide, x)
    weights = [sample(model, guide, x, k, max_plate_nesting=nesting).log_weight for k in _chunks(draws, chunk)]
    return torch.cat(weights).logsumexp(0) - math.log(draws)


def _chunks(total: int, most: int) -> list[int]:
    return [min(most, total - start) for start in range(0, total, most)]
