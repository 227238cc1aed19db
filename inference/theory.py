"""What the lectures say of rate, distortion and the indeterminacy of the VAE, each claim as a number and its error."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference import tables
from inference.annealing import BetaELBO
from inference.blahut_arimoto import Array, blahut_arimoto, entropy, mutual_information
from inference.objectives import ELBO
from inference.particles import particles
from models.latent import LatentVariableModel
from models.likelihoods import FixedGaussian
from models.nets import MLP
from models.priors import StandardNormal


@dataclass(frozen=True)
class Claim:
    """A claim, what was found, and what it says should be."""

    row: str  # of the lectures
    claim: str
    found: float
    expected: float
    tolerance: float

    @property
    def error(self) -> float:
        return float(abs(self.found - self.expected))

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance


def random_source(symbols: int, seed: int = 0) -> Tensor:
    """A random p(y) over so many symbols, ``(M,)``."""
    return torch.tensor(np.random.default_rng(seed).dirichlet(np.full(symbols, 2.0)))


# --- rate and distortion -------------------------------------------------------------------------------------------


def binary_rate(distortion: float) -> float:
    """R(D) of a fair bit under Hamming distortion, nats: log 2 - H(D) for D below 1/2 (Shannon 1959)."""
    return math.log(2) - entropy(np.array([distortion, 1 - distortion]))


def gaussian_rate(distortion: float) -> float:
    """R(D) of N(0, 1) under squared error, nats (Shannon 1959)."""
    return max(0.0, -0.5 * math.log(distortion))


def gaussian_grid(points: int = 61, width: float = 4.5) -> tuple[Array, Array]:
    """Points and probabilities that stand for N(0, 1)."""
    grid = np.linspace(-width, width, points)
    mass = np.exp(-0.5 * grid**2)
    return grid, mass / mass.sum()


def closed_form_claims(multipliers: tuple[float, ...] = (0.75, 1.0, 2.0, 4.0)) -> Iterator[Claim]:
    """Blahut and Arimoto's iteration against the two curves that are known in closed form."""
    bit, hamming = np.full(2, 0.5), 1 - np.eye(2)
    found = [blahut_arimoto(bit, hamming, multiplier) for multiplier in multipliers]
    worst = max(abs(channel.rate - binary_rate(channel.distortion)) for channel in found)
    yield Claim("3.22", "Blahut-Arimoto on a fair bit: largest distance from log 2 − H(D)", worst, 0.0, 1e-6)
    grid, mass = gaussian_grid()
    squares = (grid[:, None] - grid) ** 2
    found = [blahut_arimoto(mass, squares, multiplier, 1e-4) for multiplier in multipliers]
    worst = max(abs(channel.rate - gaussian_rate(channel.distortion)) for channel in found)
    claim = f"Blahut-Arimoto on N(0, 1) at {len(grid)} points: largest distance from ½ log 1/D"
    yield Claim("3.22", claim, worst, 0.0, 3e-4)  # the points cut the tails off, and the iteration stops at 1e-4


@dataclass(frozen=True)
class TrainedPoint:
    """A rate-distortion autoencoder after training, beside the exact minimum."""

    multiplier: float
    rate: float
    distortion: float
    excess: float  # of its Lagrangian over the minimum, nats
    channel_error: float  # largest difference of a probability q(z|y) from Blahut and Arimoto's


def trained_channels(
    points: Tensor, source: Tensor, codebook: Tensor, multipliers: tuple[float, ...], scale: float = 0.7
) -> list[TrainedPoint]:
    """Rate-distortion autoencoders trained as beta-VAEs with a Gaussian decoder, one for each multiplier."""
    squares = (points[:, None] - codebook).square().sum(-1).numpy()
    found = []
    for multiplier in multipliers:
        vae = tables.gaussian_decoder(points, source, codebook, scale, spread=0.1)
        lagrangian = tables.fit_channel(vae, multiplier)
        exact = blahut_arimoto(source.numpy(), squares, multiplier)
        error = float(np.abs(vae.posterior - exact.posterior).max())
        distortion = float((source.numpy()[:, None] * vae.posterior * squares).sum())
        excess = lagrangian - (exact.rate + multiplier * exact.distortion)
        found.append(TrainedPoint(multiplier, vae.information, distortion, excess, error))
    return found


