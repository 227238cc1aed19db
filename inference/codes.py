"""From data to grids of codes, how the codes are used, and priors fitted to them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta, Independent
from torch import Tensor
from torch.distributions import Categorical

from inference.particles import Program, StructureError, encode, particles
from models.discrete import OneHots, base_of
from models.dvae import OneHotPrior
from models.tokens import TokenPrior
from models.vq import CodePrior, HardCodes
from models.vq_levels import LevelledCodes


@torch.no_grad()
def encode_tokens(guide: Program, x: Tensor, site: str = "z", chunk: int = 1024) -> Tensor:
    """The codes that a guide gives data ``(N, *event_shape)``, the most probable ones: whole numbers ``(N, H, W)``.

    Raises:
        StructureError: the guide does not quantize that site.
    """
    return torch.cat([_codes(guide, some, site) for some in x.split(chunk)])


def _codes(guide: Program, x: Tensor, site: str) -> Tensor:
    q = encode(guide, x).get(site)
    if isinstance(q, HardCodes):
        return q.codes
    if isinstance(q, Categorical):
        return q.logits.argmax(-1)  # (N, K) -> (N,)
    if _is_grid(q):
        return base_of(q).logits.argmax(-1)  # (N, H, W, K) -> (N, H, W)
    raise StructureError(
        f"the guide quantizes no site '{site}'; use guide=quantized, or model=dvae with a guide of one-hot vectors"
    )


@torch.no_grad()
def codes_of(model: Any, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The code numbers of a model's latents by site, ``(N, H, W)``; nothing where they are no grids of codes."""
    priors: dict[str, Any] = {"z": getattr(model, "prior", None)}
    if isinstance(model, LevelledCodes):
        priors = dict(zip(model.names, model.priors, strict=True))
    found = {}
    for name, prior in priors.items():
        if isinstance(prior, CodePrior):
            found[name] = prior.codebook.nearest(latents[name].movedim(-3, -1))  # (N, D, H, W) -> (N, H, W)
        elif isinstance(prior, OneHotPrior):
            found[name] = latents[name].argmax(-1)
    return found


def _is_grid(q: Any) -> bool:
    """Whether a latent is a grid of one-hot vectors: of one alphabet, as codes are."""
    return isinstance(base_of(q), OneHots) and len(q.event_shape) == 3


def _alphabet(q: Any, alone: bool) -> int:
    """The number of codes of a latent; 0 where it is none of codes, such as a state of a sequence of them."""
    if isinstance(q, Categorical):
        return q.logits.shape[-1] if alone else 0
    if isinstance(q, HardCodes):
        return q.codebook.size
    return q.event_shape[-1] if _is_grid(q) else 0


@dataclass(frozen=True)
class CodeUsage:
    """How often each code occurs over a whole data set; a batch would show fewer codes than are in use."""

    counts: Tensor  # (K,)
    places: int  # codes in a grid

    @property
    def entropy(self) -> float:
        """Of a code at a random place of a random datum, in nats; at most log K."""
        p = self.counts.double() / self.counts.sum()
        return float(-torch.special.xlogy(p, p).sum())

    @property
    def perplexity(self) -> float:
        """exp of the entropy: between 1 and K, K where all codes are used alike."""
        return math.exp(self.entropy)

    @property
    def used(self) -> int:
        """Number of codes that occur at all."""
        return int((self.counts > 0).sum())

    @property
    def bits_per_image(self) -> float:
        """Bits to send a grid by an entropy code that knows how often each code occurs, and no more."""
        return self.places * self.entropy / math.log(2)

    @property
    def fixed_bits_per_image(self) -> float:
        """Bits to send a grid of equally long numbers, H W log2 K: the KL of a uniform prior, in bits."""
        return self.places * math.log2(len(self.counts))


def code_usage(tokens: Tensor, codes: int) -> CodeUsage:
    """Counts the codes of a data set's tokens ``(N, H, W)``."""
    return CodeUsage(torch.bincount(tokens.reshape(-1), minlength=codes), math.prod(tokens.shape[1:]))


