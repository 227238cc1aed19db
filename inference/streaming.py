"""Rows that stay in host memory or in a file: gathering them, reading them ahead, and what fits on a device."""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

Rows: TypeAlias = Tensor | np.memmap
RESIDENT_FRACTION = 0.5  # of the device's free memory; the other half is left to the model and its activations


def gather(rows: Rows, index: Tensor | slice) -> Tensor:
    """The rows at ``index`` (on the host) as a tensor; those of a file are read into memory."""
    if isinstance(rows, Tensor):
        return rows[index]
    return torch.from_numpy(np.array(rows[index.numpy() if isinstance(index, Tensor) else index]))


def row_bytes(rows: Rows) -> int:
    """Size of the raw rows in bytes."""
    return rows.numel() * rows.element_size() if isinstance(rows, Tensor) else rows.nbytes


def free_bytes(device: torch.device) -> int:
    """Free memory of a device in bytes: the accelerator's own, or the host's physical memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def fits(rows: Rows, device: torch.device, fraction: float) -> bool:
    """Whether the raw rows take at most ``fraction`` of the device's free memory, or are in that memory already."""
    if isinstance(rows, Tensor) and rows.device.type == device.type:
        return True
    return row_bytes(rows) <= fraction * free_bytes(device)


class _Reader(TorchDataset):
    """Rows by index array, for a loader whose workers may be forked or spawned."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, index: np.ndarray) -> Tensor:
        return gather(self.rows, torch.from_numpy(index))

    def __getstate__(self) -> dict:
        if isinstance(self.rows, Tensor):
            return {"rows": self.rows}
        # Pickling a memory map would send the whole file; send where it is.
        rows = self.rows
        return {"place": (os.fspath(rows.filename), rows.dtype, "r", rows.offset, rows.shape)}  # type: ignore[arg-type]

    def __setstate__(self, state: dict) -> None:
        self.rows = state["rows"] if "rows" in state else np.memmap(*state["place"])


def stream(rows: Rows, order: list[Tensor], device: torch.device, workers: int) -> Iterator[Tensor]:
    """Rows of each index tensor in ``order``, ``(B, *shape)`` on the device, read ahead by worker processes."""
    # As arrays: a tensor sent to a worker keeps a file descriptor open for as long as it lives.
    indices = [part.numpy() for part in order]
    loader: DataLoader = DataLoader(
        _Reader(rows),
        sampler=indices,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_end_quietly,
        generator=torch.Generator(),  # its own: the loader would otherwise draw a seed from the global one
    )
    for part in loader:
        yield part.to(device, non_blocking=True)


def _end_quietly(worker: int) -> None:
    """Let a worker whose process was killed say nothing of the connection that broke off with it."""
    parent, show = multiprocessing.parent_process(), sys.excepthook

    def hook(*error: Any) -> None:
        if parent is not None and isinstance(error[1], OSError | EOFError):
            parent.join(1)  # its connections close a moment before it has ended
        if parent is None or parent.is_alive():
            show(*error)

    sys.excepthook = hook
