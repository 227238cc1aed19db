"""From a configuration to the objects of a run: data, model, guide, objective."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.infer
import torch
from omegaconf import OmegaConf
from torch import nn

from guides.amortized import Amortized
from inference.catalog import CATALOG
from inference.config import Config, ConfigError
from inference.data import DataError, Dataset, Source, representation_for
from inference.failures import one_line, out_of_memory
from inference.objectives import Objective
from inference.pretraining import start_from_run
from inference.rows import limited
from inference.structure import StructureError
from inference.userfile import OWN
from models.conditional import Conditional

INITIAL_DATA = 5000  # training data whose mean the nets start from


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

    @property
    def seed(self) -> int:
        """The run's."""
        return self.config.values.seed

    def build(self, group: str, kind: type | tuple[type, ...], **structure: Any) -> Any:
        """Build a part of the configuration with the structural arguments that it takes.

        Raises:
            ConfigError: a value it cannot be built with.
        """
        return _build(self.config, group, kind, **structure)

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


def assemble(config: Config, dataset: Dataset | None = None) -> Setup:
    """Build the parts and put them together.

    Args:
        config: the words and their options.
        dataset: to be used instead of the one that is named.

    Raises:
        ConfigError: parts that do not fit one another.
        DataError: data that are missing, damaged or unfit for the likelihood.
    """
    device = find_device(config.values.device)
    _check_inference(config)
    _check_sizes(config)
    torch.manual_seed(config.values.seed)
    dataset = dataset or dataset_of(config)
    config = config.complete(dataset.default_likelihood)
    model = _model(config, dataset)
    guide = _guide(config, dataset, model)
    _introduce(config, model, guide)
    support = getattr(getattr(model, "likelihood", model), "support", "real")
    own = not _takes(config.factory("model"), "likelihood")
    if dataset.observed_levels == 2 and (refusal := getattr(getattr(model, "likelihood", None), "refusal", "")):
        raise ConfigError(f"likelihood={config.words['likelihood']}: {refusal}")
    representation = representation_for(dataset, support, dataset.observed_levels, own)
    if representation == "levels":
        _scale_inputs(guide, dataset)
    objective = _objective(config, dataset, model, device)
    _check_losses(config, guide, objective)
    config = config.without(_unused(config))
    return Setup(config, dataset, model.to(device), guide.to(device), objective, representation, device)


def start_from_data(setup: Setup) -> None:
    """Let the nets start at the mean of the training data: encoders centred on it, the likelihood predicting it.

    The likelihood's part is the recipe of Burda et al. (2016, section 5). Priors made of data take theirs here.

    A run with ``run.start`` starts from the parameters of another one instead.

    Raises:
        ConfigError: data that a part cannot start from, such as fewer distinct ones than components.
    """
    source = setup.source("train")
    x = source.fixed(torch.arange(min(len(source), INITIAL_DATA)))
    if setup.config.values.run.start:
        start_from_run(setup.config.values.run.start, setup.model, setup.guide, x)
        return
    mean = x.mean(0)
    for net in setup.guide.modules():
        if hasattr(net, "center_input") and net.in_shape == mean.shape:
            net.center_input(mean)  # type: ignore[operator]
    try:
        for part in [*setup.model.modules(), getattr(setup.guide, "core", setup.guide)]:
            wanted = getattr(part, "data_wanted", 0)  # of any of the training data, not of the first ones
            some = source.fixed(torch.randperm(len(source))[:wanted]) if wanted else x
            getattr(part, "initialize", lambda x: None)(some)
    except ValueError as error:
        raise ConfigError(f"the parts cannot start from these data: {one_line(error)}") from error


def _scale_inputs(guide: nn.Module, dataset: Dataset) -> None:
    """Let encoders see grey levels as fractions of the highest: as whole numbers up to 255 they saturate every unit."""
    for net in guide.modules():
        if hasattr(net, "input_scale") and net.in_shape == dataset.shape:
            net.input_scale = float((dataset.observed_levels or 2) - 1)  # type: ignore[assignment]


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("nothing here was tried on it")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        accepted = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ConfigError(f"device={name}: there is no such device here; accepted: {', '.join(accepted)}") from None
    return device


def _check_sizes(config: Config) -> None:
    sizes = [("model", name) for name in ("latent_dim", "top_dim", "code_dim")]
    for group, name in (*sizes, ("objective", "particles")):
        value = config.values[group].get(name, 1) if not OmegaConf.is_missing(config.values[group], name) else 1
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"{group}.{name}: {value} is below 1")


