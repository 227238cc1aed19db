"""SIGTERM and SIGINT: put off where something must be finished, an exception everywhere else."""

import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
Handler = Callable[[int, FrameType | None], None]


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop.

    Args:
        signum: which one.
        what: what it came upon, after "stopped by SIGTERM".
    """

    def __init__(self, signum: int, what: str = "") -> None:
        super().__init__(signum, what)
        self.signum, self.what = signum, what

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}{self.what}"


def how_to_resume(folder: object) -> str:
    """The command that goes on with a run, in words."""
    return f"Continue with: python run.py resume {shlex.quote(str(folder))}"


class Pending(list[int]):
    """Signals that have arrived and wait."""

    def deliver(self, what: str = "") -> None:
        """Raise :class:`Interrupted` for the first of them, if there is one."""
        if self:
            raise Interrupted(self[0], what)


@contextmanager
def raised() -> Iterator[None]:
    """Raises :class:`Interrupted` when a signal arrives, so that everything on the way out is left in order."""
    stopping = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        # Launchers send SIGTERM more than once; a second Ctrl-C is from somebody who means it.
        if not stopping or signum == signal.SIGINT:
            stopping = True
            raise Interrupted(signum)

    with _handled_by(handle):
        yield


@contextmanager
def deferred() -> Iterator[Pending]:
    """Collects the signals that arrive in the list it yields; a second SIGINT interrupts at once.

    An exception out of nowhere would be lost in some callback of a library, or leave its file half made.
    """
    pending = Pending()

    def handle(signum: int, frame: FrameType | None) -> None:
        if pending and signum == signal.SIGINT:
            raise Interrupted(signum)
        pending.append(signum)

    with _handled_by(handle):
        yield pending


@contextmanager
def ignored() -> Iterator[None]:
    """Lets nothing disturb the last words."""
    with _handled_by(lambda signum, frame: None):
        yield


@contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    previous = {}
    try:
        for signum in SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup, a shell's background job: still not ours
                previous[signum] = signal.signal(signum, handler)
    except ValueError:  # not in the main thread, where signals do not arrive either
        pass
    try:
        yield
    finally:
        for signum, before in previous.items():
            signal.signal(signum, before)
