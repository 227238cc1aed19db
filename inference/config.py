"""From words on a command line, or a recipe, to a typed configuration.

Options are the constructors' own parameters: none is written twice. Words are looked up in the catalog, dotted words
are imported, and whatever is not known is refused with what would be accepted.
"""

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from hydra_zen import builds, instantiate
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from inference.catalog import CATALOG, DEFAULTS, OBJECTIVES, Factory
from inference.failures import one_line
from inference.settings import Batching, Root

# Constructor parameters that the assembler fills in and nobody has to state.
STRUCTURAL: dict[str, tuple[str, ...]] = {
    "data": ("likelihood",),
    "model": ("event_shape", "prior", "tokens", "likelihood"),
    "prior": ("event_shape", "context_shape", "data_shape"),
    "tokens": ("event_shape", "codes", "context_shape", "context_codes"),
    "likelihood": ("event_shape", "context_shape", "net", "levels", "outputs"),
    "guide": ("event_shape", "context_shape", "net", "model"),
    "encoder": ("in_shape", "out_shape", "levels"),
    "decoder": ("in_shape", "out_shape"),
    "optimizer": ("parameters", "lr"),
    "objective": (),
    "inference": ("setup", "folder", "observers", "guide", "objective", "optimizer"),
}
EXPERIMENTS = Path(__file__).parent.parent / "experiments"


class ConfigError(ValueError):
    """An option that cannot be; the message names it and what would be accepted."""


@dataclass(frozen=True)
class Config:
    """A configuration: a word for each group of parts, and the value of every option.

    The likelihood's word may be missing until :meth:`complete` is told what the data suggest.
    """

    words: dict[str, str]
    values: DictConfig
    asked: frozenset[str]  # groups whose word was given, not defaulted
    pending: dict[str, Any]  # options of the likelihood that wait for its word

    def complete(self, likelihood: str) -> "Config":
        """The same with ``likelihood`` as the default word of that group."""
        if "likelihood" in self.words:
            return self
        words = {**self.words, "likelihood": likelihood}
        values = self.values.copy()
        _add_parts(values, {"likelihood": likelihood})
        _update(values, self.pending)
        return Config(words, values, self.asked, {})

    def without(self, groups: Iterable[str]) -> "Config":
        """The same less the groups that the parts in use have no place for."""
        values = self.values.copy()
        with open_dict(values):
            for group in groups:
                values.pop(group, None)
        return Config({g: w for g, w in self.words.items() if g in values}, values, self.asked, self.pending)

    def factory(self, group: str) -> Factory:
        """The part of a group with its options filled in; the structural arguments are still to come.

        Raises:
            ConfigError: an option without a default was not given.
        """
        node = self.values[group]
        for name in _names(node):
            if OmegaConf.is_missing(node, name):
                raise ConfigError(f"{group}={self.words[group]} needs {group}.{name}=VALUE, which has no default")
        return instantiate(node)

    def section(self, name: str) -> Any:
        """One of the settings beside the parts, as the dataclass that defines it."""
        try:
            return OmegaConf.to_object(self.values[name])
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def tree(self) -> dict[str, Any]:
        """As a recipe: groups with their word under ``name`` and their options; :func:`load` reads it back."""
        plain = OmegaConf.to_container(self.values)
        assert isinstance(plain, dict)
        batching = plain.pop("batching")
        tree = {
            str(key): {"name": self.words[key], **_options(value)} if key in self.words else value
            for key, value in plain.items()
        }
        tree["data"].update(batching)
        return tree


