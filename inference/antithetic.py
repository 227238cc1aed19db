"""Gradients of bits and one-hot vectors from the bound at several draws that share their noise: ARM and ARSM."""

import torch
from torch import Tensor

from inference.baselines import credit, learning_signal
from inference.control_variates import DiscreteSite, LogitGradient
from inference.gradients import Bound
from models.discrete import Bits, OneHots, largest
from models.inverse_cdf import open_uniform


class ARM(LogitGradient):
    """Augment-REINFORCE-merge: the bound at two draws of opposite noise (Yin and Zhou 2019, theorem 1).

    For one-hot vectors, augment-REINFORCE-swap-merge (Yin, Yue and Zhou 2019): the bound at the C (C - 1) / 2
    draws in which the noise of two classes has changed places, in all variables at once. Nothing is learned, and the
    bound is not differentiated in the draws.
    """

    name = "arm"

    def of_logits(self, objective: Bound, site: DiscreteSite, x: Tensor) -> tuple[Tensor, Tensor]:
        _, q = site.loose()
        with torch.no_grad():
            signal, weight = learning_signal(objective, site.draws)
            merged = self.swapped if isinstance(q, OneHots) else self.opposite
            return weight * merged(objective, site, q, signal), signal.new_zeros(())

    def opposite(self, objective: Bound, site: DiscreteSite, q: Bits, signal: Tensor) -> Tensor:
        """(f(u > 1 - p) - f(u < p)) (u - 1/2) for uniform noise u that gives the draw by the former rule."""
        bits, p = site.latent.value, q.logits.sigmoid()
        noise = open_uniform(bits.shape, bits)
        u = torch.where(bits > 0.5, 1 - noise * p, noise * (1 - p))
        other = credit(objective, site.at(self.antithetic(u, p)))
        return site.spread(signal - other) * (u - 0.5)

    def antithetic(self, u: Tensor, p: Tensor) -> Tensor:
        """The bits that the opposite noise gives."""
        return (u < p).to(p.dtype)

    def swapped(self, objective: Bound, site: DiscreteSite, q: OneHots, signal: Tensor) -> Tensor:
        """sum_j (f(c <-> j) - mean_m f(m <-> j)) (1/C - pi_j) for uniform noise pi on the simplex."""
        draw = site.latent.value
        classes = draw.shape[-1]
        waits = -open_uniform(draw.shape, draw).log()
        first = (waits * draw).sum(-1, keepdim=True)  # until the class drawn, which is the first to come
        times = torch.where(draw > 0.5, first, first + waits / q.probs)
        arrivals = (times * q.probs).clamp(min=torch.finfo(draw.dtype).tiny)
        pi = arrivals / arrivals.sum(-1, keepdim=True)
        at = signal.expand(classes, classes, *signal.shape).clone()  # (C, C, K, N): the bound, two classes swapped
        for one in range(classes):
            for other in range(one):
                order = torch.arange(classes, device=draw.device)
                order[[one, other]] = order[[other, one]]
                value = largest(q.logits - pi[..., order].log())
                at[one, other] = at[other, one] = credit(objective, site.at(value))
        centred = at - at.mean(0)
        factors = torch.stack([site.spread(each) for each in centred.flatten(0, 1)])  # (C C, K, ..., N, *1)
        # (C, C, K, ..., N, *1) -> (K, ..., N, *1, C, C)
        factors = factors.unflatten(0, (classes, classes)).squeeze(-1).movedim((0, 1), (-2, -1))
        return (factors * (1 / classes - pi).unsqueeze(-2)).sum(-1)
