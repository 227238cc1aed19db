"""A worker that reads ahead says nothing of a connection that broke off because its process was killed."""

import subprocess
import sys

import pytest

SCRIPT = """
import multiprocessing, os, sys, time
from inference.streaming import _end_quietly

def worker(killed):
    _end_quietly(0)
    time.sleep(0.3 if killed else 0)
    try:
        raise ConnectionResetError("gone")
    except ConnectionResetError:
        sys.excepthook(*sys.exc_info())

child = multiprocessing.get_context("fork").Process(target=worker, args=(KILLED,))
child.start()
if KILLED:
    os.kill(os.getpid(), 9)
child.join()
"""


@pytest.mark.parametrize("killed", [True, False])
def test_what_broke_off_is_told_by_a_worker_whose_process_lives(killed):
    script = SCRIPT.replace("KILLED", str(killed))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ("gone" in ended.stderr) == (not killed)
    assert ended.returncode == (-9 if killed else 0)
