"""A small model with a guide, and trainers of it."""

import math
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from inference.data import Batches, Source
from inference.engine import SVI, SharedOptimizer
from inference.objectives import ELBO
from inference.rows import real
from inference.trainer import Trainer, TrainerSettings

ROWS = 26  # an epoch of seven batches, the last of two rows
BATCH = 4
PER_EPOCH = math.ceil(ROWS / BATCH)


class Model(PyroModule):
    """z ~ N(0, 1), x ~ N(z + w, 1); ``beyond`` says what becomes of the mean where w passes 0.35."""

    def __init__(self, beyond: Callable[[Tensor], Tensor] = torch.zeros_like) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.beyond = beyond

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.w + self.beyond(0.35 - self.w), 1.0).to_event(1), obs=x)


class Guide(PyroModule):
    """q(z|x) = N(a x + b, 1/2)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(self.net(x), 0.5).to_event(1))


def adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr)


def make(folder: Path, model: nn.Module | None = None, optimizer: Callable = adam, **settings: object) -> Trainer:
    """The same trainer for the same arguments, whatever was drawn before."""
    torch.manual_seed(3)
    folder.mkdir(exist_ok=True)
    x = 10 + torch.randn(ROWS, 1)
    data = real("toy", {split: x.numpy() for split in ("train", "valid", "test")}, "numbers")
    model, guide = model or Model(), Guide()
    options = TrainerSettings(**{"steps": 20, "learning_rate": 0.1, "log_every": 3, "validations": 0, **settings})
    parameters = nn.ModuleList([model, guide]).parameters() if isinstance(model, nn.Module) else guide.parameters()
    shared = SharedOptimizer(parameters, optimizer, options.learning_rate)
    return Trainer(SVI(model, guide, shared, ELBO()), Batches(Source(data, "train", "real"), BATCH), options, folder)
