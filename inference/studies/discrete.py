"""Study: discrete latents. One model, every way to train through its draws; which learns most, at what cost?"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inference.assemble import Setup
from inference.config import ConfigError
from inference.console import Console
from inference.evaluate import evaluating, held_out
from inference.experiment import open_run
from inference.gradient_moments import Moments, Reference, exact_reference, long_run, measure
from inference.grid import Point, run_grid
from inference.objectives import ELBO
from inference.particles import encode, validation
from inference.studies.discrete_figures import sections_of
from inference.study import write_study
from inference.table import Table
from models.discrete import MOST_STATES, base_of, extended


@dataclass(frozen=True)
class Arm:
    """A way to train: a guide, and an objective with its gradient."""

    title: str
    guide: str  # a word; "drawn" is bits or onehot
    objective: tuple[str, ...]


def _scored(title: str, gradient: str, particles: int = 1) -> Arm:
    words = (f"objective.gradient={gradient}", f"objective.particles={particles}")
    return Arm(title, "drawn", ("objective=elbo", "objective.kl=analytic", *words))


_PATH = ("objective=elbo", "objective.kl=analytic")
ARMS: dict[str, Arm] = {
    "score": _scored("score function", "score"),
    "score_average": _scored("running average", "score_average"),
    "nvil": _scored("NVIL", "nvil"),
    "loo": _scored("leave one out, K = 2", "loo", 2),
    "vimco": Arm("VIMCO, K = 5", "drawn", ("objective=iwae", "objective.particles=5", "objective.gradient=vimco")),
    "muprop": _scored("MuProp", "muprop"),
    "rebar": _scored("REBAR", "rebar"),
    "relax": _scored("RELAX", "relax"),
    "arm": _scored("ARM", "arm"),
    "straight_through_mean": Arm("straight-through", "straight_through_mean", _PATH),
    "straight_through": Arm("straight-through Gumbel", "straight_through", _PATH),
    "concrete": Arm("Concrete", "concrete", _PATH),
    "enumerated": Arm("exact enumeration", "enumerated", ("objective=trace_enum",)),
}
TRAINED = ("test/elbo", "test/nll", "test/mutual_information", "train/seconds")


@dataclass
class DiscreteSettings:
    """What is compared.

    Args:
        estimators: words of the ways to train; exact enumeration is left out where the states are too many.
        bits: number of Bernoulli latents; 0 for no such model.
        variables: number of categorical latents; 0 for no such model.
        classes: of each categorical latent.
        seeds: of the runs of each.
        data: training data in the batch whose gradient is measured, and held-out data whose codes are counted.
        repeats: gradients drawn by each estimator at the same parameters, those that ``study.at`` was trained to.
        at: the way of training whose parameters those are.
        jobs: runs at a time; 0 for one per CPU core.
    """

    estimators: list[str] = field(default_factory=lambda: list(ARMS))
    bits: int = 8
    variables: int = 10
    classes: int = 10
    seeds: list[int] = field(default_factory=lambda: [0])
    data: int = 100
    repeats: int = 100
    at: str = "rebar"
    jobs: int = 0

    def __post_init__(self) -> None:
        if unknown := [name for name in [*self.estimators, self.at] if name not in ARMS]:
            raise ConfigError(f"study.estimators: no {unknown[0]}; accepted: {', '.join(ARMS)}")
        if self.at not in self.estimators:
            raise ConfigError(f"study.at={self.at} is none of study.estimators: {', '.join(self.estimators)}")
        if not self.seeds or not (self.bits > 0 or self.variables > 0) or min(self.bits, self.variables) < 0:
            raise ConfigError("study.seeds needs an entry, and study.bits or study.variables to be above 0")

    def models(self) -> dict[str, tuple[str, ...]]:
        """The models by name, in words."""
        models: dict[str, tuple[str, ...]] = {}
        if self.bits:
            models[f"{self.bits} bits"] = ("prior=bits", f"model.latent_dim={self.bits}")
        if self.variables:
            words = ("prior=onehot", f"prior.classes={self.classes}", f"model.latent_dim={self.variables}")
            models[f"{self.variables} × {self.classes} classes"] = words
        return models

    def states(self, model: str) -> int:
        """Number of joint states."""
        return int(2**self.bits if model.endswith("bits") else self.classes**self.variables)


def discrete(arguments: list[str], settings: DiscreteSettings, folder: Path, console: Console, command: str) -> Path:
    """Estimators and guides for bits and one-hot latents at equal budget: bound, log p(x), variance, codes, time."""
    points = _points(arguments, settings)
    _, results = run_grid(points, folder / "runs", console, settings.jobs, run_dir=folder)
    if failed := [result for result in results if result.get("error")]:
        raise ConfigError(f"{failed[0]['run']} failed: {failed[0]['error']}")
    references: dict[str, Reference] = {}
    with console.stage("gradients") as progress:
        for done, result in enumerate(results, start=1):
            at = _place(settings, points, result)
            place = open_run(folder / "runs" / at.name)
            if at.name not in references:
                references[at.name] = _reference(place, settings)
            result.update(_measure(open_run(folder / "runs" / result["run"]), place, references[at.name], settings))
            progress(done, len(results))
    records = [_record(result) for result in results]
    sections = sections_of(records, {name: arm.title for name, arm in ARMS.items()}, folder)
    return write_study(
        folder, "Discrete latents", _intro(results, settings), sections, Table.from_records(records), command
    )


def _points(arguments: Sequence[str], settings: DiscreteSettings) -> list[Point]:
    given = {argument.partition("=")[0] for argument in arguments}
    budget = ["trainer.steps=3000"] if not given & {"trainer.steps", "trainer.epochs"} else []
    budget += ["evaluation.particles=200"] if "evaluation.particles" not in given else []
    points = []
    for model, words in settings.models().items():
        for name in settings.estimators:
            if name == "enumerated" and settings.states(model) > MOST_STATES:
                continue
            arm = ARMS[name]
            guide = arm.guide if arm.guide != "drawn" else words[0].removeprefix("prior=")
            for seed in settings.seeds:
                labels = {"latents": model, "estimator": name, "seed": str(seed)}
                own = [*words, f"guide={guide}", *arm.objective, f"seed={seed}"]
                points.append(Point(labels, (*arguments, *budget, *own)))
    return points


def _place(settings: DiscreteSettings, points: Sequence[Point], result: dict[str, Any]) -> Point:
    """The run whose parameters every gradient of that model and seed is measured at."""
    wanted = {"latents": result["latents"], "estimator": settings.at, "seed": str(result["seed"])}
    return next(point for point in points if point.labels == wanted)


def _measure(setup: Setup, place: Setup, reference: Reference, settings: DiscreteSettings) -> dict[str, Any]:
    """Bias and variance of a run's own estimator at the parameters of another run, and how it uses its codes."""
    held, _ = held_out(setup.source("test"), settings.data, seed=0)
    codes = {"perplexity": perplexity(setup.guide, held), "active_codes": active(setup.guide, held)}
    for program, other in ((setup.model, place.model), (setup.guide, place.guide)):
        program.load_state_dict(other.state_dict())
    for part in setup.guide.modules():
        if callable(getattr(part, "at", None)):
            part.at(1.0)  # type: ignore[operator]
    found, bias = _moments(setup, reference, settings)
    return {**codes, **bias, "variance": found.total_variance("guide"), "milliseconds": found.milliseconds}


