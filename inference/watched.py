"""The numbers, words and tensors that programs hold, and so what a graph of theirs takes as given.

Looked for in modules and their methods, in objects whose methods the programs are, and for functions in what they name:
variables of their file and of the function that made them; and within any of these in plain objects, classes, modules,
dictionaries and lists, as in ``config.train.beta``.
"""

import numbers
import random
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from enum import Enum
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Space = MutableMapping[str, Any]
_LIBRARIES = {"torch", "pyro", "numpy", "scipy", "sklearn", "pandas", "matplotlib", *sys.stdlib_module_names}
_OURS = {"models", "guides", "inference"}  # whose functions name nothing that changes; what their objects hold may
_FOLLOWED = (nn.Module, MethodType, FunctionType, partial)
_GENERATORS = (torch.Generator, np.random.Generator, random.Random)
_PLAIN = (numbers.Number, str, bytes, type(None), Enum)
_WITHOUT_SETTINGS = ("linear", "container", "conv", "sparse", "flatten")  # torch's layers that are all in their tensors
MOST_NUMBERS = 256  # in a dictionary or list; a larger one is data, a vocabulary say, and no settings
DEEPEST = 4  # entries of entries that are looked at
DEEPEST_PARTS = 32  # functions that functions name, objects in objects


def constants(owners: Iterable[Any]) -> list[tuple[Space, str]]:
    """Where owners keep what a graph takes as given: their dictionaries and names in them."""
    return [(space, name) for space, name, _ in _held(owners, libraries=False)]


def identities(places: Iterable[tuple[Space, str]]) -> tuple[Any, ...]:
    """What a graph took as given, for comparison: numbers by value; tensors by identity, their values may change."""
    values = [space.get(name) for space, name in places]
    return tuple([_identity(value) if isinstance(value, Tensor) else value for value in values])


def _identity(tensor: Tensor) -> int:
    return -id(tensor) if tensor.requires_grad else id(tensor)


def is_plain(value: Any) -> bool:
    """Whether a value other than a tensor is all there is to it, so that it is the same if it compares the same."""
    return isinstance(value, (*_PLAIN, torch.dtype, torch.device, torch.Size))


@contextmanager
def undone(owners: list[Any]) -> Iterator[list[tuple[Space, str, Any]]]:
    """Afterwards the owners' tensors and numbers, and the random number generators, are as they were.

    They are as the list says that it yields, which may be written into.
    """
    held = _held(owners)
    restorers = [_restorer(value) for _, _, value in held]
    states = (random.getstate(), np.random.get_state())  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield held
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            for (space, name, value), restore in zip(held, restorers, strict=True):
                if space.get(name) is not value:
                    space[name] = value
                restore()


def _restorer(value: Any) -> Callable[[], Any]:
    """What puts a tensor's values or a generator's state back."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    return partial(value.data.copy_, value.detach().clone()) if _is_writable(value) else lambda: None


def _is_writable(value: Any) -> bool:
    """Whether it is a tensor that a program can write into: not one expanded, whose elements share their memory."""
    own = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    return own and not (value.layout == torch.strided and 0 in value.stride())


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

    def get(self, name: Any, default: Any = None) -> Any:
        return _entry(self.space.get(self.variable), name, default)

    def __setitem__(self, name: Any, value: Any) -> None:
        target = self.space.get(self.variable)
        if isinstance(target, type):
            setattr(target, name, value)
        elif isinstance(target, dict | list):
            target[name] = value
        else:
            vars(target)[name] = value


def name_of(space: Space, name: Any) -> str:
    """What to call a place in a message."""
    return name if isinstance(name, str) or not isinstance(space, _Within) else f"{space.variable}[{name}]"


def _entry(value: Any, name: Any, default: Any = None) -> Any:
    if isinstance(value, list | tuple):
        return value[name] if isinstance(name, int) and name < len(value) else default
    return (value if isinstance(value, dict) else getattr(value, "__dict__", {})).get(name, default)


def _parts(owner: Any, seen: set[int], depth: int = 0) -> Iterator[Any]:
    """The modules, objects and functions that an owner consists of and works on."""
    if id(owner) in seen or depth > DEEPEST_PARTS:
        return
    seen.add(id(owner))
    inside: Iterable[Any] = ()
    if isinstance(owner, nn.Module):
        yield owner
        inside = [*owner.children(), *_methods(type(owner)), *_values(owner)]
    elif isinstance(owner, MethodType):
        inside = (owner.__self__, owner.__func__)
    elif isinstance(owner, partial):
        inside = (owner.func, *owner.args, *owner.keywords.values())
    elif isinstance(owner, FunctionType):
        yield owner
        inside = [space.get(name) for space, name in _named(owner)]
        inside = [each for each in inside if not (isinstance(each, FunctionType) and _is_settled(each))]
    elif isinstance(owner, list | tuple | dict):
        inside = _values(owner)
    elif hasattr(owner, "__dict__") and (depth == 0 or _is_somebodys(owner)):  # first of all, any objective
        yield owner
        inside = [*_methods(type(owner)), *_values(owner)]
    for each in inside:
        if isinstance(each, (*_FOLLOWED, list, tuple, dict)) or hasattr(each, "__dict__"):
            yield from _parts(each, seen, depth + 1)


def _is_somebodys(value: Any) -> bool:
    return not isinstance(value, type | ModuleType) and not _of_library(type(value))


def _values(value: Any) -> list[Any]:
    """What is in a container, or in the attributes of an object."""
    if isinstance(value, list | tuple):
        return list(value) if len(value) <= MOST_NUMBERS else []
    entries = value if isinstance(value, dict) else vars(value)
    return list(entries.values()) if len(entries) <= MOST_NUMBERS else []


def _methods(kind: type) -> list[FunctionType]:
    """The functions of a class that are somebody's own."""
    own = [each for each in kind.__mro__ if not _is_settled(each)]
    return [function for each in own for function in vars(each).values() if isinstance(function, FunctionType)]


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
        yield from ((kept, name) for kept in (part._parameters, part._buffers) for name in list(kept))
    own = [(vars(part), name) for name in list(vars(part))]
    named = _named(part) if isinstance(part, FunctionType) else []
    yield from (*named, *own)
    if isinstance(part, FunctionType) and _is_settled(part):
        return
    for space, name in named or [(space, name) for space, name in own if name[0] != "_"]:
        yield from _within(space, name, part)


