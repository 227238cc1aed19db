"""A causal transformer over tokens (Vaswani et al. 2017; as a prior over codes, Esser, Rombach and Ommer 2021)."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.tokens import TokenPrior


class TokenTransformer(TokenPrior):
    """Attention among tokens; a context stands in front of the sequence. Leaves say who sees whom, ``causal``.

    Args:
        event_shape: the grid, ``(H, W)``.
        codes: K.
        context_shape: shape of one context.
        context_codes: number of values of the context; 0 for none.
        width: of the residual stream; a multiple of the number of heads.
        layers: number of blocks.
        heads: of the attention.
        dropout: fraction of what each block adds that is dropped, in training.
    """

    causal: ClassVar[bool]

    def __init__(
        self,
        event_shape: Sequence[int],
        codes: int,
        context_shape: Sequence[int] = (),
        context_codes: int = 0,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(event_shape, codes, context_shape, context_codes)
        if layers < 1 or heads < 1 or width % heads:
            raise ValueError(f"width must be a multiple of heads, and there must be layers: {width}, {heads}, {layers}")
        self.embedding = nn.Embedding(codes if self.causal else codes + 1, width)  # K stands for a hidden token
        if self.causal:
            self.start = nn.Parameter(0.1 * torch.randn(width))
        self.context_embedding = nn.Embedding(context_codes, width) if context_codes else None
        self.context_places = math.prod(self.context_shape) if context_codes else 0
        self.place = nn.Parameter(0.1 * torch.randn(self.context_places + self.places, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout, self.causal) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, codes))

    def attend(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Logits ``(B, H, W, K)`` at the places of embedded tokens ``(B, T, C)``, given contexts."""
        if self.context_embedding is not None and context is not None:
            given = context.flatten(1) if self.context_shape else context.unsqueeze(1)
            x = torch.cat([self.context_embedding(given), x], dim=1)
        x = x + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, self.context_places :]).unflatten(1, self.event_shape)  # (B, T, K) -> (B, H, W, K)


class CausalTransformer(TokenTransformer):
    """Attention to all that came before in raster order; options as of :class:`TokenTransformer`."""

    causal = True

    def logits(self, tokens: Tensor, context: Tensor | None) -> Tensor:
        """Causal logits, ``(B, H, W, K)``, of tokens ``(B, H, W)``."""
        before = self.embedding(tokens.flatten(1)[:, :-1])  # (B, T - 1, C); the last token is seen by none
        return self.attend(torch.cat([self.start.expand(tokens.shape[0], 1, -1), before], dim=1), context)


class Block(nn.Module):
    """Attention and a two-layer net, each on normalized input and added to it.

    Args:
        width: C.
        heads: of the attention.
        dropout: fraction of what is added that is dropped, in training.
        causal: whether a place reads itself and those before it alone; otherwise it reads all.
    """

    def __init__(self, width: int, heads: int, dropout: float, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm, self.net_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, C)`` to the same."""
        x = x + self.dropout(self.mix(self._attend(self.attention_norm(x))))
        return x + self.dropout(self.net(self.net_norm(x)))

    def _attend(self, x: Tensor) -> Tensor:
        split = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3 C) -> (B, T, 3, heads, C / heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # (B, heads, T, C / heads) each
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal).transpose(1, 2).flatten(2)