def _moments(setup: Setup, reference: Reference, settings: DiscreteSettings) -> tuple[Moments, dict[str, Any]]:
    x = _batch(setup, settings)
    with torch.random.fork_rng(), validation(False):
        torch.manual_seed(1)
        setup.model.train()
        setup.guide.train()
        found = measure(setup.objective, setup.model, setup.guide, x, settings.repeats)
    if getattr(setup.objective, "num_particles", 1) > 2:  # another bound, with another gradient
        return found, {}
    square, error = found.squared_bias("guide", reference) or (None, None)
    return found, {"squared_bias": square, "squared_bias_stderr": error, "reference": reference.origin["guide"]}


def _batch(setup: Setup, settings: DiscreteSettings) -> Tensor:
    """The data whose gradient is measured, the same for all."""
    return held_out(setup.source("train"), settings.data, seed=0)[0]


def _reference(place: Setup, settings: DiscreteSettings) -> Reference:
    """The gradient of the ELBO: by summing over states where they are few, else by a long run without bias."""
    x = _batch(place, settings)
    with evaluating(place.model, place.guide, seed=2), torch.enable_grad():
        q = encode(place.guide, x)["z"]
        if not q.has_enumerate_support:
            objective = ELBO(20, kl="analytic", gradient="loo")
            return long_run(objective, place.model, place.guide, x, 2 * settings.repeats)
        bound = enumerated_elbo(place.model, q, x).mean()
        blocks = {"model": list(place.model.parameters()), "guide": list(place.guide.parameters())}
        found = {n: torch.autograd.grad(bound, ps, retain_graph=True) for n, ps in blocks.items()}
    return exact_reference({n: torch.cat([g.flatten() for g in gs]).double() for n, gs in found.items()})


