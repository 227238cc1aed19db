"""The models of the benchmarks in plain PyTorch: what one writes without a library.

Nets are 784-200-200 and back with tanh, the latent has 50 numbers, pixels are Bernoulli. The loss is summed over the
batch. :mod:`benchmarks.stock` makes Pyro programs of the same nets.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIXELS, HIDDEN, LATENT = 784, 200, 50
FLOWS, FLOW_HIDDEN, FEATURES = 2, 64, 32
PARTICLES = 50
PSEUDO_INPUTS = 500
COMPONENTS = 10
CODES, CODE_DIM, GRID, COMMITMENT = 64, 8, (4, 4), 0.25


def net(fan_in: int, fan_out: int) -> nn.Sequential:
    """Two hidden layers."""
    hidden = [nn.Linear(fan_in, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, fan_out))


def log_normal(z: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Density of a diagonal normal, summed over the last dimension."""
    standard = (z - loc) * (-log_scale).exp()
    return (-0.5 * standard.square() - log_scale - 0.5 * math.log(2 * math.pi)).sum(-1)


def log_bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    """Mass of binary pixels, summed over the last dimension."""
    return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


class VAE(nn.Module):
    """The variational autoencoder, its KL in closed form."""

    def __init__(self, latent: int = LATENT, outputs: int | None = None) -> None:
        super().__init__()
        self.encoder, self.decoder = net(PIXELS, outputs or 2 * latent), net(latent, PIXELS)

    def forward(self, x: Tensor) -> Tensor:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        kl = 0.5 * (loc.square() + (2 * log_scale).exp() - 2 * log_scale - 1).sum()
        return F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum") + kl


class MaskedNet(nn.Module):
    """Shifts and log-scales of an autoregressive map, each a function of the entries before its own."""

    mask_in: Tensor
    mask_out: Tensor

    def __init__(self, backwards: bool) -> None:
        super().__init__()
        order = torch.arange(LATENT).flip(0) if backwards else torch.arange(LATENT)
        degrees = torch.arange(FLOW_HIDDEN) % (LATENT - 1)
        seen = torch.cat([order, torch.full((FEATURES,), -1)])
        self.first, self.last = nn.Linear(LATENT + FEATURES, FLOW_HIDDEN), nn.Linear(FLOW_HIDDEN, 2 * LATENT)
        self.register_buffer("mask_in", (degrees[:, None] >= seen).float())
        self.register_buffer("mask_out", (order.repeat(2)[:, None] > degrees).float())

    def forward(self, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.elu(F.linear(torch.cat([z, features], -1), self.first.weight * self.mask_in, self.first.bias))
        shift, log_scale = F.linear(hidden, self.last.weight * self.mask_out, self.last.bias).chunk(2, -1)
        return shift, log_scale


class IAF(VAE):
    """Two inverse autoregressive maps on top of the posterior."""

    def __init__(self) -> None:
        super().__init__(outputs=2 * LATENT + FEATURES)
        self.maps = nn.ModuleList(MaskedNet(bool(i % 2)) for i in range(FLOWS))

    def forward(self, x: Tensor) -> Tensor:
        loc, log_scale, features = self.encoder(x).split([LATENT, LATENT, FEATURES], -1)
        noise = torch.randn_like(loc)
        z, log_q = loc + log_scale.exp() * noise, log_normal(noise, torch.zeros_like(loc), log_scale)
        for masked in self.maps:
            shift, stretch = masked(z, features)
            z, log_q = z * stretch.exp() + shift, log_q - stretch.sum(-1)
        log_prior = log_normal(z, torch.zeros_like(z), torch.zeros_like(z))
        return (log_q - log_prior - log_bernoulli(self.decoder(z), x)).sum()


class IWAE(VAE):
    """The importance-weighted bound of fifty draws."""

    def __init__(self, particles: int = PARTICLES) -> None:
        super().__init__()
        self.particles = particles

    def forward(self, x: Tensor) -> Tensor:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        noise = torch.randn(self.particles, *loc.shape, device=x.device)
        z = loc + log_scale.exp() * noise
        log_q = log_normal(noise, torch.zeros_like(loc), log_scale)
        log_prior = log_normal(z, torch.zeros_like(loc), torch.zeros_like(loc))
        weights = log_bernoulli(self.decoder(z), x) + log_prior - log_q
        return -(weights.logsumexp(0) - math.log(self.particles)).sum()


class Vamp(VAE):
    """The prior is the mixture of the posteriors of learned inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.pseudo_inputs = nn.Parameter(torch.rand(PSEUDO_INPUTS, PIXELS))

    def forward(self, x: Tensor) -> Tensor:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        parts = self.encoder(self.pseudo_inputs).chunk(2, -1)
        log_prior = log_normal(z.unsqueeze(1), *parts).logsumexp(1) - math.log(PSEUDO_INPUTS)
        return (log_normal(z, loc, log_scale) - log_prior - log_bernoulli(self.decoder(z), x)).sum()


class Mixture(nn.Module):
    """A mixture of diagonal normals over the pixels; the component is summed out."""

    def __init__(self, components: int = COMPONENTS) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.rand(components, PIXELS))
        self.log_scale = nn.Parameter(torch.zeros(components, PIXELS))

    def forward(self, x: Tensor) -> Tensor:
        log_joint = log_normal(x.unsqueeze(1), self.loc, self.log_scale) + self.logits.log_softmax(0)
        return -log_joint.logsumexp(1).sum()


class VQ(nn.Module):
    """A grid of codes out of one codebook, learned by gradient; straight-through for the encoder."""

    def __init__(self) -> None:
        super().__init__()
        size = CODE_DIM * GRID[0] * GRID[1]
        self.encoder, self.decoder = net(PIXELS, size), net(size, PIXELS)
        self.codebook = nn.Parameter(torch.empty(CODES, CODE_DIM).uniform_(-1 / CODES, 1 / CODES))

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The codes' vectors with the encoder's gradient, and the two losses between them."""
        inputs = self.encoder(x).unflatten(-1, (-1, CODE_DIM))  # (B, H W D) -> (B, H W, D)
        with torch.no_grad():
            nearest = (inputs.unsqueeze(-2) - self.codebook).square().sum(-1).argmin(-1)
        vectors = F.embedding(nearest, self.codebook)
        losses = (inputs.detach() - vectors).square() + COMMITMENT * (inputs - vectors.detach()).square()
        return (inputs + (vectors - inputs).detach()).flatten(-2), losses.sum((-2, -1))

    def forward(self, x: Tensor) -> Tensor:
        z, losses = self.quantize(x)
        return (losses - log_bernoulli(self.decoder(z), x)).sum()


MODELS = {"vae": VAE, "iaf": IAF, "iwae": IWAE, "vamp": Vamp, "gmm": Mixture, "vq": VQ}
