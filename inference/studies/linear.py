"""The linear VAE, whose collapse, rate and distortion are known in closed form, to be held beside the deep ones."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference.assemble import dataset_of
from inference.config import ConfigError, load
from inference.diagnostics import active_units
from models.nets import Linear
from models.ppca import PPCA, reverse_water_filling

MOST_DATA = 5000  # trained on all at once


@dataclass(frozen=True)
class LinearVAE:
    """A linear decoder with fixed noise and a linear encoder with a diagonal normal, over flat data ``(N, D)``.

    Args:
        model: probabilistic PCA, its standard deviation held fixed.
        guide: the amortized diagonal normal.
    """

    model: PPCA
    guide: nn.Module

    @classmethod
    def untrained(cls, data_dim: int, latent_dim: int, scale: float) -> "LinearVAE":
        """With random weights and noise of standard deviation ``scale``."""
        model = PPCA((data_dim,), latent_dim)
        with torch.no_grad():
            model.likelihood.log_scale.fill_(math.log(scale))
        return cls(model, Amortized(DiagonalNormal((latent_dim,), (data_dim,), Linear)))

    def fit(self, x: Tensor, beta: float, steps: int) -> None:
        """Maximize the beta-VAE objective on all data ``(N, D)`` at once, its expectation over q in closed form.

        By L-BFGS, until it stands still. Without sampling noise, which would turn the weakest directions on and off and
        keep the axes of the latents from settling: what is left beside the optimum is small.

        Args:
            x: the data.
            beta: weight of the KL.
            steps: most iterations.
        """
        if steps < 1:
            return
        trained = [*self.model.likelihood.net.parameters(), *self.guide.parameters()]  # and not the noise
        optimizer = torch.optim.LBFGS(
            trained, max_iter=steps, max_eval=2 * steps, tolerance_grad=1e-8, tolerance_change=1e-11,
            history_size=20, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            optimizer.zero_grad()
            rate, distortion = self.parts(x)
            value = distortion / (2 * self.model.likelihood.scale.detach().square()) + beta * rate
            value.backward()
            return value

        optimizer.step(loss)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean KL(q(z|x) || p(z)) in nats and mean squared error |x - W z - mu|^2 over q, of data ``(N, D)``.

        Both in closed form, differentiable, shape ``()``; the error is summed over entries.
        """
        q, p = self.guide.core(x).base_dist, self.model.likelihood  # type: ignore[operator]
        rate = 0.5 * (q.variance + q.loc.square() - 1 - q.variance.log()).sum(1).mean()
        residual = x - p.loc - q.loc @ p.weight.T
        return rate, (residual.square().sum(1) + q.variance @ p.weight.square().sum(0)).mean()

    @torch.no_grad()
    def rate(self, x: Tensor) -> float:
        """Mean KL(q(z|x) || p(z)), in nats."""
        return float(self.parts(x)[0])

    @torch.no_grad()
    def distortion(self, x: Tensor) -> float:
        """Mean squared error |x - W z - mu|^2 over q, in closed form; summed over entries."""
        return float(self.parts(x)[1])

    @torch.no_grad()
    def kl_to_posterior(self, x: Tensor) -> float:
        """Mean KL(q(z|x) || p(z|x)), in nats, in closed form."""
        q = self.guide.core(x).base_dist  # type: ignore[operator]
        q = torch.distributions.MultivariateNormal(q.loc, scale_tril=torch.diag_embed(q.scale))
        return float(torch.distributions.kl_divergence(q, self.model.posterior(x)).mean())


def named(beta: float) -> str:
    """A weight of the KL as a word of a run and of a table, with all its digits."""
    return f"{beta:.12g}"


def check_linear(option: str, betas: Sequence[float], latent_dim: int, scale: float) -> None:
    """Refuse linear VAEs that have no optimum; ``option`` names their weights.

    Raises:
        ConfigError: with what is accepted.
    """
    if bad := [beta for beta in betas if not 0 < beta < math.inf]:
        raise ConfigError(f"{option}: {bad[0]:g} is not above 0, where the rate is no longer bounded, and finite")
    if latent_dim < 1:
        raise ConfigError(f"study.linear_dim: {latent_dim} is below 1")
    if not 0 < scale < math.inf:
        raise ConfigError(f"the noise of a linear VAE is a standard deviation: accepted: above 0; got {scale:g}")


def flat_training_data(arguments: Sequence[str]) -> Tensor:
    """The training data that a run's words name, as real numbers less their mean, ``(N, D)``; greys lie in [0, 1].

    At most the first 5,000 of them.

    Raises:
        ConfigError: tokens, which are no numbers.
    """
    dataset = dataset_of(load(arguments))
    if dataset.kind == "tokens":
        raise ConfigError(
            f"data={dataset.name} are tokens, and a linear VAE is of numbers; study.linear_betas=[] leaves it out"
        )
    x = (
        torch.as_tensor(dataset.splits["train"][:MOST_DATA]).to(torch.get_default_dtype()).flatten(1)
    )  # (N, *event) -> (N, D)
    x = x / ((dataset.levels or 2) - 1)
    return x - x.mean(0)


