"""What the report's pictures show, computed from model, guide and held-out data."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.distributions import Distribution, Normal
from torch import Tensor

from inference.assemble import Setup
from inference.canvas import ground_is_low, save
from inference.closed_form import factors
from inference.data_figures import image_samples
from inference.diagnostics import kl_per_dimension, posterior_means
from inference.evaluate import evaluating, held_out, repeated
from inference.figures import Gallery
from inference.particles import Program, decode, encode, generate, particles, prior_latents
from inference.prior_figures import Density
from models.autoregressive import AutoregressiveLevels

NUM_RECONSTRUCTIONS, NUM_SAMPLES, NUM_CODES, MANIFOLD_SIDE = 32, 100, 2000, 20
PAIRS, STEPS = 3, 7  # of lines, and codes from one to the other
DENSITY_SIDE = 121  # points of the grid along each axis of the plane


def gallery(setup: Setup) -> Gallery:
    """Reconstructions, samples and codes of a trained model; the same for the same seed."""
    model, guide, dataset = setup.model, setup.guide, setup.dataset
    x, index = held_out(setup.source("test"), NUM_CODES, setup.config.values.seed)
    with evaluating(model, guide, seed=setup.config.values.seed):
        draws = [particles(model, guide, some).latents for some in x.split(256)]  # a likelihood's values may be many
        latents = {name: torch.cat([part[name].value for part in draws]) for name in draws[0]}
        shown = {name: z[:NUM_RECONSTRUCTIONS] for name, z in latents.items()}
        reconstructions = shown_of(decode(model, shown, x[:NUM_RECONSTRUCTIONS]))
        prior, p_x, drawn = generate(model, repeated(x, NUM_SAMPLES))
        many_prior = prior_latents(model, repeated(x, NUM_CODES))
        by_dimension = kl_per_dimension(model, guide, x)
        means = posterior_means(guide, x)
        grid = None if dataset.vocabulary else _manifold(setup, prior)
        components = _components(setup, x) if len(dataset.shape) == 3 else None
        between = _between(model, shown, x) if dataset.vocabulary else None
        density = _prior_density(model, torch.cat([_flat(latents), _flat(many_prior)]))
    sites = list(latents.values())
    labels = dataset.labels.get("test")
    return Gallery(
        shape=dataset.shape,
        value_range=_value_range(setup),
        originals=_numpy(x[:NUM_RECONSTRUCTIONS]),
        reconstructions=_numpy(reconstructions),
        samples=_numpy(shown_of(p_x, drawn) if len(dataset.shape) == 3 else drawn),
        latent_means=_numpy(means),
        latent_draws=_numpy(_flat(latents)),
        prior_draws=_numpy(_flat(many_prior)),
        labels=None if labels is None else labels[index].numpy(),
        kl_per_dimension=None if by_dimension is None else _numpy(by_dimension),
        manifold=grid,
        components=components,
        latent_states=_states(sites[0]) if len(sites) == 1 else 1,
        prior_density=density,
        drawn=isinstance(p_x, AutoregressiveLevels),
        vocabulary=dataset.vocabulary,
        between=between,
    )


def _value_range(setup: Setup) -> tuple[float, float]:
    return (0.0, (setup.dataset.observed_levels or 2) - 1.0) if setup.representation == "levels" else (0.0, 1.0)


def print_samples(setup: Setup, images: Tensor, data: Tensor, path: Path) -> None:
    """A picture of images ``(N, C, H, W)``, at most 72, light or dark as the data are."""
    look = _value_range(setup), ground_is_low(_numpy(data), _value_range(setup))
    save(image_samples(_numpy(images), *look).sheet, path)


def _states(z: Tensor) -> int:
    """K of latents that are one-hot vectors, ``(N, V, K)`` or on a grid ``(N, H, W, K)``; 1 of all others."""
    hot = z.dim() > 2 and bool(((z == 0) | (z == 1)).all() and (z.sum(-1) == 1).all())
    return z.shape[-1] if hot else 1


def shown_of(p_x: Distribution, draw: Tensor | None = None) -> Tensor:
    """What a picture shows of p(x|z), ``(*batch, *shape)``.

    Its mean; where entries depend on each other, of images a draw, and of lines the likeliest token each time.
    """
    if not isinstance(p_x, AutoregressiveLevels):
        return p_x.mean
    if len(p_x.event_shape) == 1:
        return p_x.greedy()
    return p_x.sample() if draw is None else draw


def _components(setup: Setup, x: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
    """Of a mixture, the mean of p(x|z) for every state and how often held-out data are in it; most used ones first."""
    states = getattr(setup.model, "num_states", 0)
    latents = encode(setup.guide, x)
    if not states or list(latents) != ["z"] or not isinstance(latents["z"], torch.distributions.Categorical):
        return None
    share = latents["z"].probs.mean(0)  # (K,)
    order = share.argsort(descending=True, stable=True)
    means = decode(setup.model, {"z": order}, x.new_zeros(len(order), *setup.dataset.shape)).mean
    return _numpy(means), _numpy(share[order])


def _between(model: Program, codes: dict[str, Tensor], x: Tensor) -> np.ndarray:
    """What codes on the way from one datum's to another's are read as, ``(pairs, STEPS, T)``.

    Numbers of states have nothing in between: half-way, one gives way to the other.
    """
    pairs = min(PAIRS, x.shape[0] // 2)
    way = torch.linspace(0, 1, STEPS, dtype=x.dtype, device=x.device)
    ends = {name: (z[:pairs].unsqueeze(1), z[pairs : 2 * pairs].unsqueeze(1)) for name, z in codes.items()}
    path = {}
    for name, (first, second) in ends.items():
        weight = way.reshape(1, STEPS, *[1] * (first.dim() - 2))
        steps = torch.lerp(first, second, weight) if first.is_floating_point() else first.where(weight < 0.5, second)
        path[name] = steps.flatten(0, 1)  # (pairs, STEPS, *event) -> (pairs STEPS, *event)
    read = shown_of(decode(model, path, x[:1].expand(pairs * STEPS, *x.shape[1:])))
    return _numpy(read).reshape(pairs, STEPS, *x.shape[1:])


def _prior_density(model: Any, draws: Tensor) -> Density | None:
    """The prior of a latent in the plane on a grid around draws ``(n, 2)``; None where there is none of that kind."""
    prior = getattr(model, "prior", None)
    binary = bool(((draws == 0) | (draws == 1)).all())
    conditional = prior is not None and len(getattr(prior, "context_shape", ())) > 0
    if prior is None or conditional or tuple(getattr(prior, "event_shape", ())) != (2,) or binary:
        return None
    low, high = draws.quantile(0.002, 0), draws.quantile(0.998, 0)
    half = 0.6 * float((high - low).max().clamp(min=1e-6))
    steps = torch.linspace(-half, half, DENSITY_SIDE, dtype=draws.dtype, device=draws.device)
    across, up = (float((low[i] + high[i]) / 2) + steps for i in (0, 1))
    points = torch.cartesian_prod(across, up)  # (g * g, 2)
    value = torch.cat([prior().log_prob(some).exp() for some in points.split(1024)]).nan_to_num()  # outside its support
    value = value.reshape(DENSITY_SIDE, DENSITY_SIDE)  # (g * g,) -> (g, g)
    return Density(_numpy(across), _numpy(up), _numpy(value))


def _manifold(setup: Setup, prior: dict[str, Tensor]) -> np.ndarray | None:
    """Decoder means over the unit square put through the inverse CDF of the prior (Kingma and Welling 2014, app. A)."""
    if len(prior) != 1 or next(iter(prior.values())).shape[1:] != (2,):
        return None
    name, z = next(iter(prior.items()))
    u = (torch.arange(MANIFOLD_SIDE, dtype=z.dtype, device=z.device) + 0.5) / MANIFOLD_SIDE
    across, down = torch.meshgrid(u, u.flip(0), indexing="xy")
    codes = _quantiles(setup.model, torch.stack([across, down], dim=-1))  # (g, g, 2)
    if codes is None:
        return None
    like = z.new_zeros(MANIFOLD_SIDE**2, *setup.dataset.shape)
    means = shown_of(decode(setup.model, {name: codes.reshape(-1, 2)}, like))  # (g * g, *shape)
    return _numpy(means).reshape(MANIFOLD_SIDE, MANIFOLD_SIDE, *setup.dataset.shape)


def _quantiles(model: Any, u: Tensor) -> Tensor | None:
    """The prior's quantiles at the levels u, those of N(0, I) for a program without a part for it.

    None for a prior that has none: one with dependent entries, or a family that does not know them.
    """
    if getattr(getattr(model, "prior", None), "context_shape", ()):
        return None  # there is one for every datum
    p = factors(model.prior()) if hasattr(model, "prior") else Normal(torch.zeros_like(u), 1.0)
    try:
        return None if p is None else p.icdf(u)
    except NotImplementedError:
        return None


def _flat(latents: dict[str, Tensor]) -> Tensor:
    return torch.cat([z.reshape(z.shape[0], -1) for z in latents.values()], dim=1)  # (N, *event) -> (N, D)


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()
