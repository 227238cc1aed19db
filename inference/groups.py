"""Which runs of a grid train together: those that differ in seed, weight, temperature or learning rate alone."""

import math
from collections.abc import Iterable, Sequence

from inference.config import Config, ConfigError, load

VALUES = ("seed", "trainer.learning_rate")  # what may differ
VALUE_NAMES = ("beta", "temperature")  # in any part
STEPS_THAT_PAY = 40_000  # of all runs of a group: they save about the minute that compiling takes


def in_groups(runs: Sequence[Sequence[str]], jobs: int, together: str) -> list[list[int]]:
    """The places of runs that one process trains at a time, in the order of the first of each.

    Args:
        runs: the arguments of each.
        jobs: processes, over which runs are divided.
        together: auto where it pays, yes or no.

    Raises:
        ConfigError: ``yes`` where no two runs are alike.
    """
    if together == "no":
        return [[place] for place in range(len(runs))]
    alike: dict[tuple[str, ...], list[int]] = {}
    for place, arguments in enumerate(runs):
        alike.setdefault(_the_rest(arguments), []).append(place)
    groups = []
    for places in alike.values():
        share = _share(load(runs[places[0]]), len(places), len(runs), jobs, together)
        parts = [places[start : start + share] for start in range(0, len(places), share)]
        pays = share > 1 and _takes_steps(load(runs[places[0]])) and (together == "yes" or _pays(runs, parts[0]))
        groups += parts if pays else [[place] for place in places]
    if together == "yes" and all(len(group) == 1 for group in groups):
        raise ConfigError(
            "grid.together=yes: no two runs differ in seed, trainer.learning_rate, beta or temperature alone; "
            "accepted: auto, no"
        )
    return sorted(groups)


def _the_rest(arguments: Iterable[str]) -> tuple[str, ...]:
    """The arguments that have to be the same."""
    keys = [(argument.partition("=")[0], argument) for argument in arguments]
    return tuple(a for key, a in keys if key not in VALUES and key.rpartition(".")[2] not in VALUE_NAMES)


def _share(config: Config, alike: int, runs: int, jobs: int, together: str) -> int:
    """How many of the runs that are alike go to one process.

    On a CPU no more than leaves every process some runs. All processes share a GPU, which does best with
    all at once.
    """
    from inference.assemble import find_device

    if find_device(config.values.device).type != "cpu":
        return alike
    return min(alike, max(math.ceil(runs / jobs), 2 if together == "yes" else 1))


def _takes_steps(config: Config) -> bool:
    return config.words["inference"] == "svi"


def _pays(runs: Sequence[Sequence[str]], group: Sequence[int]) -> bool:
    """Whether so many steps are spared more time than compiling takes."""
    from inference.assemble import assemble, find_device

    config = load(runs[group[0]])
    settings, batch = config.section("trainer"), config.section("batching").batch_size
    if find_device(config.values.device).type == "cpu" and settings.engine == "compiled":
        return False  # compiled runs are as fast one by one, and wait for nobody
    steps = settings.steps
    if settings.epochs:
        setup = assemble(config)
        steps = settings.epochs * math.ceil(len(setup.dataset.splits["train"]) / batch)
    from inference.trainer import DEFAULT_STEPS

    return (steps or DEFAULT_STEPS) * len(group) >= STEPS_THAT_PAY
