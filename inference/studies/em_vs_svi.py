"""Study: EM beside SVI. One objective, climbed by closed-form half steps and by stochastic gradients."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.assemble import Setup, assemble, dataset_of, start_from_data
from inference.config import Config, ConfigError, load
from inference.console import Console
from inference.data import Dataset
from inference.failures import one_line
from inference.reduction import principal
from inference.studies import em_figures
from inference.studies.counterexample import Outcome, em_step, svi_step
from inference.studies.held import log_evidence
from inference.studies.optima import destinations, told
from inference.studies.traces import Trace, by_em, by_svi, by_variational_em, optimum_near
from inference.study import Section, write_study
from inference.table import Table

# For each model: its q by name, and the words that make it.
GUIDES: dict[str, dict[str, tuple[str, ...]]] = {
    "gmm": {
        "exact": ("model=gmm", "guide=enumerated_exact", "objective=trace_enum"),
        "amortized": ("model=gmm", "guide=enumerated", "objective=trace_enum"),
        "relaxed": ("model=gmm_onehot", "guide=concrete", "objective=elbo"),
        "uniform": ("model=gmm", "guide=enumerated_uniform", "objective=trace_enum"),
    },
    "ppca": {
        "exact": ("model=ppca", "guide=exact", "objective=elbo"),
        "amortized": ("model=ppca", "guide=full", "objective=elbo", "encoder=linear"),
        "diagonal": ("model=ppca", "guide=diagonal", "objective=elbo", "encoder=linear"),
    },
}


@dataclass
class EMvsSVISettings:
    """What is compared, and at what cost.

    Args:
        guides: q of the SVI runs: exact, amortized, relaxed, uniform (of model=gmm); exact, amortized, diagonal (ppca).
        iterations: most iterations of EM.
        tolerance: a gain per datum below it ends EM.
        variational: iterations of variational EM with the amortized guide; 0 for none.
        half_steps: gradient steps of each of its E half steps; its M half steps are those of EM.
        steps: of each SVI run.
        batch_size: of SVI; 0 for half of the data, at most 500.
        learning_rate: of Adam at the start; it falls to 0 on a cosine.
        components: principal components that data of more numbers are reduced to; 0 for no reduction; -1 for one to
            every 40 data of a state, 10 at least and 50 at most, so that there are data for all covariances.
        work: numbers, data x dimensions x states, that variational EM and the looks at each SVI run may go through
            (1e9 is a minute or two of one core): on larger data, variational EM makes fewer iterations, 5 at least,
            and an SVI run is looked at less often than 100 times, 20 at least.
    """

    guides: list[str] = field(default_factory=list)
    iterations: int = 200
    tolerance: float = 1e-7
    variational: int = 30
    half_steps: int = 5
    steps: int = 2000
    batch_size: int = 0
    learning_rate: float = 0.02
    components: int = -1
    work: float = 1e9

    def __post_init__(self) -> None:
        least = {"iterations": 1, "variational": 0, "half_steps": 1, "steps": 1, "batch_size": 0, "components": -1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"study.{name} must be at least {value}, got {getattr(self, name)}")
        for name in ("tolerance", "learning_rate", "work"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"study.{name} must be 0 or a positive number, got {getattr(self, name)}")


def em_vs_svi(arguments: list[str], settings: EMvsSVISettings, folder: Path, console: Console, command: str) -> Path:
    """One model by EM and by SVI: bound, log p(x) and gap after every half step, and a step of SVI that goes down."""
    makers = _Makers(arguments, settings)
    traces = []
    with console.stage("fits") as progress:
        for done, way in enumerate(makers.ways, start=1):
            traces.append(makers.fit(way))
            progress(done, len(makers.ways))
            console.say(_line(traces[-1], traces[0]))
    console.say(told(traces))
    outcomes = {"SVI": svi_step(), "EM": em_step()}
    sections = _sections(traces, makers, outcomes, folder)
    title = f"EM beside SVI: {makers.model} on {makers.dataset.name}"
    return write_study(folder, title, makers.intro(), sections, _points(traces), command)


class _Makers:
    """The fits, each on a model of its own that starts where all others do."""

    def __init__(self, arguments: list[str], settings: EMvsSVISettings) -> None:
        self.settings = settings
        taken = ("guide=", "objective=", "inference=", "trainer.", "evaluation.", "-m")
        if bad := [argument for argument in arguments if argument.startswith(taken)]:
            raise ConfigError(f"{bad[0]}: this study chooses it; accepted: study.*, data, model, encoder, seed, device")
        named = [argument.partition("=")[2] for argument in arguments if argument.startswith("model=")]
        self.model = named[-1] if named else "gmm"
        if self.model not in GUIDES:
            raise ConfigError(f"model={self.model}: this study takes one with EM; accepted: {', '.join(GUIDES)}")
        words = GUIDES[self.model]
        self.guides = settings.guides or list(words)
        if bad := [guide for guide in self.guides if guide not in words]:
            raise ConfigError(
                f"study.guides: {bad[0]} is not known for model={self.model}; accepted: {', '.join(words)}"
            )
        self.arguments = [argument for argument in arguments if not argument.startswith("model=")]
        if self.model == "gmm" and self._config("exact").tree()["model"]["ridge"]:
            raise ConfigError("model.ridge: EM would climb a penalized objective, and SVI another; accepted: 0")
        self.dataset = self._reduced(dataset_of(self._config("exact")))
        self.fitted: dict[str, Any] = {}
        self.ways = ["EM", *(["variational EM"] if settings.variational else []), *(f"SVI, {g}" for g in self.guides)]

    def fit(self, way: str) -> Trace:
        """One fit, from the common start."""
        guide = way.partition(", ")[2] or {"EM": "exact", "variational EM": "amortized"}[way]
        setup, x, settings = self._setup(guide), self.rows("train"), self.settings
        affordable = settings.work / (x.numel() * self._states)  # times through the data
        if way == "EM":
            trace = by_em(way, setup, x, settings.iterations, settings.tolerance)
        elif way == "variational EM":
            most = max(5, int(affordable / (2 * settings.half_steps)))
            trace = by_variational_em(way, setup, x, min(settings.variational, most), settings.half_steps)
        else:
            batch_size = settings.batch_size or max(1, min(500, len(x) // 2))
            looks = min(100, max(20, int(affordable)))
            trace = by_svi(way, setup, x, settings.steps, batch_size, settings.learning_rate, looks)
        mixture = getattr(setup.model, "mixture", setup.model)
        trace.optimum = optimum_near(mixture, x, int(min(1000, max(20, affordable))), settings.tolerance)
        trace.held_out = log_evidence(setup.model, self.rows("test"))
        self.fitted[way] = setup.model
        return trace

    def rows(self, split: str) -> Tensor:
        """All rows of a split, in double precision on the device."""
        return self._setup("exact", start=False).source(split).fixed().double()

    def intro(self) -> list[str]:
        return [
            f"One model, {self.model}, fitted from one start by maximizing one objective, F(q, θ) = log p(x) − "
            "KL(q(z|x) ‖ p(z|x)), in two manners. EM alternates between the best q and the best θ, each in closed form "
            "on all data; SVI follows stochastic gradients of both. All numbers are nats per training datum.",
            f"The data: {self.dataset.description}",
        ]

    def _setup(self, guide: str, start: bool = True) -> Setup:
        """A model in double precision at the common start, with its guide."""
        setup = assemble(self._config(guide), self.dataset)
        if start:
            start_from_data(setup)
            setup.model.double()
            setup.guide.double()
            mixture = getattr(setup.model, "mixture", setup.model)
            x = self.rows("train")
            try:
                mixture.initialize(x, torch.Generator(x.device).manual_seed(setup.seed))  # type: ignore[operator]
            except ValueError as error:
                raise ConfigError(f"data={self.dataset.name}: {one_line(error)}") from error
        return setup

    @property
    def _states(self) -> int:
        options = self._config("exact").tree()["model"]
        return int(options["components"] if self.model == "gmm" else options["latent_dim"])

    def _config(self, guide: str) -> Config:
        return load([*self.arguments, *GUIDES[self.model][guide]])

    def _reduced(self, dataset: Dataset) -> Dataset:
        wanted = self.settings.components
        if wanted < 0:
            wanted = min(50, max(10, len(dataset.splits["train"]) // (40 * self._states)))
        return principal(dataset, wanted) if wanted and math.prod(dataset.shape) > wanted else dataset


def _line(trace: Trace, em: Trace) -> str:
    end = trace.points[-1]
    behind = "" if trace is em else f", {em.points[-1].log_p - end.log_p:.4f} below EM"
    return (
        f"{trace.way:<16} log p(x) {end.log_p:.4f}, bound {end.bound:.4f}, gap {end.gap:.4f}{behind}; "
        f"log p(x) fell {trace.falls} times, by {trace.deepest_fall:.2g} at most; {end.passes:.0f} passes, "
        f"{end.seconds:.1f} s"
    )


def _sections(traces: list[Trace], makers: _Makers, outcomes: dict[str, Outcome], folder: Path) -> list[Section]:
    by_half_steps = [trace for trace in traces if trace.way in ("EM", "variational EM")]
    pictures = folder / "figures"
    fitted = em_figures.ellipses(makers.fitted, makers.rows("train"), pictures)
    return [
        Section(
            "The bars, half step by half step",
            [
                "An E step moves q to the posterior: the bound rises to log p(x), which stays where it is, and the gap "
                "closes. An M step moves θ: the bound rises, log p(x) rises by more, and the gap opens, because q is "
                "now the posterior of the model before. So log p(x) can only go up."
            ],
            figures=[em_figures.bars(trace, pictures) for trace in by_half_steps],
        ),
        Section(
            "The same objective by gradients",
            [
                "EM and SVI climb the same surface. EM's steps never lower log p(x). SVI's may, for two reasons: a "
                "batch is not the data, and a q that is not the posterior lets a step raise the bound and lower "
                "log p(x).",
                told(traces),
            ],
            table=_summary(traces),
            figures=[em_figures.curves(traces, pictures), em_figures.gaps(traces, pictures), *fitted],
        ),
        Section(
            "A step that raises the bound and lowers log p(x)",
            [_story(outcomes)],
            figures=[em_figures.counterexample(outcomes, pictures)],
        ),
        *(
            [Section("Cut short", [f"{t.way}: {t.note}" for t in traces if t.note])]
            if any(t.note for t in traces)
            else []
        ),
    ]


def _story(outcomes: dict[str, Outcome]) -> str:
    svi, em = outcomes["SVI"], outcomes["EM"]
    return (
        "One datum x = 1, two fixed components N(−1, 1) and N(1, 1), one parameter θ, the log-odds of the second. Held "
        f"at q = 0.1 for the second component, far from its posterior, the bound rises from {svi.bound_before:.3f} to "
        f"{svi.bound_after:.3f} with one gradient step to θ = {svi.theta:.2f}, and log p(x) falls from "
        f"{svi.log_p_before:.3f} to {svi.log_p_after:.3f}. EM from the same start goes to θ = {em.theta:.2f}, and "
        f"log p(x) rises to {em.log_p_after:.3f}."
    )


def _summary(traces: list[Trace]) -> Table:
    best, letters = traces[0].points[-1].log_p, destinations(traces)
    rows = []
    for trace in traces:
        end = trace.points[-1]
        rows.append(
            {
                "fit": trace.way,
                "log p(x)": f"{end.log_p:.4f}",
                "below EM": f"{round(best - end.log_p, 4) + 0.0:.4f}",  # no minus before a zero
                "EM leads on to": "nothing" if trace.optimum is None else f"{letters[trace.way]}: {trace.optimum:.4f}",
                "bound": f"{end.bound:.4f}",
                "gap": f"{end.gap:.4f}",
                "held out": f"{trace.held_out:.4f}",
                "falls": trace.falls,
                "deepest": f"{trace.deepest_fall:.2g}",
                "passes": f"{end.passes:.0f}",
                "seconds": f"{end.seconds:.2f}",
            }
        )
    return Table.from_records(rows)


def _points(traces: list[Trace]) -> Table:
    rows: list[dict[str, Any]] = [
        {"fit": trace.way, **vars(point), "gap": point.gap} for trace in traces for point in trace.points
    ]
    return Table.from_records(rows)
