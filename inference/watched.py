"""The numbers and tensors that programs hold, and so what a graph of theirs takes as given.

Looked for in modules, in objects whose methods the programs are, and for functions in what they name: variables of
their file and of the function that made them, and one step further the attributes and entries of plain objects,
classes, modules and dictionaries among those, such as ``config.beta``.
"""

import numbers
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Space = MutableMapping[str, Any]
_LIBRARIES = ("torch", "pyro", "numpy", "math", "builtins")
_FOLLOWED = (nn.Module, MethodType, FunctionType, partial)
MOST_NUMBERS = 256  # in a dictionary; a larger one is data, a vocabulary say, and no settings


def constants(owners: Iterable[Any]) -> list[tuple[Space, str]]:
    """Where owners keep numbers and tensors that a graph takes as given: their dictionaries and names in them."""
    return [(space, name) for space, name, _ in _held(owners, libraries=False)]


def identities(places: Iterable[tuple[Space, str]]) -> tuple[Any, ...]:
    """What a graph took as given, for comparison: numbers by value; tensors by identity, their values may change."""
    values = [space.get(name) for space, name in places]
    return tuple([id(value) if isinstance(value, Tensor) else value for value in values])


@contextmanager
def undone(owners: list[Any]) -> Iterator[list[tuple[Space, str, Any]]]:
    """Afterwards the owners' tensors and numbers, and the random number generators, are as they were."""
    held = _held(owners)
    copies = [value.detach().clone() if _is_writable(value) else None for _, _, value in held]
    with torch.random.fork_rng():
        try:
            yield held
        finally:
            for (space, name, value), copy in zip(held, copies, strict=True):
                if space.get(name) is not value:
                    space[name] = value
                if copy is not None:
                    value.data.copy_(copy)


def _is_writable(value: Any) -> bool:
    """Whether it is a tensor that a program can write into: not one expanded, whose elements share their memory."""
    return isinstance(value, Tensor) and not (value.layout == torch.strided and 0 in value.stride())


class _Cell(dict[str, Any]):
    """A variable that a function has from the function that it was made in, as a dictionary with one entry."""

    def __init__(self, cell: CellType) -> None:
        self.cell = cell

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # nothing is in it
            return default

    def __setitem__(self, name: str, value: Any) -> None:
        self.cell.cell_contents = value


class _Within(dict[str, Any]):
    """The attributes or entries of whatever object a variable has at the moment."""

    def __init__(self, space: Space, variable: str) -> None:
        self.space, self.variable = space, variable

    def get(self, name: str, default: Any = None) -> Any:
        return _contents(self.space.get(self.variable)).get(name, default)

    def __setitem__(self, name: str, value: Any) -> None:
        target = self.space.get(self.variable)
        if isinstance(target, type):
            setattr(target, name, value)
        else:
            _contents(target)[name] = value


def _contents(value: Any) -> Any:
    return value if isinstance(value, dict) else getattr(value, "__dict__", {})


def _parts(owner: Any, seen: set[int]) -> Iterator[Any]:
    """The modules and objects that an owner consists of, and where it is a function or a method those it works on."""
    if id(owner) in seen:
        return
    seen.add(id(owner))
    if isinstance(owner, nn.Module):
        yield from owner.modules()
    elif isinstance(owner, MethodType):
        yield from _parts(owner.__self__, seen)
        yield from _parts(owner.__func__, seen)
    elif isinstance(owner, partial):
        for each in (owner.func, *owner.args, *owner.keywords.values()):
            yield from _parts(each, seen)
    elif isinstance(owner, FunctionType):
        yield owner
        for space, name in _named(owner):
            value = space.get(name)
            if isinstance(value, _FOLLOWED):
                yield from _parts(value, seen)
    elif hasattr(owner, "__dict__"):
        yield owner


def _named(function: FunctionType) -> list[tuple[Space, str]]:
    """The variables that a function names: those of its file, and those of the function that it was made in."""
    own: list[tuple[Space, str]] = [(function.__globals__, n) for n in _names(function.__code__)]
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return [place for place in own if place[1] in function.__globals__] + [(_Cell(cell), name) for name, cell in cells]


def _names(code: CodeType) -> list[str]:
    """The names in a function, and in the functions and comprehensions that are written inside of it."""
    inner = [name for each in code.co_consts if isinstance(each, CodeType) for name in _names(each)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _places(part: Any) -> Iterator[tuple[Space, str]]:
    """Where a part holds what a graph would take as given."""
    if isinstance(part, nn.Module):
        yield from ((part._buffers, name) for name in list(part._buffers))
    own = [(vars(part), name) for name in list(vars(part))]
    named = _named(part) if isinstance(part, FunctionType) else []
    yield from (*named, *own)
    if isinstance(part, FunctionType) and _of_library(part):
        return
    for space, name in named or [(space, name) for space, name in own if name[0] != "_"]:
        yield from ((_Within(space, name), key) for key in _settings(space.get(name), part))


def _settings(value: Any, part: Any) -> list[str]:
    """The numbers inside of what a part names: a plain object, a class, a module or a dictionary of somebody's own."""
    entries: Any = {}
    if isinstance(value, dict):
        entries = value if len(value) <= MOST_NUMBERS else {}
    elif isinstance(value, ModuleType):
        used = _names(part.__code__) if isinstance(part, FunctionType) and not _of_library(value) else []
        entries = {name: vars(value)[name] for name in used if name in vars(value)}
    elif isinstance(value, SimpleNamespace) or not (isinstance(value, _FOLLOWED) or _of_library(_class_of(value))):
        entries = getattr(value, "__dict__", {})
    return [key for key, entry in entries.items() if isinstance(key, str) and isinstance(entry, numbers.Number)]


def _class_of(value: Any) -> type:
    return value if isinstance(value, type) else type(value)


def _of_library(what: Any) -> bool:
    """Whether a function, class or module is not somebody's own."""
    name = what.__name__ if isinstance(what, ModuleType) else what.__module__
    return name is None or name.partition(".")[0] in _LIBRARIES


def _held(owners: Iterable[Any], libraries: bool = True) -> list[tuple[Space, str, Any]]:
    """The tensors and numbers that owners hold, but for parameters: dictionary, name, value."""
    seen: set[int] = set()
    parts = (part for owner in owners for part in _parts(owner, seen))
    ours = (part for part in parts if libraries or not type(part).__module__.startswith("torch."))
    held = ((space, name, space.get(name)) for part in ours for space, name in _places(part))
    kinds = (Tensor, numbers.Number)
    return [(s, k, v) for s, k, v in held if isinstance(v, kinds) and not isinstance(v, nn.Parameter)]
