"""Programs whose parameters are held constant for a while."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.func import functional_call

from inference.parameters import is_on
from inference.structure import Program, StructureError

Result = TypeVar("Result")


def held(program: Program, function: Callable[[Program], Result], what: str = "guide") -> Result:
    """``function(program)``, with the parameters of the program as constants as long as it runs.

    Gradients still flow through whatever else there is, arguments and draws. Everything that reads the parameters has
    to happen inside: a flow reads them when its density is asked for, not when it is made. A module, or the module
    whose method the program is, is not changed; it sees detached copies, so that any module will do. Of any other
    function the parameters are those it gets from ``pyro.param``.

    Args:
        program: a module, a method of one, or a function with parameters from ``pyro.param``.
        function: runs the program it is given, and scores what that draws.
        what: what to call it in an error.

    Raises:
        StructureError: its parameters cannot be told from the rest of it, or dropout would make it another program
            every time it is run.
    """
    owner = owner_of(program)
    if owner is None:
        return function(_with_constants(program, what))
    expect_same_twice(program, what)
    constants = {f"program.{name}": parameter.detach() for name, parameter in owner.named_parameters()}
    run = _with_constants(program, what, constants.values())
    _forget(owner)
    try:
        with _unwarned(owner):
            return functional_call(_Calling(owner, lambda: function(run)), constants, ())
    finally:
        _forget(owner)
        _leave_no(constants.values())


def expect_same_twice(program: Program, what: str) -> None:
    """Refuse a program with dropout, which is another one each time it is run."""
    owner = owner_of(program)
    dropouts = [] if owner is None else [m for m in owner.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    if any(dropout.training and dropout.p > 0 for dropout in dropouts):
        raise StructureError(
            f"the {what} has dropout, so that it is another program each time it is run; leave the dropout out, or use "
            "a gradient that runs it once, such as gradient=reparameterized"
        )


def owner_of(program: Program) -> nn.Module | None:
    """The module that holds a program's parameters: itself, or the one whose method it is; None for other functions."""
    candidate = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
    return candidate if isinstance(candidate, nn.Module) else None


def expect_constant(score: Tensor, what: str) -> None:
    """Refuse a program whose densities still have a gradient where its draws and parameters are held constant."""
    if score.requires_grad:
        raise StructureError(
            f"the {what} has parameters that do not come from pyro.param, so that they cannot be held constant: make "
            "it an nn.Module that owns them, or a method of one"
        )


def _with_constants(program: Program, what: str, constants: Iterable[Tensor] = ()) -> Program:
    # Pyro's optimizers learn of parameters by param sites; those of the copies are none of theirs.
    def run(*args: Any, **kw: Any) -> Any:
        with poutine.block(hide_types=["param"]), _DetachedParameters(what, constants):
            return program(*args, **kw)

    return run


class _DetachedParameters(Messenger):
    """Cuts the gradient between parameters and what is made of them, and keeps copies of them out of Pyro's store."""

    def __init__(self, what: str, constants: Iterable[Tensor]) -> None:
        super().__init__()
        self.what, self.constants = what, {id(constant) for constant in constants}

    def _pyro_param(self, msg: Any) -> None:
        if len(msg["args"]) > 1 and id(msg["args"][1]) in self.constants:
            msg["value"] = msg["args"][1]  # which nobody needs to look up, or to remember

    def _pyro_post_param(self, msg: Any) -> None:
        if "$$$" in msg["name"] and msg["value"].requires_grad:
            raise StructureError(
                f"the {self.what} registers a net by pyro.module that it does not own, whose parameters cannot be held "
                f"constant: make the {self.what} an nn.Module that owns the net, or a method of one"
            )
        msg["value"] = msg["value"].detach()


@contextmanager
def _unwarned(owner: nn.Module) -> Iterator[None]:
    """Without Pyro's warning, one for each parameter, that a net which is in training has constants."""
    if is_on() and isinstance(owner, PyroModule):  # then there is none
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".* was not registered in the param store because requires_grad=False")
        yield


def _leave_no(constants: Iterable[Tensor]) -> None:
    """Take copies out of Pyro's store, where a PyroParam puts itself when it is first read."""
    if not is_on():
        store, copies = pyro.get_param_store(), {id(constant) for constant in constants}
        for name in [name for name, value in store.named_parameters() if id(value) in copies]:
            del store[name]


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
