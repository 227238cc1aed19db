"""One optimization step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import pyro.infer
import pyro.optim
import torch
from torch import Tensor

from inference.parameters import in_modules
from inference.particles import Program

OptimizerFactory = Callable[..., torch.optim.Optimizer]


class SharedOptimizer(pyro.optim.PyroOptim):
    """One torch optimizer over all parameters, as a Pyro optimizer.

    Pyro makes an optimizer for each parameter; one over all of them steps in a single fused kernel, and its state is
    what a checkpoint holds.

    Args:
        parameters: what is optimized; each tensor once.
        factory: builds the optimizer: ``factory(parameters, lr=learning_rate)``.
        learning_rate: step size; change it by :meth:`set_learning_rate`.
        gradient_clip: largest norm of the gradient per datum, over all parameters; None for no limit.
        speeds: by parameter, a factor that its gradients have for the sake of its step size. An optimizer that divides
            gradients by their size, such as Adam, would undo it, and has it in the parameter's learning rate.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        factory: OptimizerFactory,
        learning_rate: float,
        gradient_clip: float | None = None,
        speeds: Mapping[torch.nn.Parameter, float] | None = None,
    ) -> None:
        super().__init__(factory, {"lr": learning_rate})
        self.parameters = list(parameters)
        apart = {p: speed for p, speed in (speeds or {}).items() if speed != 1}
        if apart and _follows_sizes(factory):
            apart = {}
        rest = [p for p in self.parameters if p not in apart]
        own = [{"params": [p], "lr": learning_rate * speed, "speed": speed} for p, speed in apart.items()]
        self.optimizer = factory([*([{"params": rest}] if rest else []), *own] if own else rest, lr=learning_rate)
        self.gradient_clip = gradient_clip

    def __call__(self, params: Any = None, batch_size: int = 1) -> None:
        """Step; the gradients are sums over ``batch_size`` data."""
        if self.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.gradient_clip * batch_size)
        self.optimizer.step()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Use this step size from now on."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("speed", 1.0)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state as named tensors."""
        state = self.optimizer.state_dict()["state"]
        return {f"{i}.{key}": torch.as_tensor(value) for i, slots in state.items() for key, value in slots.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Undo: continue from what :meth:`tensors` returned."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def _follows_sizes(factory: OptimizerFactory) -> bool:
    """Whether a gradient of twice the size makes an optimizer's step twice as long."""
    lengths = []
    for size in (1.0, 2.0):
        place = torch.nn.Parameter(torch.zeros(()))
        place.grad = torch.tensor(size)
        factory([place], lr=0.1).step()
        lengths.append(float(place.detach()))
    return abs(lengths[1] - 2 * lengths[0]) < 0.1 * abs(lengths[1])


class SVI(pyro.infer.SVI):
    """Pyro's SVI for programs whose parameters live in their modules, without a host sync in the step.

    The parameters are known from the optimizer, so the step does not watch the programs for them, and keeps them out of
    Pyro's global store.

    Args:
        model: Pyro program p(x, z).
        guide: Pyro program q(z|x).
        optim: optimizer over the parameters of both.
        loss: any of Pyro's ELBOs or ours.
    """

    optim: SharedOptimizer

    def __init__(self, model: Program, guide: Program, optim: SharedOptimizer, loss: pyro.infer.ELBO) -> None:
        super().__init__(model, guide, optim, loss)
        self.objective = loss

    def at(self, progress: float) -> None:
        """Tell every part that has ``at(progress)`` how far the run is, from 0 to 1: weights, temperatures.

        It is to write what follows from it into a tensor, in place, so that a compiled step sees it change.
        """
        for part in self.annealed:
            part.at(progress)

    def info(self) -> dict[str, float]:
        """What those parts have to say in each row of the log; may wait for the device."""
        return {name: value for part in self.annealed if hasattr(part, "info") for name, value in part.info().items()}

    @cached_property
    def annealed(self) -> list[Any]:
        """The parts of model, guide and objective that want to know how far the run is; Pyro's own objectives do not.

        All are looked for once: their number is that of the layers of the nets.
        """
        programs = [p for p in (self.model, self.guide, self.objective) if isinstance(p, torch.nn.Module)]
        parts = dict.fromkeys(part for program in programs for part in program.modules())  # shared ones once
        return [part for part in parts if callable(getattr(part, "at", None))]

    def about(self) -> dict[str, float]:
        """What the summary of a run is to say of how its steps were taken."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What later steps depend on beside parameters, optimizer and random numbers, as named tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Undo: continue from what :meth:`state_dict` returned."""

    def step(self, x: Tensor, *args: Any, **kw: Any) -> Tensor | float:
        """Take one step on the loss of a batch.

        Returns:
            The loss in nats, summed over the batch, as in Pyro; a tensor on the device where the objective does not
            itself wait for it.
        """
        self.optim.zero_grad()  # first: steps on other parameters may have left gradients on these
        with in_modules():
            loss = self.loss_and_grads(self.model, self.guide, x, *args, **kw)
        self.optim(batch_size=x.shape[0])
        return loss

    def steps(self, batches: Sequence[Tensor], before: Callable[[int], None] | None = None) -> Tensor:
        """A step on each batch ``(B, *event_shape)``, ``before(i)`` called before the i-th; the losses in nats."""
        losses = []
        for i, x in enumerate(batches):
            if before is not None:
                before(i)
            losses.append(torch.as_tensor(self.step(x)))
        return torch.stack(losses)
