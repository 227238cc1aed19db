"""What every test starts from: one thread, a fixed seed, double precision, no parameters of another test."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch

import run
from inference.parameters import keep_in_modules
from tests.commands import Say

keep_in_modules()  # as the command line does; test_pyro_modes.py is about scripts that do not

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs a command that fails, and returns the one line that it says."""

    def command(*arguments: object, status: int = 2) -> str:
        capsys.readouterr()
        assert run.main([str(argument) for argument in arguments]) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("lowerbound: ")
        return line

    return command


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of data files; without one the tests that need it are skipped."""
    root = Path(os.environ.get("LOWERBOUND_DATA") or SHARED_DATA)
    if not root.is_dir():
        pytest.skip(f"no data folder at {root}; set LOWERBOUND_DATA to the one that has the data files")
    return root


@pytest.fixture(scope="session")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no chromium, chromium-browser or google-chrome on PATH: the page cannot be opened")


def pytest_configure() -> None:
    # Started in the background, a process inherits that Ctrl-C is ignored, and the tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--row", help="run the tests that settle this row of docs/lectures.md, such as 3.18")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--row")
    if not wanted:
        return
    chosen = [item for item in items if any(wanted in mark.args for mark in item.iter_markers("row"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