def covariance_eigenvalues(x: Tensor) -> Tensor:
    """Of the covariance (divisor N) of flat data ``(N, D)``, largest first, ``(D,)`` in double precision."""
    centred = (x - x.mean(0)).double()
    return torch.linalg.eigvalsh(centred.T @ centred / len(x)).clamp(min=0).flip(0)


def directions(x: Tensor) -> int:
    """In how many directions flat data ``(N, D)`` vary by more than rounding."""
    eigenvalues = covariance_eigenvalues(x)
    return int((eigenvalues > len(eigenvalues) ** 2 * torch.finfo(x.dtype).eps * eigenvalues[0]).sum())


def transition(
    x: Tensor,
    betas: Sequence[float],
    scale: float,
    latent_dim: int,
    steps: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """A linear VAE trained with each beta, in double precision, beside the closed form.

    Args:
        x: flat data less their mean, ``(N, D)``.
        betas: weights of the KL.
        scale: standard deviation of the noise.
        latent_dim: number of latents.
        steps: of training at most, on all data at once.
        on_progress: called with how many are done, and how many there are.

    Returns:
        For each beta ``active``, ``rate`` (nats), ``distortion`` (squared error), the same with ``exact_`` in front,
        ``kl_to_posterior``, ``elbo`` and ``nll`` of the model that was trained, in nats.
    """
    x = x.double()
    eigenvalues, rows = covariance_eigenvalues(x), []
    constant = 0.5 * x.shape[1] * math.log(2 * math.pi * scale**2)
    for done, beta in enumerate(betas):
        on_progress(done, len(betas))
        torch.manual_seed(0)
        vae = LinearVAE.untrained(x.shape[1], latent_dim, scale)
        vae.model.double()
        vae.guide.double()
        vae.fit(x, beta, steps)
        exact = reverse_water_filling(eigenvalues, beta * scale**2, latent_dim)
        rate, distortion = vae.rate(x), vae.distortion(x)
        with torch.no_grad():
            nll = -float(vae.model.log_evidence(x).mean())
        rows.append(
            {
                "beta": beta,
                "active": active_units(vae.guide, x),
                "exact_active": exact.active,
                "rate": rate,
                "exact_rate": exact.rate,
                "distortion": distortion,
                "exact_distortion": exact.distortion,
                "kl_to_posterior": vae.kl_to_posterior(x),
                "elbo": -distortion / (2 * scale**2) - constant - rate,
                "nll": nll,
            }
        )
    on_progress(len(betas), len(betas))
    return rows


def water_filling_curve(x: Tensor, latent_dim: int, points: int = 200) -> list[tuple[float, float]]:
    """Rate (nats) and squared error of the best linear code of flat data ``(N, D)`` at falling water levels."""
    eigenvalues = covariance_eigenvalues(x)
    top = float(eigenvalues[0])
    low = 1e-4 * top
    levels = [top * (low / top) ** (i / (points - 1)) for i in range(points)]
    filled = [reverse_water_filling(eigenvalues, level, latent_dim) for level in levels]
    return [(one.rate, one.distortion) for one in filled]


def staircase(x: Tensor, low: float, high: float, scale: float, latent_dim: int) -> list[tuple[float, int]]:
    """Every beta from ``low`` to ``high`` at which the best linear VAE loses a unit, with the number it has from there.

    Begins with ``low`` and ends with ``high``; ``x`` is ``(N, D)`` and ``scale`` the noise's standard deviation.
    """
    eigenvalues = covariance_eigenvalues(x)
    losses = [float(value) / scale**2 for value in eigenvalues[:latent_dim]]  # of the first unit last
    ends = [(beta, sum(loss > beta for loss in losses)) for beta in (low, high)]
    between = [(beta, left) for left, beta in enumerate(losses) if low < beta < high]
    return [ends[0], *reversed(between), ends[1]]


@torch.no_grad()
def density_as_noise_vanishes(x: Tensor, latent_dim: int, scales: Sequence[float]) -> list[dict[str, float]]:
    """log p(x) of probabilistic PCA fitted to flat data ``(N, D)``, its noise then set to each of ``scales``.

    Returns:
        for each ``scale`` the mean log-density ``off`` the plane, of the data, and ``on`` it, of their projections;
        nats. As the noise vanishes the first falls to minus infinity and the second rises to plus infinity.
    """
    model = PPCA((x.shape[1],), latent_dim).to(x.dtype)
    model.maximum_likelihood(x)
    p = model.likelihood
    basis = torch.linalg.qr(p.weight).Q
    projected = p.loc + (x - p.loc) @ basis @ basis.T
    rows = []
    for scale in scales:
        p.log_scale.fill_(math.log(scale))
        off, on = (float(model.log_evidence(points).mean()) for points in (x, projected))
        rows.append({"scale": scale, "off": off, "on": on})
    return rows
