"""What every test starts from: one thread, a fixed seed, double precision, no parameters of another test."""

import os
from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch

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


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of data files; without one the tests that need it are skipped."""
    root = Path(os.environ.get("LOWERBOUND_DATA") or SHARED_DATA)
    if not root.is_dir():
        pytest.skip(f"no data folder at {root}; set LOWERBOUND_DATA to the one that has the data files")
    return root
