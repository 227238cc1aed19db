"""Study: ELBO estimators. At the same parameters, how far off, how noisy and how dear is each gradient?"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from inference.assemble import Setup, assemble, start_from_data
from inference.config import ConfigError, load
from inference.console import Console, Quiet
from inference.evaluate import held_out
from inference.experiment import open_run, set_threads, train
from inference.gradient_moments import BATCHES, Gradient, Reference, blocks_of, exact_reference, long_run, measure
from inference.objectives import Objective
from inference.particles import validation
from inference.signals import raised
from inference.studies.estimator_list import FOLLOWS, FOR_BITS, FOR_PATHS, OF_ALL_DRAWS, Estimator, long_run_for
from inference.studies.estimator_page import intro, sections
from inference.studies.testbeds import DRAWN, Exact, Testbed, bits_testbed, linear_testbed
from inference.study import write_study
from inference.table import Table
from inference.workers import jobs_for, spread

SMALL = ("model.latent_dim=8", "encoder.hidden=[64]", "decoder.hidden=[64]", "evaluation.particles=50")


@dataclass
class EstimatorsSettings:
    """What is measured.

    Args:
        particles: numbers of particles.
        moments: training steps after which the parameters are held still and the gradients measured.
        repeats: gradients drawn for each estimator.
        reference_repeats: gradients drawn for the long run that stands for the exact gradient where there is none.
        reference_particles: of long runs for targets that few particles miss; these repeat a tenth as often.
        warm_up: steps in which a baseline learns, at the parameters at hand, before it is measured.
        data: training data in the batch whose gradient is estimated.
        jobs: testbeds measured at a time; 0 for one per CPU core.
    """

    particles: list[int] = field(default_factory=lambda: [1, 4, 16, 64])
    moments: list[int] = field(default_factory=lambda: [0, 200, 2000])
    repeats: int = 100
    reference_repeats: int = 300
    reference_particles: int = 500
    warm_up: int = 200
    data: int = 50
    jobs: int = 0


def estimators(
    arguments: list[str], settings: EstimatorsSettings, folder: Path, console: Console, command: str
) -> Path:
    """Gradient estimators at the same parameters: bias, variance, signal-to-noise, time and memory."""
    _check(settings)
    places = [("vae", step) for step in settings.moments]
    places += [("linear", 0), *(("bits", step) for step in sorted({settings.moments[0], settings.moments[-1]}))]
    jobs = jobs_for(settings.jobs, places)
    found: list[list[dict[str, Any]]] = [[] for _ in places]
    work = partial(measure_place, arguments, settings, folder)
    with console.stage(f"gradients at {len(places)} places, {jobs} at a time") as progress:
        for done, (place, records) in enumerate(spread(work, places, jobs), start=1):
            found[place] = records
            progress(done, len(places))
    records = [record for some in found for record in some]
    page = sections(records, folder)
    return write_study(folder, "ELBO estimators", intro(settings), page, Table.from_records(records), command)


def _check(settings: EstimatorsSettings) -> None:
    for name in ("particles", "moments"):
        values = getattr(settings, name)
        if not values or min(values) < (1 if name == "particles" else 0):
            raise ConfigError(f"study.{name} needs at least one number, none below {1 if name == 'particles' else 0}")
    for name in ("repeats", "reference_repeats", "reference_particles", "data"):
        least = 1 if name == "data" else 2
        if getattr(settings, name) < least:
            raise ConfigError(f"study.{name}: {getattr(settings, name)} is below {least}")


def measure_place(
    arguments: list[str], settings: EstimatorsSettings, folder: Path, place: tuple[str, int]
) -> list[dict[str, Any]]:
    """All estimators on one testbed; one record for each with each number of particles and block of parameters."""
    kind, step = place
    with raised():
        setup = _setup(step if kind == "vae" else 0, arguments, folder)
        x, _ = held_out(setup.source("train"), settings.data if kind != "bits" else 0, seed=0)
        torch.manual_seed(setup.config.values.seed)
        if kind == "vae":
            testbed = Testbed(f"VAE after {step:,} steps", setup.model, {DRAWN: setup.guide}, x)
        elif kind == "linear":
            testbed = linear_testbed(x)
        else:
            testbed = bits_testbed(x, step, settings.data)
        return compare(testbed, settings)


def _setup(steps: int, arguments: list[str], folder: Path) -> Setup:
    """The run's model and guide, small unless the arguments say otherwise, after so many steps."""
    given = {argument.partition("=")[0] for argument in arguments}
    options = [*(a for a in SMALL if a.partition("=")[0] not in given), *arguments]
    if steps:
        run = folder / "runs" / f"{steps}"
        if not (run / "summary.json").exists():
            train(load([*options, f"trainer.steps={steps}", f"run.dir='{run}'"]), Quiet())
        return open_run(run)
    config = load(options)
    set_threads(config)
    setup = assemble(config)
    start_from_data(setup)
    return setup


