"""Priors made of the guide: mixtures of q(z|u) over a set of inputs u, learned ones or data.

Such a prior is built before the guide and is shown the guide's core afterwards, by :meth:`Aggregate.look_through`. It
refers to the core and does not own it: the encoder's parameters are the guide's alone, in counts and in checkpoints,
and gradients reach them through the prior as well.
"""

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from models.conditional import Conditional
from models.normal_mixture import mixture_of

SPREAD = 0.01  # of pseudo-inputs around the data that they start from, in standard deviations of the data


class Aggregate(Conditional):
    """(1/K) sum_k q(z|u_k), the posteriors of K inputs as one distribution; subclasses say of which inputs.

    Evaluating the density costs K encoder passes and, for each latent, K densities.

    Args:
        event_shape: shape of one latent.
        data_shape: shape of one datum.
        context_shape: shape of a context to ignore, where one is given.
    """

    core: Conditional | None

    def __init__(
        self, event_shape: Sequence[int], data_shape: Sequence[int], context_shape: Sequence[int] = ()
    ) -> None:
        super().__init__(event_shape, context_shape)
        self.data_shape = torch.Size(data_shape)
        self.core = None

    def look_through(self, core: Conditional) -> None:
        """Take ``core`` as q(z|u).

        Copying this prior together with the guide keeps it looking through the copied one.

        Raises:
            ValueError: it reads other data or draws other latents, or has no density.
        """
        shapes = tuple(core.context_shape), tuple(core.event_shape)
        wanted = tuple(self.data_shape), tuple(self.event_shape)
        if shapes != wanted:
            raise ValueError(
                f"{type(self).__name__} looks through a guide from data {wanted[0]} to latents {wanted[1]}; "
                f"this one goes from {shapes[0]} to {shapes[1]}"
            )
        if not core.has_density:
            raise ValueError(
                f"{type(core).__name__} puts each datum at one point, and a mixture of points is no prior with a "
                "density; accepted: a guide with noise, or a prior that is not made of it"
            )
        object.__setattr__(self, "core", core)  # not a submodule

    def inputs(self) -> Tensor:
        """The inputs u, ``(K, *data_shape)``."""
        raise NotImplementedError(f"{type(self).__name__} must define inputs() -> Tensor")

    @property
    def values_per_draw(self) -> int:
        """How many numbers it takes to score one draw, for those who have to fit draws into memory."""
        return len(self.inputs()) * self.event_shape.numel()

    def forward(self, *context: Tensor) -> dist.Distribution:
        if self.core is None:
            raise ValueError(
                f"{type(self).__name__} is made of q(z|x) and has not been shown it: call look_through(core) first, "
                "with a guide that reads q(z|x) off the data alone"
            )
        inputs = self.inputs()
        count = inputs.shape[0]
        parts = self.core(inputs).expand(torch.Size((count,)))
        return mixture_of(parts, inputs.new_zeros(count))


class VampPrior(Aggregate):
    """The mixture of the guide's posteriors of learned pseudo-inputs (Tomczak and Welling 2018, equation 9).

    The pseudo-inputs are not held to the range of the data. By :meth:`initialize` they start near data, all different.

    Args:
        event_shape: shape of one latent.
        data_shape: shape of one datum.
        context_shape: shape of a context to ignore, where one is given.
        components: number of pseudo-inputs, K.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        data_shape: Sequence[int],
        context_shape: Sequence[int] = (),
        components: int = 500,
    ) -> None:
        super().__init__(event_shape, data_shape, context_shape)
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}")
        self.pseudo_inputs = nn.Parameter(torch.randn(components, *self.data_shape))

    def look_through(self, core: Conditional) -> None:
        if any(getattr(part, "reads_tokens", False) for part in core.modules()):
            raise ValueError(
                "pseudo-inputs are learned by gradient, and tokens have none; accepted for tokens: prior=aggregated"
            )
        super().look_through(core)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start at random ones of the data ``(N, *data_shape)``, as evenly as there are fewer data than inputs."""
        count = self.pseudo_inputs.shape[0]
        rounds = [torch.randperm(x.shape[0]) for _ in range(math.ceil(count / x.shape[0]))]
        chosen = x[torch.cat(rounds)[:count].to(x.device)]
        self.pseudo_inputs.copy_(chosen + SPREAD * x.std() * torch.randn_like(chosen))

    def inputs(self) -> Tensor:
        return self.pseudo_inputs


class AggregatedPosterior(Aggregate):
    """The mixture of the guide's posteriors of training data, which is the best prior for these data.

    Of all priors it has the highest ELBO on the data that it is made of (Tomczak and Welling 2018, section 2), and
    overfits them: its own parameters are the data. Exact over the data kept.

    Args:
        event_shape: shape of one latent.
        data_shape: shape of one datum.
        context_shape: shape of a context to ignore, where one is given.
        size: number of data to keep, chosen at random; all of them where there are fewer.
    """

    data: Tensor

    def __init__(
        self, event_shape: Sequence[int], data_shape: Sequence[int], context_shape: Sequence[int] = (), size: int = 1000
    ) -> None:
        super().__init__(event_shape, data_shape, context_shape)
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size = size
        self.register_buffer("data", torch.zeros(0, *self.data_shape))

    @property
    def data_wanted(self) -> int:
        """How many of the training data :meth:`initialize` is to be given, chosen at random."""
        return self.size

    def initialize(self, x: Tensor) -> None:
        """Keep some of the data ``(N, *data_shape)``."""
        self.data = x[torch.randperm(x.shape[0])[: self.size].to(x.device)].clone()

    def inputs(self) -> Tensor:
        if not len(self.data):
            raise ValueError("AggregatedPosterior has not been given the data that it is made of: call initialize(x)")
        return self.data

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        """The number of data is known from the checkpoint alone."""
        if (stored := state_dict.get(f"{prefix}data")) is not None:
            self.data = self.data.new_zeros(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)