@torch.no_grad()
def code_scores(guide: Program, x: Tensor) -> dict[str, Any]:
    """What the summary of a run says of its codes over all data ``x``; nothing where no site is quantized."""
    with torch.random.fork_rng():
        latents = encode(guide, x[:1])
        sites = {name: codes for name, q in latents.items() if (codes := _alphabet(q, len(latents) == 1))}
        usages = [code_usage(encode_tokens(guide, x, name), codes) for name, codes in sites.items()]
    if not usages:
        return {}
    return {
        "test/code_perplexity": [usage.perplexity for usage in usages],
        "test/codes_used": [usage.used for usage in usages],
        "test/code_bits_per_image": sum(usage.bits_per_image for usage in usages),
        "test/code_fixed_bits_per_image": sum(usage.fixed_bits_per_image for usage in usages),
    }


def is_certain(guide: Program, x: Tensor) -> bool:
    """Whether the guide has one value for each datum, so that all its draws are copies of one."""
    with torch.random.fork_rng():  # asking leaves no trace in the numbers that follow
        sites = encode(guide, x[:1]).values()
    return bool(sites) and all(isinstance(_base(q), HardCodes | Delta) for q in sites)


def is_a_point(model: Program, guide: Program, x: Tensor) -> bool:
    """Whether the guide has one point among the reals for each datum: the autoencoder, which no bound is known of.

    A point has no density beside that of the prior: KL(q(z|x) || p(z)) is infinite, and so is the marginal KL. One code
    among countably many has a mass, and its KL is -log p(z).
    """
    with torch.random.fork_rng():
        latents = particles(model, guide, x[:1]).latents.values()
    return any(isinstance(_base(latent.q), Delta) and not latent.p.support.is_discrete for latent in latents)


def unbounded(summary: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation says, without what nothing is known of where each datum has a point."""
    words = ("nll", "nll_stderr", "bits_per_dim", "nll_per_token", "perplexity", "marginal_kl")
    missing = {f"test/{word}": None for word in words if f"test/{word}" in summary}
    return summary | missing | {"test/kl_estimator": "−log p(z) at one point; the KL is infinite, the ELBO no bound"}


def _base(q: Any) -> Any:
    return q.base_dist if isinstance(q, Independent) else q


@torch.no_grad()
def token_nll(prior: TokenPrior, tokens: Tensor, context: Tensor | None = None, chunk: int = 1024) -> Tensor:
    """-log p(tokens), or given their contexts, of each of ``(N, H, W)``: ``(N,)`` nats; over log 2, bits per image."""
    training = prior.training
    prior.eval()
    try:
        starts = range(0, len(tokens), chunk)
        parts = [_log_p(prior, tokens, context, torch.arange(s, min(s + chunk, len(tokens)))) for s in starts]
    finally:
        prior.train(training)
    return -torch.cat(parts)


def fit_tokens(
    prior: TokenPrior,
    tokens: Tensor,
    context: Tensor | None = None,
    steps: int = 1000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    valid: tuple[Tensor, Tensor | None] | None = None,
    checks: int = 10,
) -> None:
    """Fit a prior to tokens ``(N, H, W)``, given their contexts if there are any, by maximum likelihood with Adam.

    The second phase of a VQ-VAE (van den Oord et al. 2017, section 3.3); the learning rate falls to zero on a cosine.

    Args:
        prior: what is fitted, in place.
        tokens: ``(N, H, W)``.
        context: of each grid, or None.
        steps: of Adam.
        batch_size: grids in a batch.
        learning_rate: at the start.
        valid: tokens and contexts, or None for these, to be scored ``checks`` times; the parameters that score best are
            kept. None keeps the last.
        checks: how many times.
    """
    optimizer = torch.optim.Adam(prior.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, kept = math.inf, None
    every = max(1, steps // checks)
    prior.train()
    for step in range(1, steps + 1):
        rows = torch.randint(len(tokens), (batch_size,), device=tokens.device)
        optimizer.zero_grad()
        (-_log_p(prior, tokens, context, rows).mean()).backward()
        optimizer.step()
        schedule.step()
        if valid is not None and (step % every == 0 or step == steps):
            score = float(token_nll(prior, *valid).mean())
            if score < best:
                best, kept = score, {name: value.clone() for name, value in prior.state_dict().items()}
    if kept is not None:
        prior.load_state_dict(kept)
    prior.eval()


def _log_p(prior: TokenPrior, tokens: Tensor, context: Tensor | None, rows: Tensor) -> Tensor:
    rows = rows.to(tokens.device)
    given = () if context is None else (context[rows],)
    return prior(*given).log_prob(tokens[rows])
