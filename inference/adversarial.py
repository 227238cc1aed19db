"""Adversarial training, for contrast: a generator against a discriminator (Goodfellow et al. 2014).

No bound on log p(x) is climbed, and none can be computed: what there is are draws.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.particles import generate


def game_value(on_data: Tensor, on_draws: Tensor) -> Tensor:
    """V(D, G) = E_p log D(x) + E_g log(1 - D(x)) from logits of D on data and on draws (equation 1), in nats.

    The discriminator raises it, the generator lowers it. At the best discriminator it is -log 4 + 2 JSD(p, g).
    """
    return F.logsigmoid(on_data).mean() + F.logsigmoid(-on_draws).mean()


def best_discriminator(p: Tensor, g: Tensor) -> Tensor:
    """D*(x) = p(x) / (p(x) + g(x)) of two densities or masses (proposition 1)."""
    return p / (p + g)


def tabular_value(p: Tensor, g: Tensor, discriminator: Tensor) -> Tensor:
    """V of a discriminator ``(..., K)`` between two tables of masses ``(..., K)``, in nats: ``(...,)``."""
    return (torch.special.xlogy(p, discriminator) + torch.special.xlogy(g, 1 - discriminator)).sum(-1)


def train_adversarially(
    model: nn.Module,
    discriminator: nn.Module,
    batches: Callable[[], Tensor],
    steps: int,
    learning_rate: float = 2e-4,
    saturating: bool = False,
) -> list[float]:
    """Alternate Adam steps of discriminator and generator; returns V at each step.

    Args:
        model: a Pyro program whose draws of ``x`` are differentiable, such as likelihood=implicit makes.
        discriminator: ``(N, *shape)`` to logits ``(N, 1)`` of being a datum.
        batches: gives a new batch of data ``(N, *shape)``.
        steps: of each.
        learning_rate: of both.
        saturating: whether the generator lowers E log(1 - D), as in the minimax game, in place of raising E log D,
            which has the same fixed point and a gradient where the discriminator is sure (section 3).
    """
    makers = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.5, 0.999))
    judges = torch.optim.Adam(discriminator.parameters(), lr=learning_rate, betas=(0.5, 0.999))
    values = []
    for _ in range(steps):
        x = batches()
        drawn = generate(model, x)[2]
        value = game_value(discriminator(x), discriminator(drawn.detach()))
        judges.zero_grad()
        (-value).backward()
        judges.step()
        judged = discriminator(drawn)
        makers.zero_grad()
        (F.logsigmoid(-judged) if saturating else -F.logsigmoid(judged)).mean().backward()
        makers.step()
        values.append(value.detach())
    return torch.stack(values).tolist()