def planar_source(symbols: int = 8, words: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Points in the plane, their probabilities, and codewords, all at random."""
    random = np.random.default_rng(seed)
    points, codebook = random.normal(size=(symbols, 2)), random.normal(size=(words, 2))
    return torch.tensor(points), random_source(symbols, seed), torch.tensor(codebook)


# --- the indeterminacy of the VAE ----------------------------------------------------------------------------------


def universality_claims(trials: int = 20) -> Iterator[Claim]:
    """Every triple of encoder, prior and decoder is within reach, each part whatever the others are."""
    before, after = tables.universality_error(trials)
    assert before > 0.05, "the start is to be far from every triple"
    claim = f"{trials} random triples (Q, P(z), P(y|z)), trained tables: largest error of a probability"
    yield Claim("3.21", claim, after, 0.0, 1e-6)


def held_encoder_claims(source: Tensor, states: int = 4, encoders: int = 5) -> Iterator[Claim]:
    """What prior and decoder become when the encoder is held, and what the objective then is."""
    information, prior_error, decoder_error, trained_error, objective_error, sum_error = [], [], [], [], [], []
    content = entropy(source.numpy())
    for seed in range(encoders):
        vae = tables.free_decoder(source, states, seed)
        trained = tables.fit_decoder(vae)
        trained_error.append(abs(trained - content))
        best_prior, best_decoder = tables.best_response(vae)
        tables.m_step(vae)
        prior, decoder = tables.prior_and_decoder(vae)
        prior_error.append(np.abs(prior - best_prior).max())
        decoder_error.append(np.abs(decoder - best_decoder).max())
        loss = -float(vae.bound(ELBO()).detach())
        conditional = float(-(source.numpy()[:, None] * vae.posterior * np.log(decoder.T)).sum())  # H(y|z)
        objective_error.append(abs(loss - content))
        sum_error.append(abs(vae.information + conditional - content))
        information.append(vae.information)
    assert max(information) - min(information) > 0.01, "the encoders are to differ"
    yield Claim("3.23", "P*(z) for a held Q: largest distance from E_y Q(z|y)", max(prior_error), 0.0, 1e-8)
    yield Claim("3.23", "P*(y|z) for a held Q: distance from Pop(y) Q(z|y) / P*(z)", max(decoder_error), 0.0, 1e-8)
    yield Claim("3.23", "the same by gradients: distance of the objective from H(y)", max(trained_error), 0.0, 1e-8)
    yield Claim("3.24", f"the objective at the best P, {encoders} random Q: − H(y)", max(objective_error), 0.0, 1e-10)
    yield Claim("3.24", "I(y; z) + H(y|z) − H(y), with the conditional entropy of y", max(sum_error), 0.0, 1e-10)


@dataclass(frozen=True)
class Decile:
    """An encoder of given information, its best prior and decoder, and the objective there; nats."""

    information: float
    conditional_entropy: float
    objective: float


def deciles(source: Tensor) -> list[Decile]:
    """VAEs of equal objective whose information takes every tenth of its range from 0 to H(y)."""
    content, found = entropy(source.numpy()), []
    for tenth in range(11):
        vae = tables.free_decoder(source, len(source))
        vae.set_posterior(tables.interpolated(source, content * tenth / 10))
        tables.m_step(vae)
        _, decoder = tables.prior_and_decoder(vae)
        log_decoder = np.log(np.where(decoder > 0, decoder, 1.0))
        conditional = float(-(source.numpy()[:, None] * vae.posterior * log_decoder.T).sum())
        found.append(Decile(vae.information, conditional, -float(vae.bound(ELBO()).detach())))
    return found


def decile_claims(source: Tensor) -> Iterator[Claim]:
    """Information anywhere in [0, H(y)] at one and the same objective."""
    content, found = entropy(source.numpy()), deciles(source)
    targets = [content * tenth / 10 for tenth in range(11)]
    worst = max(abs(d.information - target) for d, target in zip(found, targets, strict=True))
    yield Claim("3.25", "I(y; z) at the 11 tenths of [0, H(y)]: largest miss", worst, 0.0, 1e-8)
    spread = max(abs(d.objective - content) for d in found)
    yield Claim("3.25", "and the objective there: largest distance from H(y)", spread, 0.0, 1e-8)


def channel_claims(found: list[TrainedPoint]) -> Iterator[Claim]:
    """Autoencoders trained by gradients against the exact minimum of the same Lagrangian."""
    claim = "RDA trained by gradients, 8 points and 5 codewords in the plane: largest excess over Blahut-Arimoto"
    yield Claim("3.22", claim, max(point.excess for point in found), 0.0, 1e-3)
    bit = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    fair = trained_channels(bit, torch.full((2,), 0.5, dtype=torch.float64), bit, (2.0,))[0]
    yield Claim("3.22", "the same for a fair bit: largest error of a probability q(z|y)", fair.channel_error, 0.0, 1e-6)


@dataclass(frozen=True)
class Transition:
    """The best of several trainings at one beta; nats."""

    beta: float
    objective: float  # -E_q log p(y|z) + beta KL
    information: float
    expected: float  # the objective by H(y) + (beta - 1) I*
    starts: tuple[float, ...]  # I(y; z) from every start


def transition(source: Tensor, states: int, betas: tuple[float, ...], starts: int = 6) -> list[Transition]:
    """Beta-VAEs with a free decoder: below beta = 1 the most informative encoder wins, above it the least."""
    content, most = entropy(source.numpy()), tables.most_informative_partition(source.numpy(), states)
    found = []
    for beta in betas:
        runs = []
        for seed in range(starts):
            vae = tables.free_decoder(source, states, seed)
            runs.append((tables.fit(vae, beta, 60), vae.information))
        objective, information = min(runs)
        expected = content + (beta - 1) * (most if beta < 1 else 0.0)
        found.append(Transition(beta, objective, information, expected, tuple(run[1] for run in runs)))
    return found


def transition_claims(source: Tensor, states: int, found: list[Transition]) -> Iterator[Claim]:
    """The same as claims."""
    most = tables.most_informative_partition(source.numpy(), states)
    below, above = [t for t in found if t.beta < 1], [t for t in found if t.beta > 1]
    cells = f"{len(source)} symbols into {states} cells"
    least = min(t.information for t in below)
    yield Claim("3.26", f"β < 1: least I(y; z); expected the entropy of the best of {cells}", least, most, 1e-3)
    yield Claim("3.26", "β > 1: largest I(y; z)", max(t.information for t in above), 0.0, 1e-3)
    worst = max(abs(t.objective - t.expected) for t in found)
    yield Claim("3.26", "objective − (H(y) + (β − 1) I*), largest", worst, 0.0, 1e-3)


def collapse_claims(source: Tensor, states: int = 4) -> Iterator[Claim]:
    """A decoder that knows the population needs no latent."""
    vae = tables.free_decoder(source, states)
    vae.set_posterior(torch.full((len(source), states), 1 / states, dtype=source.dtype))
    tables.m_step(vae)
    content = entropy(source.numpy())
    loss = -float(vae.bound(ELBO()).detach())
    yield Claim("3.19", "Q = P(z) and P(y|z) = Pop(y): the objective; expected H(y)", loss, content, 1e-10)
    yield Claim("3.19", "and I(y; z)", mutual_information(source.numpy(), vae.posterior), 0.0, 1e-10)


# --- the rate-distortion autoencoder is the beta-VAE ---------------------------------------------------------------


def flat_gradient(value: Tensor, parameters: list[Tensor]) -> Tensor:
    """The gradient of a scalar as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])


