"""VAEs whose encoder, prior and decoder are tables, trained on a whole finite population without sampling noise.

What a claim about all encoders and decoders says, it says of these; what it says can here be computed exactly.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from guides.amortized import Amortized
from guides.enumerated import FreeCategorical
from inference.annealing import BetaELBO
from inference.blahut_arimoto import Array, entropy, mutual_information
from inference.enumeration import summed
from inference.objectives import ELBO, Objective
from models.gmm import GaussianMixture
from models.latent_class import LatentClassModel
from models.mixture import FiniteMixture


@dataclass(frozen=True)
class TabularPair:
    """A model with one categorical latent, a guide with a table q(z|y), and the population p(y) they are fitted to."""

    model: FiniteMixture
    guide: Amortized
    symbols: Tensor  # one row for each symbol of the source, (M, *event_shape)
    source: Tensor  # p(y), (M,)

    def bound(self, objective: Objective) -> Tensor:
        """The population's mean of a bound, ``()`` nats, exact."""
        states = torch.arange(self.model.num_states, device=self.symbols.device)
        return self.source @ summed(objective, self.model, self.guide, self.symbols, states)

    @property
    def posterior(self) -> Array:
        """q(z|y), ``(M, S)``."""
        return self.guide.core(self.symbols).probs.detach().numpy()

    @property
    def information(self) -> float:
        """I(y; z) under the encoder, nats."""
        return mutual_information(self.source.numpy(), self.posterior)

    def set_posterior(self, posterior: Tensor) -> None:
        """Make q(z|y) the table ``(M, S)``."""
        with torch.no_grad():
            self.guide.core.logits.copy_(posterior.clamp(min=1e-300).log())


def free_decoder(source: Tensor, states: int, seed: int = 0, spread: float = 1.0) -> TabularPair:
    """A VAE over M symbols whose encoder, prior and decoder are free tables, all started at random.

    Args:
        source: p(y), ``(M,)``.
        states: S.
        seed: of the start.
        spread: standard deviation of the logits at the start.
    """
    size = len(source)
    model = LatentClassModel((1,), states, size).to(source)
    symbols = torch.arange(size, dtype=source.dtype, device=source.device).unsqueeze(1)  # (M, 1)
    vae = TabularPair(model, _table(size, states, source), symbols, source)
    _start([*model.parameters(), *vae.guide.parameters()], seed, spread)
    return vae


def gaussian_decoder(
    points: Tensor, source: Tensor, codebook: Tensor, scale: float, seed: int = 0, spread: float = 1.0
) -> TabularPair:
    """A VAE over M points whose decoder is N(codeword z, scale^2 I) and held; encoder and prior are free tables.

    Args:
        points: the source's symbols, ``(M, D)``.
        source: p(y), ``(M,)``.
        codebook: ``(S, D)``.
        scale: standard deviation of the decoder, in units of the points.
        seed: of the start.
        spread: standard deviation of the logits at the start.
    """
    model = GaussianMixture(points.shape[1:], len(codebook), "spherical").to(source)
    with torch.no_grad():
        model.loc.copy_(codebook)
        model.log_scale.fill_(float(np.log(scale)))
    vae = TabularPair(model, _table(len(points), len(codebook), source), points, source)
    _start([vae.guide.core.logits, model.logits], seed, spread)
    return vae


def _table(size: int, states: int, like: Tensor) -> Amortized:
    return Amortized(FreeCategorical(size, states)).to(like)


