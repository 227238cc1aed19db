"""Pyro handlers: draws without gradients, parameters with names of their own, and those that programs come upon."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped


class DetachedDraws(Messenger):
    """Cuts the gradient between what is drawn and the parameters of the distributions it is drawn from."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and hasattr(msg["value"], "detach"):
            msg["value"] = msg["value"].detach()


class ParametersMet(Messenger):
    """Remembers the parameters that programs come upon, of each name the last, as ``pyro.infer.SVI`` does.

    Attributes:
        met: their values by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met: dict[str, Any] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        self.met[msg["name"]] = msg["value"]


class _Renamed(Messenger):
    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def _pyro_param(self, msg: Any) -> None:
        msg["name"] = f"{self.prefix}.{msg['name']}"


def parameters_of(program: str) -> AbstractContextManager[Any]:
    """Lets whoever watches from outside see the parameters of model and guide under different names.

    Pyro's own SVI collects what it steps on by name, and would leave out the first of two called ``net.weight``.
    """
    return _Renamed(program) if am_i_wrapped() else nullcontext()
