"""Parameters that belong to the modules that use them, and not to Pyro's global store.

In that store two models of one name share weights silently, and a checkpoint could not tell whose they are. Pyro can
keep them out of it, by a setting of the whole process: here it is switched on where this package runs programs itself,
and left alone in other people's scripts.
"""

from contextlib import ContextDecorator
from typing import Any

import pyro
import torch
from pyro.nn.module import _Context


def keep_in_modules() -> None:
    """Keep parameters in their modules from now on; for whoever owns the process, such as the command line.

    Pyro's own optimizers and ``SVI`` work on in this mode.
    """
    _let_modules_change_over()
    pyro.settings.set(module_local_params=True)
    # Pyro 1.9's SVI.step asks every parameter it saw for its unconstrained value, and finds none on the plain
    # nn.Parameters of this mode. They are unconstrained, so each is its own.
    if not hasattr(torch.nn.Parameter, "unconstrained"):
        torch.nn.Parameter.unconstrained = lambda parameter: parameter  # type: ignore[attr-defined]


class in_modules(ContextDecorator):
    """The same for a while: ``with in_modules(): ...``, or a decorator of a function."""

    def __enter__(self) -> "in_modules":
        _let_modules_change_over()
        self.before = pyro.settings.get("module_local_params")
        if not self.before:
            pyro.settings.set(module_local_params=True)
        return self

    def __exit__(self, *error: Any) -> None:
        if not self.before:
            pyro.settings.set(module_local_params=False)

    def _recreate_cm(self) -> "in_modules":
        return in_modules()  # each call of a decorated function has its own


def is_on() -> bool:
    """Whether parameters are kept in their modules now."""
    return bool(pyro.settings.get("module_local_params"))


def _let_modules_change_over() -> None:
    """Let modules run that were made before the switch: Pyro gives a module its own store when it is made."""
    if not hasattr(_Context, "__getattr__"):
        _Context.__getattr__ = _own_store


def _own_store(context: _Context, name: str) -> Any:
    if name != "param_state":
        raise AttributeError(name)
    context.param_state = {"params": {}, "constraints": {}}
    return context.param_state
