"""Backtranslation between two finite languages, each by its own sentences only (Sennrich, Haddow and Birch 2016)."""

from typing import NamedTuple

import torch
from torch import Tensor

from inference import tables
from inference.objectives import ELBO


class Losses(NamedTuple):
    """Cross-entropies of going there and back, ``()`` nats."""

    there: Tensor  # -E_y E_{z ~ Q(z|y)} ln P(y|z): a translation of y is to say y
    back: Tensor  # -E_z E_{y ~ P(y|z)} ln Q(z|y): a translation of z is to say z


def backtranslation(pair: tables.TabularPair, language: Tensor, held: bool = False) -> Losses:
    """Both losses of a tabular pair, summed exactly.

    No language model of z takes part, so that any one-to-one code for y makes both losses 0, the right one and every
    permutation of it: what z means is left open.

    Args:
        pair: decoder P(y|z) and encoder Q(z|y).
        language: the frequencies of sentences z, ``(S,)``.
        held: what translates first is taken as given, and only what translates back learns, as where sentences are
            drawn. Then any two directions that are each other's Bayes inverse stand still, vague ones too.
    """
    log_q = pair.guide.core(pair.symbols).logits.log_softmax(1)  # (M, S)
    log_p = tables.log_decoder(pair)  # (S, M)
    first_q, first_p = (log_q.detach(), log_p.detach()) if held else (log_q, log_p)
    there = -(pair.source.unsqueeze(1) * first_q.exp() * log_p.T).sum()
    back = -(language.unsqueeze(1) * first_p.exp() * log_q.T).sum()
    return Losses(there, back)


def train_backtranslation(
    pair: tables.TabularPair, language: Tensor, steps: int = 400, rate: float = 0.2, held: bool = False
) -> Losses:
    """Follow the gradients of both losses; returns where they end."""
    parameters = [*pair.model.parameters(), *pair.guide.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = backtranslation(pair, language, held)
        (losses.there + losses.back).backward()
        optimizer.step()
    with torch.no_grad():
        return backtranslation(pair, language)


def with_language_model(pair: tables.TabularPair, language: Tensor) -> float:
    """The ELBO, nats, when z is to be a likely sentence too: the prior P(z) is the language model."""
    with torch.no_grad():
        pair.model.logits.copy_(language.log())
        return float(pair.bound(ELBO()))


def lean(pair: tables.TabularPair, code: Tensor, strength: float) -> None:
    """Start both directions near a one-to-one code: symbol y and sentence ``code[y]``."""
    identity = strength * torch.eye(len(code), dtype=pair.source.dtype)[code]  # (M, S)
    with torch.no_grad():
        pair.guide.core.logits.copy_(identity)
        pair.model.symbol_logits.copy_(identity.T.unsqueeze(1))