def equivalence_claims(betas: tuple[float, ...] = (0.25, 1.0, 4.0), scale: float = 0.3) -> Iterator[Claim]:
    """Gradients of the beta-VAE and of KL + lambda x distortion, for a neural VAE and the same draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        likelihood = FixedGaussian((6,), (2,), lambda a, b: MLP(a, b, hidden=(8,)), scale=scale)
        model = LatentVariableModel(StandardNormal((2,)), likelihood).double()
        guide = Amortized(DiagonalNormal((2,), (6,), lambda a, b: MLP(a, b, hidden=(8,)))).double()
        x = torch.randn(40, 6, dtype=torch.float64)
        worst = max(_disproportion(model, guide, x, beta) for beta in betas)
        wrong = _disproportion(model, guide, x, 4.0, multiplier=1 / (2 * scale**2))
    assert wrong > 1e-2, "another multiplier is to give another direction"
    claim = "gradients of the β-VAE and of E ln Q/P + λ‖y − ŷ‖², λ = 1/(2βσ²): largest relative difference"
    yield Claim("3.27", claim, worst, 0.0, 1e-8)


def _disproportion(
    model: LatentVariableModel, guide: Amortized, x: Tensor, beta: float, multiplier: float = 0.0
) -> float:
    """|g_beta + beta g_rda| / |g_beta| at the same draws."""
    parameters: list[Tensor] = [*model.parameters(), *guide.parameters()]
    torch.manual_seed(1)
    weighted = flat_gradient(BetaELBO(beta, kl="analytic").bound(model, guide, x).sum(), parameters)
    torch.manual_seed(1)
    draws = particles(model, guide, x)
    decoded = model.likelihood(draws.latents["z"].value).mean
    multiplier = multiplier or 1 / (2 * beta * float(model.likelihood.scale) ** 2)
    autoencoder = flat_gradient(draws.analytic_kl().sum() + multiplier * (x - decoded).square().sum(), parameters)
    return float((weighted + beta * autoencoder).norm() / weighted.norm())
