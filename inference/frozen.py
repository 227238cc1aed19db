"""Programs with a part of their gradient taken out: parameters held constant, or draws held constant."""

from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.func import functional_call

from inference.structure import Program, StructureError


def frozen(program: Program, what: str = "guide") -> Program:
    """The same program with its parameters as constants; gradients still flow through its arguments and draws.

    Nothing about the program is changed meanwhile: it runs once on detached copies of its parameters, so that any
    module will do, one with flows too.

    Args:
        program: a module that holds its parameters.
        what: what to call it in an error.

    Raises:
        StructureError: its parameters cannot be told from the rest of it, or dropout would make it another program
            every time it is run.
    """
    if not isinstance(program, nn.Module):
        raise StructureError(f"to hold the {what}'s parameters constant it has to be an nn.Module that owns them")
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0 for m in program.modules()):
        raise StructureError(
            f"the {what} has dropout, so that it is another program each time it is run; leave the dropout out, or use "
            "a gradient that runs it once, such as gradient=reparameterized"
        )
    constants = {name: parameter.detach() for name, parameter in program.named_parameters()}

    def run(*args: Any, **kw: Any) -> Any:
        # Pyro's optimizers learn of parameters by param sites; those of the copies are none of theirs.
        with poutine.block(hide_types=["param"]):
            return functional_call(program, constants, args, kw)

    return run


class DetachedDraws(Messenger):
    """Cuts the gradient between what is drawn and the parameters of the distributions it is drawn from."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and hasattr(msg["value"], "detach"):
            msg["value"] = msg["value"].detach()
