"""Programs whose parameters are held constant for a while."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from pyro import poutine
from torch import nn
from torch.func import functional_call

from inference.structure import Program, StructureError

Result = TypeVar("Result")


def held(program: Program, function: Callable[[], Result], what: str = "guide") -> Result:
    """``function()``, with the parameters of ``program`` as constants as long as it runs.

    Gradients still flow through whatever else there is, arguments and draws. Everything that reads the parameters has
    to happen inside: a flow reads them when its density is asked for, not when it is made. The module itself is not
    changed; it sees detached copies, so that any module will do.

    Args:
        program: a module that holds its parameters.
        function: runs it and scores what it draws.
        what: what to call it in an error.

    Raises:
        StructureError: its parameters cannot be told from the rest of it, or dropout would make it another program
            every time it is run, or it cannot score values that it did not just draw.
    """
    if not isinstance(program, nn.Module):
        raise StructureError(f"to hold the {what}'s parameters constant it has to be an nn.Module that owns them")
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0 for m in program.modules()):
        raise StructureError(
            f"the {what} has dropout, so that it is another program each time it is run; leave the dropout out, or use "
            "a gradient that runs it once, such as gradient=reparameterized"
        )
    constants = {f"program.{name}": parameter.detach() for name, parameter in program.named_parameters()}
    _forget(program)
    try:
        # Pyro's optimizers learn of parameters by param sites; those of the copies are none of theirs.
        names = {name.removeprefix("program.").removesuffix("_unconstrained") for name in constants}
        with poutine.block(hide_fn=lambda msg: msg["type"] == "param" and _dotted(msg["args"][0]) in names):
            return functional_call(_Calling(program, function), constants, ())
    except (KeyError, NotImplementedError) as error:
        raise StructureError(
            f"the {what} cannot score draws under other gradients than they were drawn with ({error}); "
            "use a flow with an inverse, or gradient=reparameterized"
        ) from error
    finally:
        _forget(program)


def _dotted(site: str) -> str:
    """A parameter's name in its module; Pyro writes ``$$$`` where a module begins that is none of its own."""
    return site.replace("$$$", ".")


class _Calling(nn.Module):
    """A function, as a module that owns the program it runs."""

    def __init__(self, program: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.program, self.function = program, function

    def forward(self) -> Any:
        return self.function()


def _forget(program: nn.Module) -> None:
    """Empty the caches in which Pyro's transforms keep their latest draw, and with it the gradients of another run."""
    for transform in program.modules():
        if isinstance(transform, torch.distributions.Transform):
            for name in [name for name in vars(transform) if name.startswith("_cached_")]:
                setattr(transform, name, (None, None) if name == "_cached_x_y" else None)
