"""Lagging inference networks: the encoder catches up with the decoder before the decoder moves (He et al. 2019)."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro.infer
import torch
from torch import Tensor, nn

from inference.data import Batches
from inference.diagnostics import surgery
from inference.engine import SVI, OptimizerFactory, SharedOptimizer
from inference.evaluate import evaluating, held_out
from inference.parameters import in_modules
from inference.particles import Program
from inference.svi import VALIDATION_DATA, trainer_of
from inference.trainer import Observer, Trainer

if TYPE_CHECKING:
    from inference.assemble import Setup

WINDOW = 10  # encoder steps whose bounds are averaged before they are compared with those before
MOST = 100  # encoder steps before the decoder moves whatever they bring


class AggressiveSVI(SVI):
    """Aggressive training of the inference network (He, Spokoyny, Neubig and Berg-Kirkpatrick 2019, algorithm 1).

    While it lasts, a step of the run is an inner loop of encoder steps on random batches, until the bound averaged
    over 10 of them is no better than over the 10 before, at most 100; then one step of the decoder alone on the batch
    at hand. After each epoch the mutual information of validation data and latents is measured, and as soon as it has
    not risen, training goes on as usual, encoder and decoder together. It costs one wait for the device in 10 encoder
    steps.

    The parameters of the guide, and those of the objective, are the encoder's; all that the model has beside them are
    the decoder's. Any objective, schedule and guide with parameters will do.

    Args:
        model: Pyro program p(x, z).
        guide: Pyro program q(z|x), a module with parameters.
        optim: optimizer over the parameters of both.
        loss: any of Pyro's ELBOs or ours.
        batches: what the inner loop reads, in a random order of its own.
        steps_per_epoch: steps of the run between two looks at the information.
        information: mutual information of validation data and latents, in nats.

    Attributes:
        aggressive: whether it still lasts.
        inner_steps: encoder steps taken.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: SharedOptimizer,
        loss: Any,
        batches: Batches,
        steps_per_epoch: int,
        information: Callable[[], float],
    ) -> None:
        super().__init__(model, guide, optim, loss)
        owners = [part for part in (guide, loss) if isinstance(part, nn.Module)]
        encoder = {id(parameter) for part in owners for parameter in part.parameters()}
        self.encoder = [parameter for parameter in optim.parameters if id(parameter) in encoder]
        self.decoder = [parameter for parameter in optim.parameters if id(parameter) not in encoder]
        if not self.encoder or not self.decoder:
            raise ValueError("it takes turns between a guide and a model that both have parameters")
        self.batches, self.steps_per_epoch, self.measure = batches, steps_per_epoch, information
        self.aggressive, self.taken, self.inner_steps, self.information = True, 0, 0, -1.0
        self._endless = self._forever()

    def step(self, x: Tensor, *args: Any, **kw: Any) -> Tensor | float:
        """Take one step of the run; returns the loss of the batch in nats, summed, after the inner loop."""
        if not self.aggressive:
            return super().step(x, *args, **kw)
        self.catch_up()
        loss = self._step_of(self.decoder, x)
        self.taken += 1
        if self.taken % self.steps_per_epoch == 0:
            before, self.information = self.information, self.measure()
            self.aggressive = self.information > before
        return loss

    def catch_up(self) -> int:
        """Move the encoder until the bound stops improving; returns the number of steps it took."""
        before, taken = torch.inf, 0
        while taken < MOST:
            losses = []
            for _ in range(WINDOW):
                x = next(self._endless)
                losses.append(torch.as_tensor(self._step_of(self.encoder, x)) / x.shape[0])
            taken += WINDOW
            now = float(torch.stack(losses).mean())
            if not now < before:
                break
            before = now
        self.inner_steps += taken
        return taken

    def _step_of(self, moving: list[nn.Parameter], x: Tensor) -> Tensor | float:
        """One step of the optimizer on some of the parameters."""
        self.optim.zero_grad()
        with in_modules():
            loss = self.loss_and_grads(self.model, self.guide, x)
        staying = self.decoder if moving is self.encoder else self.encoder
        for parameter in staying:
            parameter.grad = None  # the optimizer leaves alone what has no gradient, its moments too
        self.optim(batch_size=x.shape[0])
        return loss

    def _forever(self) -> Iterator[Tensor]:
        while True:
            yield from self.batches

    def info(self) -> dict[str, float]:
        return {**super().info(), "train/aggressive": float(self.aggressive), "train/inner_steps": self.inner_steps}

    def about(self) -> dict[str, float]:
        return {"train/inner_steps": self.inner_steps, "train/aggressive_steps": self.taken}

    def state_dict(self) -> dict[str, Tensor]:
        numbers = [float(self.aggressive), float(self.taken), float(self.inner_steps), self.information]
        batches = {f"batches.{key}": torch.as_tensor(value) for key, value in self.batches.state_dict().items()}
        return {"numbers": torch.tensor(numbers, dtype=torch.float64), **batches}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        aggressive, taken, inner, self.information = state["numbers"].tolist()
        self.aggressive, self.taken, self.inner_steps = bool(aggressive), int(taken), int(inner)
        self.batches.load_state_dict({key.removeprefix("batches."): state[key] for key in state if key != "numbers"})
        self._endless = self._forever()


def aggressive(
    setup: "Setup",
    folder: Path,
    observers: tuple[Observer, ...],
    guide: nn.Module,
    objective: pyro.infer.ELBO,
    optimizer: OptimizerFactory,
) -> Trainer:
    """Stochastic variational inference whose encoder catches up before each step of the decoder (He et al. 2019)."""
    if setup.config.section("trainer").engine != "eager":
        raise ValueError(
            "it steps encoder and decoder apart, and a compiled step is of both; accepted: trainer.engine=eager"
        )
    # an order of its own, for the inner loop
    inner = Batches(setup.source("train"), setup.config.section("batching").batch_size, setup.seed + 1)
    valid, _ = held_out(setup.source("valid"), VALIDATION_DATA, setup.seed)

    def information() -> float:
        with evaluating(setup.model, guide, seed=setup.seed):
            return surgery(setup.model, guide, valid).mutual_information

    engine = partial(AggressiveSVI, batches=inner, steps_per_epoch=len(inner), information=information)
    return trainer_of(setup, folder, observers, guide, objective, optimizer, engine)