def _check_inference(config: Config) -> None:
    for group in ("objective", "optimizer"):
        if group in config.asked and not _takes(config.factory("inference"), group):
            raise ConfigError(f"inference={config.words['inference']} has no {group}: leave out {group}=...")


def dataset_of(config: Config) -> Dataset:
    """The data set that a configuration names."""
    likelihood = config.words.get("likelihood", "")
    if not likelihood and not _takes(config.factory("model"), "likelihood"):
        likelihood = OWN
    if config.words["data"] == "file" and not likelihood:
        raise ConfigError(
            "data from a file need a stated likelihood; accepted: likelihood=bernoulli for zeros and ones, "
            "categorical or logistic for grey levels, gaussian or learned_gaussian for real numbers"
        )
    dataset = _build(config, "data", Dataset, likelihood=likelihood)
    return limited(dataset, config.section("batching").limit)


def _unused(config: Config) -> list[str]:
    """The groups that the chosen model and guide have no place for."""
    model, guide = config.factory("model"), config.factory("guide")
    own = [group for group in ("prior", "tokens", "likelihood") if not _takes(model, group)]
    no_decoder = "likelihood" in own or not _takes(config.factory("likelihood"), "net")
    idle = [group for group in ("objective", "optimizer") if not _takes(config.factory("inference"), group)]
    return [*own, *idle, *(["decoder"] if no_decoder else []), *(["encoder"] if not _takes(guide, "net") else [])]


def _model(config: Config, dataset: Dataset) -> nn.Module:
    factory = config.factory("model")
    parts = ("prior", "tokens") if _takes(factory, "likelihood") else ("prior", "tokens", "likelihood", "decoder")
    own = [group for group in parts if group in config.asked and not _takes(factory, group)]
    if own:
        raise ConfigError(
            f"model={config.words['model']} has {', '.join(own)} of its own or none: leave out "
            + " and ".join(f"{group}=..." for group in own)
        )
    levels, decoder = dataset.observed_levels, _net(config, "decoder")
    return _build(
        config,
        "model",
        nn.Module,
        event_shape=dataset.shape,
        prior=lambda shape: _build(config, "prior", nn.Module, event_shape=shape, data_shape=dataset.shape),
        tokens=lambda shape, codes, **context: _tokens(config, shape, codes, context),
        likelihood=lambda shape, context: _build(
            config, "likelihood", nn.Module, event_shape=shape, context_shape=context, net=decoder, levels=levels
        ),
    )


def _tokens(config: Config, shape: Any, codes: int, context: dict[str, Any]) -> nn.Module:
    """A prior over grids of codes; one that reads no other grids is built without them."""
    reads = _takes(config.factory("tokens"), "context_shape")
    return _build(config, "tokens", nn.Module, event_shape=shape, codes=codes, **(context if reads else {}))


def _guide(config: Config, dataset: Dataset, model: nn.Module) -> nn.Module:
    word = config.words["guide"]
    if word == "exact" and not hasattr(model, "posterior"):
        raise ConfigError(
            f"guide=exact needs a model with a closed-form posterior, such as model=ppca; "
            f"model={config.words['model']} has none"
        )
    if "encoder" in config.asked and not _takes(config.factory("guide"), "net"):
        raise ConfigError(f"guide={word} has no encoder: leave out encoder=...")
    one_latent = hasattr(model, "prior") and not hasattr(model, "guides")
    if not one_latent and not _made_for(word, model) and _needs(config.factory("guide"), "event_shape"):
        chosen = "" if "guide" in config.asked else ", the default,"
        raise ConfigError(
            f"guide={word}{chosen} infers one latent z that is continuous, and model={config.words['model']} has "
            f"others; accepted: {_guides_of(model, config.words['inference'])}"
        )
    latent_shape = model.prior.event_shape if hasattr(model, "prior") else ()  # type: ignore[union-attr]
    core = _build(
        config,
        "guide",
        nn.Module,
        event_shape=latent_shape,
        context_shape=dataset.shape,
        net=_encoder(config, dataset),
        model=model,
    )
    return Amortized(core) if isinstance(core, Conditional) else core


def _made_for(word: str, model: Any) -> bool:
    """Whether a model names the guide among those made for it; one by import path may be."""
    return hasattr(model, "guides") and (word in model.guides or word not in CATALOG["guide"])