def compare(testbed: Testbed, settings: EstimatorsSettings) -> list[dict[str, Any]]:
    """Every estimator with every number of particles, at the testbed's parameters."""
    references, records = References(testbed, settings), []
    for estimator in FOR_BITS if testbed.discrete else FOR_PATHS:
        for k in filter(estimator.takes, settings.particles):
            records += _measure(estimator, k, testbed, settings, references)
    return records


def _measure(
    estimator: Estimator, k: int, testbed: Testbed, settings: EstimatorsSettings, references: "References"
) -> list[dict[str, Any]]:
    guide, objective = testbed.guides[estimator.guide], estimator.make(k)
    with seeded(1):
        _learn_baseline(objective, testbed, settings)
        found = measure(objective, testbed.model, guide, testbed.x, settings.repeats)
    rows = []
    for block in found.batches:
        reference, variance = references.of(estimator.target, block, k), found.total_variance(block)
        along, squared = found.bias_along(block, reference), found.squared_bias(block, reference)
        rows.append(
            {
                "where": testbed.where,
                "target": estimator.target,
                "estimator": estimator.name,
                "kind": estimator.kind,
                "particles": k,
                "block": block,
                "bias_along": along and along[0],
                "bias_along_stderr": along and along[1],
                "squared_bias": squared and squared[0],
                "squared_bias_stderr": squared and squared[1],
                "reference": reference.origin[block],
                "variance": variance,
                "signal_to_noise": found.signal_to_noise(block),
                "milliseconds": found.milliseconds,
                "saved_bytes": found.saved_bytes,
                "variance_x_milliseconds": variance * found.milliseconds,
            }
        )
    return rows


def _learn_baseline(objective: pyro.infer.ELBO, testbed: Testbed, settings: EstimatorsSettings) -> None:
    """Let what an estimator learns or remembers settle at these parameters, which stay as they are."""
    if not isinstance(objective, Objective):
        return
    objective.prepare(testbed.x.shape[1:], testbed.model.prior.event_shape)  # type: ignore[union-attr, arg-type]
    objective.to(testbed.x)
    if not objective.gradient.state_dict():
        return
    own = list(objective.parameters())
    optimizer = torch.optim.Adam(own, lr=0.01) if own else None
    with validation(False):
        for _ in range(settings.warm_up):
            objective.loss_and_grads(testbed.model, testbed.guide, testbed.x)
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()


class References:
    """The right gradients at one place, each found when it is first asked for."""

    def __init__(self, testbed: Testbed, settings: EstimatorsSettings) -> None:
        self.testbed, self.settings = testbed, settings
        self.known: dict[tuple[str, int], Reference] = {}

    def of(self, target: str, block: str, k: int) -> Reference:
        """What an estimator of the target with k particles should give for a block of parameters."""
        return self._find(FOLLOWS.get(target, {}).get(block, target), k)

    def _find(self, target: str, k: int) -> Reference:
        key = (target, k if target in OF_ALL_DRAWS else 0)
        if key not in self.known:
            exact = self.testbed.exact.get(target)
            self.known[key] = self._exact(exact) if exact else self._long_run(target, k)
        return self.known[key]

    def _exact(self, exact: Exact) -> Reference:
        return exact_reference(exact_gradient(exact, self.testbed))

    def _long_run(self, target: str, k: int) -> Reference:
        run, settings = long_run_for(target, self.testbed.discrete), self.settings
        repeats = max(BATCHES, settings.reference_repeats // 10) if run.many else settings.reference_repeats
        count = settings.reference_particles if run.many else k
        name = f"{run.name} with {count} particles" if run.many else run.name
        with seeded(2):
            return long_run(run.make(count), self.testbed.model, self.testbed.guide, self.testbed.x, repeats, name)


def exact_gradient(exact: Exact, testbed: Testbed) -> Gradient:
    """The gradient of a mean over data that is known in closed form, for each block of parameters."""
    bound = exact().mean()
    blocks = {n: ps for n, ps in blocks_of(testbed.model, testbed.guide).items() if ps}
    return {name: _flat(torch.autograd.grad(bound, ps, retain_graph=True, allow_unused=True), ps)
            for name, ps in blocks.items()}  # fmt: skip


def _flat(gradients: tuple[Tensor | None, ...], parameters: list[torch.nn.Parameter]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]).double()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of one's own: what is measured does not depend on what was measured before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