def load(arguments: Iterable[str], recipe: Mapping[str, Any] | None = None) -> Config:
    """Configuration from ``key=value`` words on top of a recipe on top of the defaults.

    Raises:
        ConfigError: an unknown key or word, or a value of another type.
    """
    given = dict(parse_argument(argument) for argument in arguments)  # the last of several wins
    flat = _flatten(recipe or {})
    if "experiment" in given:
        flat.update(_flatten(read_recipe(given.pop("experiment"))))
    for one, other in (("trainer.steps", "trainer.epochs"), ("trainer.epochs", "trainer.steps")):
        if one in given and other not in given:
            flat.pop(other, None)  # a budget in the recipe gives way to one in the other unit
    flat.update(given)
    _data_by_path(flat)
    asked = {key: str(flat.pop(key)) for key in list(flat) if key in CATALOG}
    words = {**DEFAULTS, **asked}
    if "guide" not in asked and "guide" not in inspect.signature(_find("inference", words["inference"])).parameters:
        # What trains no guide infers as the model's own E step does.
        words["guide"] = getattr(_find("model", words["model"]), "e_step_guide", words["guide"])
    if "objective" not in asked:
        words["objective"] = OBJECTIVES.get(words["guide"], words["objective"])
    values = OmegaConf.structured(Root)
    _add_parts(values, words)
    waits = "likelihood" not in words
    pending = {key: flat.pop(key) for key in list(flat) if waits and key.startswith("likelihood.")}
    _update(values, flat)
    config = Config(words, values, frozenset(asked), pending)
    for section in ("trainer", "batching", "evaluation"):
        config.section(section)
    _check_root(values)
    return config


def settings_from(cls: type, section: str, arguments: Iterable[str]) -> Any:
    """A settings dataclass from those ``section.key=value`` arguments that set its fields.

    Raises:
        ConfigError: an unknown key, or a value of another type.
    """
    values = OmegaConf.create({section: OmegaConf.structured(cls)})
    _update(values, dict(parse_argument(argument) for argument in arguments))
    try:
        return OmegaConf.to_object(values[section])
    except ValueError as error:
        raise ConfigError(str(error)) from None


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe by name, from ``experiments/``, or by path: a YAML mapping of groups and options."""
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else EXPERIMENTS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in EXPERIMENTS.glob("*.yaml")))
        raise ConfigError(f"experiment={name}: there is no such recipe; accepted: {known}, or a path to a .yaml file")
    try:
        recipe = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(recipe, dict):
        raise ConfigError(f"{path} is not a recipe: a mapping of groups and options is expected")
    return recipe


def chosen(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says, flat: the word of each of its groups, and every option that is not what it is by default."""
    flat = _flatten(recipe)
    usual = _flatten(load([], {group: {"name": flat[group]} for group in CATALOG if group in flat}).tree())
    return {key: value for key, value in flat.items() if key in CATALOG or key not in usual or usual[key] != value}


def words_of(group: str) -> list[str]:
    """The words that a group accepts."""
    return sorted(CATALOG[group])


def parse_argument(argument: str) -> tuple[str, Any]:
    """``key=value`` in Hydra's grammar."""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        raise ConfigError(
            f"{argument!r} is not of the form key=value (quote a value with special characters)"
        ) from None
    if override.type != OverrideType.CHANGE or override.package is not None:
        raise ConfigError(f"{argument!r}: write key=value; options are not added or removed")
    if override.is_sweep_override():
        raise ConfigError(f"{argument!r} names several values; a run takes one, a grid (train -m) as many as you like")
    if override.value() == "":
        raise ConfigError(f"{argument!r} has no value; write {override.key_or_group}=VALUE, or leave it out")
    return override.key_or_group, override.value()


