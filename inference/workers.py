"""The same function for several arguments, in processes that end with the one that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from inference.parameters import is_on, keep_in_modules
from inference.signals import Interrupted

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerError(RuntimeError):
    """A process died before it had its result."""


def jobs_for(jobs: int, items: Sequence[Any]) -> int:
    """How many processes to start: ``jobs``, or for 0 one per CPU core, but no more than there is work."""
    if jobs < 0:
        raise ValueError(f"jobs is a number of processes, 0 for one per core; got {jobs}")
    return max(1, min(jobs or os.cpu_count() or 1, len(items)))


def spread(work: Callable[[Item], Result], items: Sequence[Item], jobs: int) -> Iterator[tuple[int, Result]]:
    """``work(item)`` for every item, each with the item's place, as they come in.

    Args:
        work: a function of a module, so that other processes find it.
        items: its arguments; they and the results are pickled.
        jobs: how many at a time; 1 stays in this process.

    Raises:
        WorkerError: a process was killed.
    """
    if jobs == 1:
        yield from ((place, work(item)) for place, item in enumerate(items))
        return
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(is_on(),))
    try:
        futures = {pool.submit(_stopping, work, item): place for place, item in enumerate(items)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise WorkerError("a process died, perhaps for want of memory") from None
    except BaseException:  # leaving early: what is under way saves itself, the rest is not begun
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown()


def _begin(parameters_in_modules: bool) -> None:
    """Start a process as the one it works for is set up."""
    if parameters_in_modules:
        keep_in_modules()
    _follow_parent()


def _follow_parent() -> None:
    """Stop when the parent is killed outright, instead of waiting for ever for the next item."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _stopping(work: Callable[[Item], Result], item: Item) -> Result:
    """Work in a process of a pool, which a signal ends: it would go on to the next item, asked for in advance."""
    try:
        return work(item)
    except Interrupted as stop:
        os._exit(128 + stop.signum)
