"""What the study of codes works on: images and labels of a run, their tokens, and pictures of tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.assemble import Setup
from inference.codes import encode_tokens
from inference.config import ConfigError
from inference.evaluate import evaluating, held_out
from inference.particles import decode
from models.vq import CodePrior

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Coded:
    """A trained run's images ``(N, *shape)``, tokens ``(N, H, W)`` and labels ``(N,)``, by split."""

    setup: Setup
    images: dict[str, Tensor]
    tokens: dict[str, Tensor]
    labels: dict[str, Tensor]

    @property
    def prior(self) -> CodePrior:
        """Codebook, grid and the prior that was learnt along with them."""
        prior = self.setup.model.prior
        assert isinstance(prior, CodePrior)
        return prior

    @property
    def codes(self) -> int:
        """K."""
        return self.prior.codebook.size

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W)."""
        return self.prior.event_shape[1], self.prior.event_shape[2]

    @property
    def places(self) -> int:
        """H W."""
        return self.grid[0] * self.grid[1]

    @property
    def levels(self) -> int:
        """Number of values of a pixel as it is observed."""
        return self.setup.dataset.observed_levels or 256

    @property
    def top(self) -> float:
        """The largest value of a pixel as the model sees it."""
        return self.levels - 1.0 if self.setup.representation == "levels" else 1.0

    def pictures(self, tokens: Tensor) -> Tensor:
        """Means of p(x|z) for tokens ``(N, H, W)``: ``(N, *shape)``."""
        parts = [self._decode(some).mean for some in tokens.split(500)]
        return torch.cat(parts)

    def log_likelihood(self, tokens: Tensor, images: Tensor) -> Tensor:
        """log p(x|z) of each image given its tokens, ``(N,)`` nats."""
        pairs = zip(tokens.split(500), images.split(500), strict=True)
        with evaluating(self.setup.model, seed=0):
            return torch.cat([self._decode(some).log_prob(x) for some, x in pairs])

    def _decode(self, tokens: Tensor) -> torch.distributions.Distribution:
        model, shape = self.setup.model, self.setup.dataset.shape
        with evaluating(model, seed=0):
            vectors = self.prior.codebook.embed(tokens).movedim(-1, -3)  # (B, H, W, D) -> (B, D, H, W)
            return decode(model, {"z": vectors}, vectors.new_zeros(len(tokens), *shape))


def encode_run(setup: Setup, train_data: int, held_out_data: int, seed: int) -> Coded:
    """Images and tokens of a run, at most so many of each split, chosen at random.

    Raises:
        ConfigError: the run has no grid of codes of one level, or its data no labels.
    """
    if not isinstance(getattr(setup.model, "prior", None), CodePrior):
        raise ConfigError("the study needs a run of model=vq, whose latents are one grid of codes")
    images, tokens, labels = {}, {}, {}
    with evaluating(setup.model, setup.guide, seed=seed):
        for split in SPLITS:
            limit = train_data if split == "train" else held_out_data
            images[split], index = held_out(setup.source(split), limit, seed)
            tokens[split] = encode_tokens(setup.guide, images[split])
            if split in setup.dataset.labels:
                labels[split] = setup.dataset.labels[split][index].to(setup.device)
    return Coded(setup, images, tokens, labels)