def _within(space: Space, name: Any, part: Any, depth: int = 1) -> Iterator[tuple[Space, Any]]:
    """Where there is something plain in what a part names, and in what that consists of."""
    inside = _Within(space, name)
    for key, entry in _settings(space.get(name), part).items():
        if isinstance(entry, (*_PLAIN, *_GENERATORS, Tensor)):
            yield inside, key
        elif depth < DEEPEST and not isinstance(entry, (*_FOLLOWED, ModuleType, type)):
            yield from _within(inside, key, part, depth + 1)


def _settings(value: Any, part: Any) -> dict[Any, Any]:
    """What is in a plain object, a class, a module, a dictionary or a list of somebody's own."""
    entries: dict[Any, Any] = {}
    if isinstance(value, dict):
        entries = value
    elif isinstance(value, list | tuple):
        entries = {} if _is_fixed(value) else dict(enumerate(value))
    elif isinstance(value, ModuleType):
        used = _names(part.__code__) if isinstance(part, FunctionType) and not _of_library(value) else []
        entries = {name: vars(value)[name] for name in used if name in vars(value)}
    elif not (isinstance(value, _FOLLOWED) or _of_library(_class_of(value))):
        entries = {name: entry for name, entry in getattr(value, "__dict__", {}).items() if name[:2] != "__"}
    return entries if len(entries) <= MOST_NUMBERS else {}


def _is_settled(what: FunctionType | type) -> bool:
    """Whether the code of a function or class depends on nothing but what it is given."""
    return _of_library(what) or what.__module__.partition(".")[0] in _OURS


def _class_of(value: Any) -> type:
    return value if isinstance(value, type) else type(value)


def _of_library(what: Any) -> bool:
    """Whether a function, class or module is not somebody's own."""
    name = what.__name__ if isinstance(what, ModuleType) else what.__module__
    if what in (Namespace, SimpleNamespace):
        return False
    return name is None or name.partition(".")[0] in _LIBRARIES


def _held(owners: Iterable[Any], libraries: bool = True) -> list[tuple[Space, str, Any]]:
    """The tensors and what is plain that owners hold: dictionary, name, value."""
    seen: set[int] = set()
    parts = (part for owner in owners for part in _parts(owner, seen))
    held: dict[Any, tuple[Space, str, Any]] = {}
    for part in parts:
        layer = type(part).__module__ if isinstance(part, nn.Module) else ""
        bare = not libraries and layer.startswith("torch.") and layer.rpartition(".")[2] in _WITHOUT_SETTINGS
        for space, name in _places(part):
            if isinstance(part, torch.distributions.Transform) and name.startswith("_cached_"):
                continue  # of the latest draw, which no other is looked up by
            value = space.get(name)
            if isinstance(value, (Tensor, *_GENERATORS)) or (_is_setting(name, value) and not bare):
                held.setdefault((_key(space), name), (space, name, value))
    return list(held.values())


def _key(space: Space) -> Any:
    """Tells spaces apart, those made anew each time by what they look at."""
    if isinstance(space, _Cell):
        return id(space.cell)
    return (_key(space.space), space.variable) if isinstance(space, _Within) else id(space)


def _is_setting(name: Any, value: Any) -> bool:
    """Numbers, and where it is no affair of a library's own, words and what is not there yet."""
    private = isinstance(name, str) and name[0] == "_"
    return isinstance(value, numbers.Number) or ((isinstance(value, _PLAIN) or _is_fixed(value)) and not private)


def _is_fixed(value: Any) -> bool:
    """Whether it is a tuple of nothing but what is plain: compared as a whole, for nobody can write into it."""
    short = isinstance(value, tuple) and len(value) <= MOST_NUMBERS
    return short and all(isinstance(entry, _PLAIN) for entry in value)
