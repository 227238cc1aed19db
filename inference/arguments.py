"""Which of a step's plain arguments change from step to step: floats that do become inputs of its graph."""

import logging
from collections.abc import Callable
from typing import Any

from torch.utils._pytree import TreeSpec, tree_unflatten

log = logging.getLogger(__name__)


class Floats:
    """The floats among arguments of one structure that change.

    One that never changes stays a constant of the graph, which costs nothing. One that does is tried as a tensor
    without a dimension; where the program needs the plain number, a graph is made for each of its values.

    Args:
        spec: the structure of the arguments.

    Attributes:
        inputs: places of those that are inputs of the graph.
        refused: why others that change are not, by place.
    """

    def __init__(self, spec: TreeSpec) -> None:
        self.spec = spec
        self.inputs: tuple[int, ...] = ()
        self.refused: dict[int, str] = {}
        self._last: dict[int, float] = {}
        self._values: list[float] = []

    def changed(self, leaves: list[Any]) -> bool:
        """Whether any is not what it was when it was last noted."""
        return [leaf for leaf in leaves if isinstance(leaf, float)] != self._values

    def note(self, leaves: list[Any], works: Callable[[tuple[int, ...], list[float]], object] | None) -> None:
        """Look at the arguments of another step.

        Args:
            leaves: arguments, flattened.
            works: raises an error where floats at some places, whose values of the step before it is given, cannot be
                inputs of a graph; None while that cannot be found out.
        """
        now = {place: leaf for place, leaf in enumerate(leaves) if isinstance(leaf, float)}
        if now != self._last and works is not None:
            for place in now.keys() & self._last.keys():
                if now[place] != self._last[place] and place not in (*self.inputs, *self.refused):
                    self._try(place, works)
        self._last, self._values = now, list(now.values())

    def inputs_of(self, leaves: list[Any]) -> tuple[int, ...]:
        """Those of the inputs that are floats in this step too."""
        return tuple([place for place in self.inputs if isinstance(leaves[place], float)]) if self.inputs else ()

    def _try(self, place: int, works: Callable[[tuple[int, ...], list[float]], object]) -> None:
        places = (*self.inputs, place)
        try:
            works(places, [self._last[each] for each in places])
            self.inputs = places
        except Exception as error:  # the step runs with the number, so that whatever is raised comes of the tensor
            self.refused[place] = " ".join(str(error).split()) or type(error).__name__
            log.info("a graph for each value of %s: %s", self.name(place), self.refused[place])

    def name(self, place: int) -> str:
        """What to call an argument."""
        args, kw = tree_unflatten(list(range(self.spec.num_leaves)), self.spec)
        if names := [name for name, found in kw.items() if found == place]:
            return f"argument '{names[0]}'"
        return f"argument {args.index(place) + 1}" if place in args else "a number among the arguments"
