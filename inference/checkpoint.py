"""Checkpoints that are whole or not there: safetensors plus JSON, no pickles."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

_INDEX = "checkpoint.json"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or of another run; the message says which file and what to do."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the file in errors that do not, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, data: str | bytes) -> None:
    """Replace ``path`` by ``data``: readers see the old file or the new one, never a part of either."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _settle(path.parent)


def save(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint and drop the one before it.

    The tensors go to a file of their own first; the checkpoint exists from the moment its index, which names that file
    and its hash, replaces the older index. A crash or a full disk before that moment leaves the older checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
    digest = _digest(data, state)
    path = folder / f"tensors-{digest[:16]}.safetensors"
    try:
        write_atomically(path, data)
        write_atomically(
            folder / _INDEX, json.dumps({"tensors": path.name, "sha256": digest, "state": state}, indent=1)
        )
    except OSError:
        if not _names(folder / _INDEX, path):
            path.unlink(missing_ok=True)  # of a checkpoint that never was
        raise
    for stale in [*folder.glob("tensors-*.safetensors"), *folder.glob(".*.partial")]:
        if stale != path:
            stale.unlink(missing_ok=True)


def exists(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint."""
    return (folder / _INDEX).is_file()


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint back, on the CPU.

    Raises:
        CheckpointError: it is missing, truncated or altered.
    """
    index_path = folder / _INDEX
    try:
        index = json.loads(index_path.read_text())
        path, digest, state = folder / index["tensors"], index["sha256"], index["state"]
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint: {error.filename} does not exist") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{index_path} is damaged: not the JSON that a run writes; train again") from None
    if _digest(data, state) != digest:
        raise CheckpointError(
            f"{path} is damaged: its {len(data):,} bytes and the state in {index_path.name} are not those that were "
            "written; restore them or train again"
        )
    return safetensors.torch.load(data), state


def _names(index: Path, tensors: Path) -> bool:
    return index.exists() and tensors.name in index.read_text()


def _digest(data: bytes, state: Any) -> str:
    digest = hashlib.sha256(data)
    digest.update(json.dumps(state, sort_keys=True).encode())
    return digest.hexdigest()


def _settle(folder: Path) -> None:
    """Have the folder's names on the disk before anything else changes: a power cut must not reorder them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rng_state() -> dict[str, Tensor]:
    """The state of torch's random number generators, of every device."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), **{f"cuda{i}": state for i, state in enumerate(cuda)}}


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Undo: continue the random numbers from where :func:`rng_state` was taken."""
    torch.set_rng_state(state["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda{i}" in state:
            torch.cuda.set_rng_state(state[f"cuda{i}"], i)


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under ``prefix.name``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`prefixed`: those of ``tensors`` under ``prefix``, by their own names."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def load_programs(tensors: dict[str, Tensor], programs: dict[str, nn.Module]) -> None:
    """Copy a checkpoint's parameters into model and guide.

    Raises:
        CheckpointError: names or shapes differ.
    """
    for name, program in programs.items():
        try:
            program.load_state_dict(under(name, tensors))
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"the checkpoint is not of this {name}: {first}") from None