def enumerated_elbo(model: nn.Module, q: Any, x: Tensor) -> Tensor:
    """The ELBO of each datum, ``(N,)`` nats, by summing over the joint states of its latents."""
    states = q.enumerate_support(expand=False)  # (S, 1, *event)
    log_q = q.log_prob(states)
    log_joint = model.likelihood(states).log_prob(x) + model.prior().log_prob(states)  # type: ignore[operator]
    return (log_q.exp() * (log_joint - log_q)).sum(0)


@torch.no_grad()
def _marginals(guide: nn.Module, x: Tensor) -> Tensor:
    """q(class) of each variable for each datum, ``(N, V, C)``."""
    with evaluating(guide, seed=0):
        q = encode(guide, x)["z"]
    base = base_of(extended(q))
    p = base.mean if base.event_shape else torch.stack([1 - base.mean, base.mean], -1)
    return p.reshape(len(x), -1, p.shape[-1])


def perplexity(guide: nn.Module, x: Tensor) -> float:
    """exp of the entropy of each variable over all data, averaged: 1 for one class always, C for all alike."""
    p = _marginals(guide, x).mean(0)
    return float((-torch.special.xlogy(p, p).sum(-1)).exp().mean())


def active(guide: nn.Module, x: Tensor) -> int:
    """Number of variables that tell 0.01 nats or more about which datum it is."""
    p = _marginals(guide, x)
    mean = p.mean(0)
    told = torch.special.xlogy(p, p).sum(-1).mean(0) - torch.special.xlogy(mean, mean).sum(-1)
    return int((told >= 0.01).sum())


def _record(result: dict[str, Any]) -> dict[str, Any]:
    words = ("latents", "estimator", "seed", "train/steps")
    found = ("perplexity", "active_codes", "variance", "milliseconds", "squared_bias", "squared_bias_stderr")
    keys = (*words, *TRAINED, "test/nll_stderr", "test/nll_particles", *found, "reference")
    return {key: result.get(key) for key in keys}


def _intro(results: list[dict[str, Any]], settings: DiscreteSettings) -> list[str]:
    first = results[0]
    left_out = [model for model in settings.models() if settings.states(model) > MOST_STATES]
    too_many = [
        f"{settings.states(model):.2g} joint states of {model} are too many to sum over. " for model in left_out
    ]
    return [
        f"The same models, trained for {first['train/steps']:,} steps in each of {len(settings.estimators)} ways; "
        f"seeds: {', '.join(map(str, settings.seeds))}. {''.join(too_many)}The data: {first['data_description']}",
        "All bounds are of hard codes, whatever was drawn in training; KL(q(z|x) || p(z)) is in closed form but for "
        "VIMCO. The variance is of the gradient in the guide, for one batch, each at the same parameters: those that "
        f"{ARMS[settings.at].title} was trained to. VIMCO's is that of another bound.",
    ]
