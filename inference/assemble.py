"""From a configuration to the objects of a run: data, model, guide, objective."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro.infer
import torch
from torch import nn

from guides.amortized import Amortized
from inference.config import Config, ConfigError
from inference.data import DataError, Dataset, Source, representation_for
from models.conditional import Conditional

INITIAL_DATA = 5000  # training data whose mean the decoder starts from


@dataclass(frozen=True)
class Setup:
    """Everything a run is made of, on its device."""

    config: Config
    dataset: Dataset
    model: nn.Module
    guide: nn.Module
    objective: pyro.infer.ELBO
    representation: str
    device: torch.device

    def source(self, split: str) -> Source:
        """One split as this model observes it."""
        batching = self.config.section("batching")
        return Source(
            self.dataset,
            split,
            self.representation,
            self.device,
            seed=self.config.values.seed,
            resident=batching.resident,
            workers=batching.workers,
        )


def assemble(config: Config) -> Setup:
    """Build the parts and put them together.

    Raises:
        ConfigError: parts that do not fit one another.
        DataError: data that are missing, damaged or unfit for the likelihood.
    """
    device = find_device(config.values.device)
    torch.manual_seed(config.values.seed)
    dataset = _build(config, "data", likelihood=config.words.get("likelihood", ""))
    if config.words["data"] == "file" and "likelihood" not in config.words:
        raise ConfigError(
            "data from a file need a stated likelihood; accepted: likelihood=bernoulli for zeros and ones, "
            "categorical or logistic for grey levels, gaussian or learned_gaussian for real numbers"
        )
    config = config.complete(dataset.default_likelihood)
    model = _model(config, dataset)
    guide = _guide(config, dataset, model)
    support = getattr(getattr(model, "likelihood", None), "support", "real")
    representation = representation_for(dataset, support, dataset.observed_levels)
    objective = _build(config, "objective")
    return Setup(config, dataset, model.to(device), guide.to(device), objective, representation, device)


def start_from_data(setup: Setup) -> None:
    """Let the decoder start where it predicts the mean of the training data (Burda et al. 2016, section 5)."""
    initialize = getattr(getattr(setup.model, "likelihood", None), "initialize", None)
    if initialize is not None:
        source = setup.source("train")
        initialize(source.fixed(torch.arange(min(len(source), INITIAL_DATA))).mean(0))


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        accepted = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ConfigError(f"device={name}: there is no such device here; accepted: {', '.join(accepted)}") from None
    return device


def _model(config: Config, dataset: Dataset) -> nn.Module:
    likelihood = partial(
        _call, config.factory("likelihood"), net=config.factory("decoder"), levels=dataset.observed_levels
    )
    prior = partial(_call, config.factory("prior"))
    factory = config.factory("model")
    own = [g for g in ("prior", "likelihood", "decoder") if g in config.asked and not _takes(factory, g)]
    if not _takes(factory, "likelihood") and own:
        raise ConfigError(f"model={config.words['model']} has its own {', '.join(own)}: leave out {own[0]}=...")
    return _build(
        config,
        "model",
        event_shape=dataset.shape,
        prior=lambda shape: prior(event_shape=shape),
        likelihood=lambda shape, context: likelihood(event_shape=shape, context_shape=context),
    )


def _guide(config: Config, dataset: Dataset, model: nn.Module) -> nn.Module:
    word = config.words["guide"]
    if word == "exact" and not hasattr(model, "posterior"):
        raise ConfigError(
            f"guide=exact needs a model with a closed-form posterior; model={config.words['model']} has none"
        )
    if "encoder" in config.asked and not _takes(config.factory("guide"), "net"):
        raise ConfigError(f"guide={word} has no encoder: leave out encoder=...")
    latent_shape = model.prior.event_shape if hasattr(model, "prior") else ()  # type: ignore[union-attr]
    core = _build(
        config,
        "guide",
        event_shape=latent_shape,
        context_shape=dataset.shape,
        net=config.factory("encoder"),
        model=model,
    )
    return Amortized(core) if isinstance(core, Conditional) else core


def _build(config: Config, group: str, **structure: Any) -> Any:
    """Build a group's part; what it says of bad values is said of the word that chose it."""
    try:
        return _call(config.factory(group), **structure)
    except (ConfigError, DataError):
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{group}={config.words[group]}: {error}") from None


def _call(factory: Callable[..., Any], **structure: Any) -> Any:
    """Call a factory with those structural arguments that it takes and are known."""
    return factory(**{name: value for name, value in structure.items() if _takes(factory, name) and value is not None})


def _takes(factory: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(factory).parameters