def _guides_of(model: Any, inference: str) -> str:
    """The words that a model with other latents than one continuous z is trained with."""
    if hasattr(model, "guides"):
        return f"guide={' or '.join(model.guides)}"
    if not hasattr(model, "num_states"):
        return "a guide made for that model"
    if getattr(model, "num_steps", 1) == 1:
        return "guide=enumerated objective=trace_enum"
    if inference == "svi":
        return "guide=summed_out objective=trace_enum, or inference=em without a guide"
    return f"inference=em without a guide, for no guide by word fits its chain under inference={inference}"


def _introduce(config: Config, model: nn.Module, guide: nn.Module) -> None:
    """Show q(z|x) to those parts of the model that are made of it."""
    for look_through in [getattr(part, "look_through", None) for part in model.modules()]:
        if look_through is None:
            continue
        words = f"prior={config.words.get('prior')} with guide={config.words['guide']}"
        if not isinstance(guide, Amortized):
            raise ConfigError(f"{words}: the prior is made of one q(z|x), and this guide is none")
        try:
            look_through(guide.core)
        except ValueError as error:
            raise ConfigError(f"{words}: {one_line(error)}") from error


def _net(config: Config, group: str) -> Callable[..., Any]:
    """A factory of nets whose complaints are of the encoder or decoder, not of the part that asked for the net."""
    return lambda in_shape, out_shape: _build(config, group, nn.Module, in_shape=in_shape, out_shape=out_shape)


def _encoder(config: Config, dataset: Dataset) -> Callable[..., Any]:
    """As :func:`_net`. Tokens are names, and an encoder of names is told how many there are."""
    tokens, words = dataset.kind == "tokens", f"encoder={config.words['encoder']} with data={dataset.name}"
    reads_tokens = _takes(config.factory("encoder"), "levels")

    def build(in_shape: Any, out_shape: Any) -> nn.Module:
        if tokens and not reads_tokens:
            raise ConfigError(f"{words}: it reads numbers, and tokens are names; accepted: encoder=gru or lstm")
        if reads_tokens and not tokens:
            raise ConfigError(f"{words}: it reads lines of tokens, and these are none; accepted: encoder=mlp")
        levels = dataset.observed_levels
        return _build(config, "encoder", nn.Module, in_shape=in_shape, out_shape=out_shape, levels=levels)

    return build


def _check_losses(config: Config, guide: nn.Module, objective: pyro.infer.ELBO) -> None:
    """Parts that learn by losses of their own, which no bound contains, need an objective that adds them."""
    if any(getattr(part, "own_losses", False) for part in guide.modules()) and not getattr(
        objective, "adds_losses", False
    ):
        adding = [word for word, factory in CATALOG["objective"].items() if getattr(factory, "adds_losses", False)]
        raise ConfigError(
            f"guide={config.words['guide']} learns by losses of its own, which objective={config.words['objective']} "
            f"does not add, so that its codes would stay where they start; accepted: objective={' or '.join(adding)}"
        )


def _objective(config: Config, dataset: Dataset, model: nn.Module, device: torch.device) -> pyro.infer.ELBO:
    objective = _build(config, "objective", pyro.infer.ELBO)
    if not isinstance(objective, Objective):
        return objective
    try:
        objective.prepare(dataset.shape, getattr(getattr(model, "prior", None), "event_shape", None))
    except StructureError as error:
        raise ConfigError(f"objective={config.words['objective']}: {one_line(error)}") from None
    return objective.to(device)


def _build(config: Config, group: str, kind: type | tuple[type, ...], **structure: Any) -> Any:
    """Build a group's part; what it says of bad values is said of the word that chose it."""
    word = config.words[group]
    try:
        part = _call(config.factory(group), **structure)
    except (ConfigError, DataError):
        raise
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        if out_of_memory(error):
            raise
        raise ConfigError(f"{group}={word}: {one_line(error)}") from error
    if not isinstance(part, kind):
        made = type(part).__name__
        wanted = " or a ".join(f"{k.__module__}.{k.__name__}" for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ConfigError(f"{group}={word} made a {made}; accepted: what makes a {wanted}")
    return part


def _call(factory: Callable[..., Any], **structure: Any) -> Any:
    """Call a factory with those structural arguments that it takes and are known."""
    return factory(**{name: value for name, value in structure.items() if _takes(factory, name) and value is not None})


def _needs(factory: Callable[..., Any], name: str) -> bool:
    return _takes(factory, name) and inspect.signature(factory).parameters[name].default is inspect.Parameter.empty


def _takes(factory: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(factory).parameters
