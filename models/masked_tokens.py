"""Masked-token models: any tokens given any others (Chang et al. 2022), and the distributions they contain.

A net that predicts hidden tokens from visible ones is an autoregressive model for every order at once. With one order
fixed, here the raster order, it is a normalized distribution that can be scored and drawn from exactly; trained with
random orders it climbs a bound on log p averaged over all of them (Uria, Murray and Larochelle 2014; Hoogeboom et al.
2022, equation 5). Drawing many tokens at a time is faster and no longer from that distribution.
"""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from models.tokens import Autoregressive
from models.transformer import TokenTransformer


class MaskedTokens(Autoregressive):
    """The tokens of a masked model: in raster order, or for training in all orders.

    In all orders, :meth:`log_prob` is an unbiased estimate of the mean over orders of log p(tokens) in that order, from
    one place of one random order for each grid: a lower bound on the log of the mean of p. Draws are in raster order.

    Args:
        net: predicts hidden tokens.
        context: ``(*batch, *context_shape)``, or None.
        any_order: whether to score in all orders.
    """

    def __init__(
        self, net: "MaskedTransformer", context: Tensor | None, any_order: bool, validate_args: bool | None = None
    ) -> None:
        self.net, self.any_order = net, any_order
        super().__init__(net.logits, net.event_shape, context, len(net.context_shape), validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "MaskedTokens":
        new = self._get_checked_instance(MaskedTokens, _instance)
        new.net, new.any_order = self.net, self.any_order
        super().expand(batch_shape, new)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if not self.any_order:
            return super().log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        batch = torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        grids = value.long().expand(batch + self.event_shape).reshape(-1, *self.event_shape)  # (B, H, W)
        count, places = grids.shape[0], self.event_shape.numel()
        earlier = torch.randint(places, (count, 1), device=grids.device)  # how many tokens come before
        order = torch.rand(count, places, device=grids.device).argsort(-1)
        hidden = (order >= earlier).reshape(grids.shape)
        log_p = self.net.predict(grids, hidden, self._flat_contexts(batch)).log_softmax(-1)
        own = log_p.gather(-1, grids.unsqueeze(-1)).squeeze(-1) * hidden  # (B, H, W)
        # Each hidden token is as likely as another to be the next one, and there are as many steps as places.
        weight = places / (places - earlier.squeeze(-1))
        return (own.flatten(1).sum(-1) * weight).reshape(batch)

    def logits_at(self, grids: Tensor, contexts: Tensor | None, row: int, column: int) -> Tensor:
        return self.net.predict(grids, self.net.hidden_from(row, column, grids), contexts)[:, row, column]


class MaskedTransformer(TokenTransformer):
    """A transformer that fills in hidden tokens: all orders in training, raster order when it is evaluated.

    Exact scores cost one pass for each place, so they are for evaluation; :meth:`fill` draws in a few passes. Options
    are those of :class:`~models.transformer.TokenTransformer`.
    """

    causal = False

    def forward(self, *context: Tensor) -> dist.Distribution:
        self.check_context(context)
        return MaskedTokens(self, context[0] if context else None, any_order=self.training)

    def hidden_from(self, row: int, column: int, tokens: Tensor) -> Tensor:
        """Which of ``(B, H, W)`` are hidden in raster order when it is the turn of a place."""
        place = row * self.event_shape[1] + column
        later = torch.arange(self.places, device=tokens.device) >= place
        return later.view(self.event_shape).expand_as(tokens)

    def predict(self, tokens: Tensor, hidden: Tensor, context: Tensor | None) -> Tensor:
        """Logits ``(B, H, W, K)`` of every token given those of ``(B, H, W)`` that are not hidden."""
        seen = torch.where(hidden, self.codes, tokens)
        return self.attend(self.embedding(seen.flatten(1)), context)  # (B, H, W) -> (B, T, C)

    def logits(self, tokens: Tensor, context: Tensor | None) -> Tensor:
        """Causal logits, ``(B, H, W, K)``, of tokens ``(B, H, W)``: at each place all from there on are hidden."""
        rows, columns = self.event_shape
        places = [
            self.predict(tokens, self.hidden_from(row, column, tokens), context)[:, row, column]
            for row in range(rows)
            for column in range(columns)
        ]
        return torch.stack(places, dim=1).unflatten(1, self.event_shape)  # (B, T, K) -> (B, H, W, K)

    @torch.no_grad()
    def fill(self, count: int, steps: int = 8, context: Tensor | None = None, temperature: float = 4.5) -> Tensor:
        """Draws ``(count, H, W)`` in few passes, the most certain tokens first (Chang et al. 2022, section 3.2).

        Not from the distribution that is scored: tokens of one pass are drawn independently of each other.

        Args:
            count: B.
            steps: passes; the fraction that is still hidden falls on a cosine.
            context: ``(B, *context_shape)`` or None.
            temperature: of the noise in the choice of what to keep; it falls to zero with the last pass.
        """
        device = self.place.device
        tokens = torch.zeros(count, self.places, dtype=torch.long, device=device)
        hidden = torch.ones(count, self.places, dtype=torch.bool, device=device)
        for step in range(1, steps + 1):
            shape = (count, *self.event_shape)
            log_p = self.predict(tokens.view(shape), hidden.view(shape), context).flatten(1, 2).log_softmax(-1)
            drawn = dist.Categorical(logits=log_p).sample()
            tokens = torch.where(hidden, drawn, tokens)
            left = math.floor(self.places * math.cos(math.pi / 2 * step / steps)) if step < steps else 0
            noise = -torch.rand(count, self.places, device=device).clamp_min(1e-20).log().clamp_min(1e-20).log()
            score = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) + temperature * (1 - step / steps) * noise
            score = torch.where(hidden, score, torch.inf)  # what is known stays
            hidden = score.argsort(-1).argsort(-1) < left
        return tokens.view(count, *self.event_shape)
