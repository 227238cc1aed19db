"""Two Pyro handlers: draws without gradients, and parameters with names of their own."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped


class DetachedDraws(Messenger):
    """Cuts the gradient between what is drawn and the parameters of the distributions it is drawn from."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and hasattr(msg["value"], "detach"):
            msg["value"] = msg["value"].detach()


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
