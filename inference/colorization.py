"""Colouring a grey picture by way of a latent segmentation, pixel by pixel, with the segment summed out."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from guides.amortized import Amortized
from guides.discrete import OneHotCategoricals
from inference.blahut_arimoto import mutual_information
from inference.enumeration import summed
from inference.objectives import ELBO
from models.conditional_vae import ConditionalModel, given_entries
from models.likelihoods import Categorical
from models.nets import MLP, Linear

LEVELS = 16  # of grey


@dataclass(frozen=True)
class Pictures:
    """Toy pictures: segments, each of a grey and of a colour; ``(N, H, W)`` of int64 each."""

    segment: np.ndarray
    grey: np.ndarray
    colour: np.ndarray

    @property
    def pixels(self) -> Tensor:
        """Grey and colour of every pixel, ``(N H W, 2)``."""
        flat = np.stack([self.grey.reshape(-1), self.colour.reshape(-1)], axis=1)
        return torch.tensor(flat, dtype=torch.get_default_dtype())


def draw_pictures(count: int, side: int = 16, segments: int = 4, seed: int = 0) -> Pictures:
    """Pictures of Voronoi cells: grey = f(segment) and a level of noise, colour = its segment's, now and then another.

    Args:
        count: N.
        side: H = W.
        segments: kinds of cells, each with its own grey and colour.
        seed: of all of it.
    """
    random = np.random.default_rng(seed)
    centres = random.uniform(0, side, size=(count, 6, 2))
    kinds = random.integers(segments, size=(count, 6))
    places = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2) + 0.5
    nearest = ((places[None, :, None] - centres[:, None]) ** 2).sum(-1).argmin(-1)  # (N, H W)
    segment = np.take_along_axis(kinds, nearest, 1).reshape(count, side, side)
    greys = np.linspace(2, LEVELS - 3, segments).round().astype(int)
    grey = greys[segment] + random.integers(-1, 2, size=segment.shape)
    other = random.integers(segments, size=segment.shape)
    colour = np.where(random.uniform(size=segment.shape) < 0.95, segment, other)
    return Pictures(segment, grey, colour)


def colorizer(states: int, universal: bool, hidden: int = 16) -> tuple[ConditionalModel, Amortized]:
    """P(colour | grey) = sum over z of P(z|grey) P(colour | z, grey), and a guide q(z | grey, colour).

    P(z|grey) and q start all but uniform. The weak colorizer's states start with clear colours of their own, or they
    would never part; the universal one starts with all states alike.

    Args:
        states: of z.
        universal: whether P(colour | z, grey) sees the grey, and so could do without z; a weak one sees z alone.
        hidden: units of the nets.
    """
    net = partial(MLP, hidden=(hidden,))
    prior = OneHotCategoricals((1, states), (1,), net)
    decoder = Categorical((2,), (states + universal,), net if universal else Linear, levels=LEVELS)
    model = ConditionalModel(prior, decoder, given_entries((2,), 1, "first"))
    guide = Amortized(OneHotCategoricals((1, states), (2,), net))
    with torch.no_grad():
        for part, scale in ((prior, 0.02), (guide.core, 0.02), (decoder, 0.02 if universal else 6.0)):
            part.net.output.weight.mul_(scale)
    return model, guide


def train_colorizer(
    model: ConditionalModel, guide: Amortized, x: Tensor, steps: int = 400, rate: float = 0.1
) -> list[float]:
    """Maximize the ELBO of log P(colour | grey), z summed over; returns it step by step, nats per pixel.

    Pixels that are alike are scored once, and count as often as they are there.
    """
    model.initialize(x)
    guide.core.net.center_input(x.mean(0))
    states = _states(model)
    x, counts = x.unique(dim=0, return_counts=True)
    weight = counts / counts.sum()
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=rate)
    trace = []
    for _ in range(steps):
        optimizer.zero_grad()
        bound = (weight * summed(ELBO(), model, guide, x, states)).sum()
        (-bound).backward()
        optimizer.step()
        trace.append(float(bound.detach()))
    return trace


def best_colorizer(
    x: Tensor, states: int, universal: bool, starts: int = 3, steps: int = 400, seed: int = 0
) -> tuple[ConditionalModel, float]:
    """The model with the highest bound of several random starts, and that bound."""
    found = []
    for start in range(starts):
        with torch.random.fork_rng():
            torch.manual_seed(seed + start)
            model, guide = colorizer(states, universal)
            found.append((train_colorizer(model, guide, x, steps)[-1], start, model))
    bound, _, model = max(found)
    return model, bound


@torch.no_grad()
def segmentation(model: ConditionalModel, x: Tensor) -> Tensor:
    """P(z|grey) of every pixel, ``(N, S)``."""
    return model.p_latent(x).base_dist.probs[:, 0]


@torch.no_grad()
def coloured(model: ConditionalModel, x: Tensor) -> Tensor:
    """P(colour | grey) of every pixel, z summed out, ``(N, LEVELS)``."""
    states = _states(model).unsqueeze(1).expand(-1, len(x), -1, -1)  # (S, N, 1, S)
    p = model.p_data(states, x).base.base_dist.probs[:, :, 1]  # (S, N, LEVELS)
    return torch.einsum("ns,snl->nl", segmentation(model, x), p)


def information(model: ConditionalModel, pictures: Pictures) -> tuple[float, float]:
    """I(z; segment) under P(z|grey), averaged over pixels, and H(segment), nats."""
    shares = segmentation(model, pictures.pixels).double().numpy()
    segment = pictures.segment.reshape(-1)
    kinds = np.unique(segment)
    weight = np.array([np.mean(segment == kind) for kind in kinds])
    channel = np.stack([shares[segment == kind].mean(0) for kind in kinds])  # P(z|segment)
    return mutual_information(weight, channel), float(-(weight * np.log(weight)).sum())


def _states(model: ConditionalModel) -> Tensor:
    return torch.eye(model.prior.event_shape[-1], dtype=model.context_loc.dtype).unsqueeze(1)  # (S, 1, S)
