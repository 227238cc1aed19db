"""K-means: an autoencoder whose code is one of K words, and a generator that draws words."""

import math
from collections.abc import Sequence
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from models.nets import batch_shape
from models.products import affine, squared_norms
from models.tractable import Statistics, check_finite, spread_rows


class KMeans(PyroModule):
    """K codewords; each datum is coded by the nearest (Lloyd 1982).

    Hard EM in a mixture of K equally likely spherical Gaussians of one scale, z ~ U{0, ..., K-1} and
    x ~ N(codeword z, scale^2 I). The scale makes no difference to the codes; EM fits it after them, gradients leave it
    as it is, 1 at the start. What EM raises is minus the inertia: log p(x) in :meth:`e_step` is minus the squared
    distance, in squared units of the data. As a generator it is :meth:`sample`, which draws codewords, the means of
    p(x|z).

    Args:
        event_shape: shape of one datum, D numbers.
        codewords: how many, K.
    """

    e_step_guide: ClassVar[str] = "enumerated_hard"
    scale: Tensor

    def __init__(self, event_shape: Sequence[int], codewords: int = 64) -> None:
        super().__init__()
        if codewords < 1:
            raise ValueError(f"a codebook has at least one word, got {codewords}")
        self.event_shape, self.num_states = torch.Size(event_shape), codewords
        self.codebook = nn.Parameter(torch.randn(codewords, self.event_shape.numel()))
        self.register_buffer("scale", torch.ones(()))

    @property
    def numbers_per_datum(self) -> int:
        """About how many numbers an E step makes for each datum."""
        return self.event_shape.numel() + 2 * self.num_states

    def forward(self, x: Tensor) -> Tensor:
        """Run the program on data ``(N, *event_shape)``; returns the codes, ``(..., N)``."""
        logits = self.codebook.new_zeros(self.num_states)
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=logits))
            pyro.sample("x", dist.Normal(self.decode(z), self.scale).to_event(len(self.event_shape)), obs=x)
        return z

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, z) for every code, ``(N, *event_shape) -> (N, K)`` nats."""
        x = self._flat(x)
        squares = x.square().sum(1, keepdim=True) + 2 * self._scores(x)
        normalizer = x.shape[1] * (self.scale.log() + 0.5 * math.log(2 * math.pi)) + math.log(self.num_states)
        return -0.5 * squares / self.scale.square() - normalizer

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) in nats, ``(N,)``."""
        return self.log_joint(x).logsumexp(1)

    def posterior(self, x: Tensor) -> dist.Categorical:
        """p(z|x), batch shape ``(N,)``; its mode is the code of :meth:`encode`."""
        return dist.Categorical(logits=self.log_joint(x))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The nearest codeword of data ``(N, *event_shape)``: int64 ``(N,)``, the first of those equally near."""
        return self._scores(self._flat(x)).argmin(1)

    def decode(self, code: Tensor) -> Tensor:
        """The codewords of codes ``(*batch)``, ``(*batch, *event_shape)``."""
        return self.codebook[code].reshape(*code.shape, *self.event_shape)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``count`` codewords drawn with equal probability, ``(count, *event_shape)``."""
        code = torch.randint(self.num_states, (count,), generator=generator, device=self.codebook.device)
        return self.decode(code).detach()

    def inertia(self, x: Tensor) -> Tensor:
        """Sum of squared distances of the data from their codewords, ``()``."""
        return (self._flat(x) - self.codebook[self.encode(x)]).square().sum().detach()

    def perplexity(self, x: Tensor) -> Tensor:
        """How many codewords are in use, ``()``: exp of the entropy of the codes' frequencies, K at most."""
        usage = torch.bincount(self.encode(x), minlength=self.num_states) / x.shape[0]
        return torch.special.entr(usage).sum().exp()

    def _scores(self, x: Tensor) -> Tensor:
        """Half the squared distance of ``x`` (N, D) from each codeword, less half of x squared, ``(N, K)``."""
        return affine(x, -self.codebook, self.codebook.square().sum(1) / 2)

    @torch.no_grad()
    def e_step(self, x: Tensor, hard: bool = True) -> tuple[Statistics, Tensor]:
        """See :class:`models.tractable.EMModel`; hard whether asked or not, for there is no soft limit."""
        x = self._flat(x)
        least, code = self._scores(x).min(1)
        squares = squared_norms(x)
        first = torch.zeros_like(self.codebook).index_add_(0, code, x)
        ones = torch.ones(code.shape, dtype=torch.float64, device=x.device)
        statistics = {
            "count": ones.new_zeros(self.num_states).index_add_(0, code, ones),  # bincount would wait for the device
            "first": first.double(),
            "second": squares.double().sum(),
            "entropy": torch.zeros((), dtype=torch.float64, device=x.device),
        }
        return statistics, -(squares + 2 * least).clamp(min=0)

    def expected_log_joint(self, statistics: Statistics) -> Tensor:
        """Minus the inertia, ``()``; see :class:`models.tractable.EMModel`."""
        codebook = self.codebook.double()
        spread = (statistics["count"] * codebook.square().sum(1)).sum() - 2 * (statistics["first"] * codebook).sum()
        return -(statistics["second"] + spread)

    @torch.no_grad()
    def m_step(self, statistics: Statistics) -> None:
        """Codewords to the means of their data; a word without data stays, for nowhere is better than elsewhere."""
        count = statistics["count"].unsqueeze(1)
        means = statistics["first"] / count.clamp(min=1)
        self.codebook.copy_(torch.where(count > 0, means, self.codebook.double()))
        self.settle(statistics)

    @torch.no_grad()
    def settle(self, statistics: Statistics) -> None:
        """The scale, to the maximum of the likelihood of the data given their codes."""
        variance = -self.expected_log_joint(statistics) / (statistics["count"].sum() * self.codebook.shape[1])
        self.scale.copy_(variance.clamp(min=torch.finfo(self.scale.dtype).eps ** 2).sqrt())

    @torch.no_grad()
    def initialize(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        """Codewords at data far from one another (k-means++)."""
        check_finite(x)
        self.codebook.copy_(spread_rows(self._flat(x), self.num_states, generator))

    def lloyd(self, x: Tensor, iterations: int) -> None:
        """At most so many iterations from where the codewords are, until they stand still."""
        for _ in range(iterations):
            before = self.codebook.detach().clone()
            self.m_step(self.e_step(x)[0])
            if torch.equal(before, self.codebook):
                break

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape((*batch_shape(x, self.event_shape), self.event_shape.numel()))  # (*batch, *event) -> (*, D)