def _start(parameters: Sequence[Tensor], seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def minimize(
    parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], iterations: int = 500, warmup: int = 0
) -> float:
    """Gradient descent on a loss without noise, to rounding; returns where it ends.

    Steps with curvature (L-BFGS) are long, and can throw a logit to where its gradient is gone. Where an optimum lies
    on the edge of the simplex, as that of a rate does, ``warmup`` short steps of Adam go before them.
    """
    moved = list(parameters)
    first = torch.optim.Adam(moved, lr=0.1)
    for _ in range(warmup):
        first.zero_grad()
        loss().backward()
        first.step()
    optimizer = torch.optim.LBFGS(
        moved,
        max_iter=iterations,
        max_eval=4 * iterations,
        tolerance_grad=1e-13,
        tolerance_change=1e-18,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        return float(loss())


def fit(vae: TabularPair, beta: float = 1.0, iterations: int = 500) -> float:
    """Train every part of a VAE on the beta-VAE objective; returns the loss -E_q log p(y|z) + beta KL, nats."""
    objective = BetaELBO(beta)
    return minimize([*vae.model.parameters(), *vae.guide.parameters()], lambda: -vae.bound(objective), iterations)


def fit_channel(vae: TabularPair, multiplier: float, iterations: int = 500, warmup: int = 300) -> float:
    """Train encoder and prior of a :func:`gaussian_decoder` as a rate-distortion autoencoder.

    Its loss is KL(q(z|y) || p(z)) + multiplier x squared distance, whose minimum over the prior is the rate-distortion
    Lagrangian. It is minus the beta-VAE bound over beta, less a constant, with multiplier = 1 / (2 beta scale^2).

    Returns:
        the Lagrangian at the end, nats.
    """
    scale = float(vae.model.log_scale.detach()[0, 0].exp())
    beta = 1 / (2 * multiplier * scale**2)
    objective, size = BetaELBO(beta), vae.symbols.shape[1]
    constant = size / 2 * float(np.log(2 * np.pi * scale**2))
    parameters = [vae.model.logits, *vae.guide.parameters()]
    return minimize(parameters, lambda: (-vae.bound(objective) - constant) / beta, iterations, warmup)


def universality_error(trials: int = 20, symbols: int = 4, states: int = 3, seed: int = 0) -> tuple[float, float]:
    """How near training brings the tables to random triples (Q, P(z), P(y|z)): largest error at the start, at the end.

    Each triple is drawn independently part by part, so that no part is what the others would have made it; the loss is
    the sum of the divergences from the targets.
    """
    random = np.random.default_rng(seed)
    before, after = [], []
    for trial in range(trials):
        vae = free_decoder(torch.full((symbols,), 1 / symbols, dtype=torch.float64), states, seed + trial)
        targets = [torch.tensor(random.dirichlet(np.ones(k), n)) for n, k in _sizes(symbols, states)]
        before.append(_distance(vae, targets))
        minimize([*vae.model.parameters(), *vae.guide.parameters()], lambda v=vae, t=targets: _divergence(v, t))  # type: ignore[misc]
        after.append(_distance(vae, targets))
    return min(before), max(after)


def _sizes(symbols: int, states: int) -> Sequence[tuple[int, int]]:
    return ((symbols, states), (1, states), (states, symbols))


def log_decoder(vae: TabularPair) -> Tensor:
    """log p(y|z) of every state and symbol, ``(S, M)``."""
    return vae.model.component(torch.arange(vae.model.num_states)).log_prob(vae.symbols.unsqueeze(1)).T


def _triple(vae: TabularPair) -> list[Tensor]:
    """log q(z|y) (M, S), log p(z) (1, S) and log p(y|z) (S, M)."""
    encoder, prior = vae.guide.core(vae.symbols).logits.log_softmax(1), vae.model.logits.log_softmax(0).unsqueeze(0)
    return [encoder, prior, log_decoder(vae)]


def _divergence(vae: TabularPair, targets: Sequence[Tensor]) -> Tensor:
    parts = zip(_triple(vae), targets, strict=True)
    return torch.stack([(target * (target.log() - ours)).sum() for ours, target in parts]).sum()


def _distance(vae: TabularPair, targets: Sequence[Tensor]) -> float:
    parts = zip(_triple(vae), targets, strict=True)
    return max(float((ours.exp() - target).abs().max().detach()) for ours, target in parts)


def m_step(vae: TabularPair) -> None:
    """Set prior and decoder to their best under the encoder, which is held: the M step of EM on the population."""
    q = vae.source.unsqueeze(1) * torch.tensor(vae.posterior)  # each symbol as often as the source gives it
    vae.model.m_step(vae.model.statistics(vae.symbols, q))


def fit_decoder(vae: TabularPair, iterations: int = 1000) -> float:
    """Train prior and decoder alone, the encoder held; returns the loss, nats."""
    return minimize(vae.model.parameters(), lambda: -vae.bound(ELBO()), iterations)


def best_response(vae: TabularPair) -> tuple[Array, Array]:
    """What the slide says prior and decoder become under the encoder: P*(z) = E_y Q and P*(y|z) by Bayes' rule.

    Returns:
        ``(S,)`` and ``(S, M)``.
    """
    joint = vae.source.numpy()[:, None] * vae.posterior  # (M, S)
    return joint.sum(0), (joint / joint.sum(0)).T


def prior_and_decoder(vae: TabularPair) -> tuple[Array, Array]:
    """p(z) ``(S,)`` and p(y|z) ``(S, M)`` of the model as it is."""
    _, prior, decoder = _triple(vae)
    return prior.exp()[0].detach().numpy(), decoder.exp().detach().numpy()


def most_informative_partition(source: Array, cells: int) -> float:
    """The largest H(z), nats, of any map from M symbols to so many cells: all of them tried."""
    best = 0.0
    for assignment in product(range(cells), repeat=len(source)):
        best = max(best, entropy(np.bincount(assignment, source, cells).astype(float)))
    return best


def interpolated(source: Tensor, information: float) -> Tensor:
    """A table q(z|y) ``(M, M)`` with that I(y; z), between an encoder that says nothing and one that says y itself."""
    size = len(source)
    nothing, everything = source.expand(size, size), torch.eye(size, dtype=source.dtype)

    def between(share: float) -> Tensor:
        return (1 - share) * nothing + share * everything

    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        short = mutual_information(source.numpy(), between(middle).numpy()) < information
        low, high = (middle, high) if short else (low, middle)
    return between((low + high) / 2)
