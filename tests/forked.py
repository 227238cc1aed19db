"""The command line in processes of its own that need no imports: one warm parent forks them.

Run as a script, it is that parent: it reads requests and writes answers, a line of JSON each.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Child:
    """``run.py`` at work in a process."""

    def __init__(self, parent: "WarmParent", pid: int, log: Path) -> None:
        self.parent, self.pid, self.log = parent, pid, log

    def poll(self) -> int | None:
        """Its exit status, minus the signal's number if one killed it; None while it runs."""
        return self.parent.ask(poll=self.pid)["status"]

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit status once it has ended."""
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            assert time.monotonic() < deadline, f"still running: {self.log.read_text()}"
            time.sleep(0.002)
        return status

    def kill(self, signum: int, group: bool = False) -> None:
        """Send it a signal, or as Ctrl-C does, to it and everything that it has started."""
        (os.killpg if group else os.kill)(self.pid, signum)


class WarmParent:
    """Starts children; ``with`` ends the parent."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def __enter__(self) -> "WarmParent":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.communicate()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *arguments: object, log: Path) -> Child:
        """``python run.py ARGUMENTS``, what it prints going to ``log``."""
        return Child(self, self.ask(start=[str(a) for a in arguments], log=str(log))["pid"], log)


def _serve() -> None:
    # All that a run imports, also what torch's optimizers import when the first is built.
    import h5netcdf  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import torch._dynamo  # noqa: F401

    import inference.experiment
    import inference.pictures  # noqa: F401
    import run
    from inference.export import import_arviz

    import_arviz()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            answer = {"status": _status(request["poll"])}
        elif (pid := os.fork()) == 0:
            _become(run.main, request)
        else:
            os.setpgid(pid, pid)  # here too: whoever has the answer may send the group a signal
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _status(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _become(main: Any, request: dict[str, Any]) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = 70
    try:
        status = main(request["start"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