def _flatten(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """``{"guide": {"name": "diagonal", "x": 1}}`` to ``{"guide": "diagonal", "guide.x": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in ((str(key), value) for key, value in recipe.items()):
        if not isinstance(value, Mapping):
            flat[key] = value
            continue
        for option, inner in value.items():
            flat[key if option == "name" and key in CATALOG else f"{key}.{option}"] = inner
    return flat


def _data_by_path(flat: dict[str, Any]) -> None:
    """``data=some/file.npz`` means the data set ``file`` at that path."""
    path = flat.get("data")
    if isinstance(path, str) and Path(path).suffix in (".npz", ".npy"):
        flat["data"], flat["data.path"] = "file", path


def _node(group: str, word: str) -> Any:
    """The typed options of a part, from its constructor's signature."""
    part = _find(group, word)
    try:
        parameters = inspect.signature(part).parameters.values()
        needed = [
            p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        missing = {name: MISSING for name in needed if name not in STRUCTURAL[group]}
        return builds(part, populate_full_signature=True, zen_partial=True, zen_exclude=STRUCTURAL[group], **missing)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{group}={word} is nothing that can be configured: {one_line(error)}") from None


def _add_parts(values: DictConfig, words: Mapping[str, str]) -> None:
    with open_dict(values):
        for group, word in words.items():
            values[group] = _node(group, word)


def _options(node: Mapping[str, Any]) -> dict[str, Any]:
    """A part's options without what only its construction needs."""
    return {name: value for name, value in node.items() if not name.startswith("_")}


def _update(values: DictConfig, flat: Mapping[str, Any]) -> None:
    """Set options by their dotted names, each checked for its existence and type."""
    for key, value in flat.items():
        place = _place(key)
        section, _, name = place.rpartition(".")
        parent = OmegaConf.select(values, section) if section else values
        if name not in _names(parent) or key.startswith("batching"):
            raise ConfigError(_unknown(key, values))
        if isinstance(parent._get_node(name), DictConfig):
            raise ConfigError(f"{key} is a group of options; accepted: {', '.join(_keys(values, key))}")
        _check_value(key, value, wants_list=isinstance(parent._get_node(name), ListConfig))
        try:
            OmegaConf.update(values, place, value)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}={value}: {str(error).splitlines()[0]}") from None


def _check_value(key: str, value: Any, wants_list: bool) -> None:
    if wants_list and not isinstance(value, list | tuple):
        raise ConfigError(f"{key}={value}: a list is expected, such as {key}=[{value}]")
    for entry in value if isinstance(value, list | tuple) else [value]:
        if isinstance(entry, str) and ("${" in entry or entry == MISSING):
            raise ConfigError(f"{key}={entry}: references are not followed; write the value itself")
        if isinstance(entry, list | tuple) or (isinstance(entry, Mapping) and entry is not value):
            raise ConfigError(f"{key}={value}: a list of plain values is expected")


def _check_root(values: DictConfig) -> None:
    try:
        Root(seed=values.seed, device=values.device, threads=values.threads)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _place(key: str) -> str:
    """Batching is configured under ``data``, where it is looked for, and kept apart from the loader's options."""
    group, _, name = key.partition(".")
    return f"batching.{name}" if group == "data" and name in Batching.__dataclass_fields__ else key


def _names(node: Any) -> list[str]:
    return [str(name) for name in node if not str(name).startswith("_")] if isinstance(node, DictConfig) else []


def _keys(values: DictConfig, section: str) -> list[str]:
    """The dotted names of the options of a section; of everything at the top for no section."""
    if not section:
        return [*CATALOG, *(name for name in _names(values) if name not in (*CATALOG, "batching"))]
    names = _names(OmegaConf.select(values, section))
    return [f"{section}.{name}" for name in (*names, *(Batching.__dataclass_fields__ if section == "data" else ()))]


def _unknown(key: str, values: DictConfig) -> str:
    section = key.rpartition(".")[0]
    if section in CATALOG or (section in _keys(values, "") and _keys(values, section)):
        known = _keys(values, section)
        accepted = ", ".join(known) or f"none, this {section} has no options"
        near = _suggest(key.rpartition(".")[2], [option.rpartition(".")[2] for option in known])
        return f"unknown key {key!r}{near}; accepted: {accepted}"
    top = _keys(values, "")
    every = [*top, *(option for name in top for option in _keys(values, name))]
    return f"unknown key {key!r}{_suggest(key, every)}; accepted: {', '.join(top)}, and options of these"


def _find(group: str, word: str) -> Factory:
    """A part by its word, or by import path."""
    if word in CATALOG[group]:
        return CATALOG[group][word]
    accepted = f"accepted: {', '.join(words_of(group))}, or an import path such as my_package.{group}.MyPart"
    if "." not in word:
        raise ConfigError(f"{group}={word} is not known{_suggest(word, CATALOG[group])}; {accepted}")
    module, _, name = word.rpartition(".")
    try:
        part = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever somebody else's module does when it is imported
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"{group}={word} cannot be imported ({reason}); {accepted}") from error
    if not callable(part):
        raise ConfigError(f"{group}={word} cannot be called to make a {group}; {accepted}")
    return part


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
