"""Study: ELBO estimators. At the same parameters, how far off, how noisy and how dear is each gradient?"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro.infer
import torch
from matplotlib.ticker import NullLocator
from torch import Tensor, nn

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference.assemble import assemble, start_from_data
from inference.bounds import Renyi
from inference.canvas import CLASS_COLOURS, INK, WIDTH, axis_labels, heading, panel, save, sheet
from inference.catalog import trace_elbo, trace_graph_elbo, trace_mean_field_elbo
from inference.config import load
from inference.console import Console, Quiet
from inference.evaluate import evaluating, held_out
from inference.experiment import open_run, train
from inference.figures import Figure
from inference.gradient_moments import Gradient, Moments, Reference, blocks_of, exact_reference, long_run, measure
from inference.objectives import ELBO, IWAE
from inference.studies.testbeds import BitGuide, BitModel, enumerated_elbo, linear_elbo
from inference.study import Section, write_study
from inference.table import Table
from models.nets import Linear
from models.ppca import PPCA

Factory = Callable[[int], pyro.infer.ELBO]
Exact = Callable[[Any, Any, Tensor], Tensor]

# What is estimated, how, and by what; those with the same first word estimate the same gradient.
PATHWISE: dict[tuple[str, str], Factory] = {
    ("ELBO", "Pyro Trace_ELBO"): trace_elbo,
    ("ELBO", "Pyro TraceMeanField_ELBO"): trace_mean_field_elbo,
    ("ELBO", "reparameterized"): lambda k: ELBO(k),
    ("ELBO", "closed-form KL"): lambda k: ELBO(k, kl="analytic"),
    ("ELBO", "sticking the landing"): lambda k: ELBO(k, gradient="stl"),
    ("ELBO", "score function"): lambda k: ELBO(k, gradient="score"),
    ("IWAE", "reparameterized"): lambda k: IWAE(k),
    ("IWAE", "doubly reparameterized"): lambda k: IWAE(k, gradient="dreg"),
    ("Rényi 1/2", "reparameterized"): lambda k: Renyi(0.5, k),
}
LEAVE_ONE_OUT: dict[tuple[str, str], Factory] = {
    ("ELBO", "leave-one-out"): lambda k: ELBO(k, gradient="loo"),
    ("IWAE", "VIMCO"): lambda k: IWAE(k, gradient="loo"),
}
DISCRETE: dict[tuple[str, str], Factory] = {
    ("ELBO", "Pyro Trace_ELBO"): trace_elbo,
    ("ELBO", "Pyro TraceGraph_ELBO"): trace_graph_elbo,
    ("ELBO", "score function"): lambda k: ELBO(k, gradient="score"),
    ("ELBO", "decaying average"): lambda k: ELBO(k, gradient="score_average"),
    ("IWAE", "score function"): lambda k: IWAE(k, gradient="score"),
}
REFERENCES: dict[str, Factory] = {
    "ELBO": lambda k: ELBO(max(k, 8), kl="monte_carlo"),
    "IWAE": lambda k: IWAE(k, gradient="dreg" if k > 1 else "reparameterized"),
    "Rényi 1/2": lambda k: Renyi(0.5, k),
}


@dataclass
class EstimatorsSettings:
    """What is measured.

    Args:
        particles: numbers of particles.
        moments: training steps after which the parameters are held still and the gradients measured.
        repeats: gradients drawn for each estimator.
        reference_repeats: gradients drawn for the long run that stands for the exact gradient where there is none.
        data: training data in the batch whose gradient is estimated.
    """

    particles: list[int] = field(default_factory=lambda: [1, 5, 50])
    moments: list[int] = field(default_factory=lambda: [0, 2000])
    repeats: int = 200
    reference_repeats: int = 1000
    data: int = 50


def estimators(
    arguments: list[str], settings: EstimatorsSettings, folder: Path, console: Console, command: str
) -> Path:
    """Gradient estimators at the same parameters: bias, variance, signal-to-noise, time and memory."""
    records: list[dict[str, Any]] = []
    with console.stage("gradients") as progress:
        total = len(settings.moments) + 2
        for done, step in enumerate(settings.moments):
            progress(done, total)
            model, guide, x = _trained_for(step, arguments, settings, folder)
            records += _compare(f"VAE after {step:,} steps", model, guide, x, None, settings)
        progress(total - 2, total)
        records += _linear(x, settings)
        progress(total - 1, total)
        records += _bits(x, settings)
        progress(total, total)
    table = Table.from_records(records)
    return write_study(folder, "ELBO estimators", _intro(settings), _sections(records, folder), table, command)


def _trained_for(
    steps: int, arguments: list[str], settings: EstimatorsSettings, folder: Path
) -> tuple[nn.Module, nn.Module, Tensor]:
    small = ["model.latent_dim=8", "encoder.hidden=[64]", "decoder.hidden=[64]", "evaluation.particles=50"]
    given = {argument.partition("=")[0] for argument in arguments}
    options = [*(a for a in small if a.partition("=")[0] not in given), *arguments]
    if steps:
        run = folder / "runs" / f"{steps}"
        if not (run / "summary.json").exists():
            train(load([*options, f"trainer.steps={steps}", f"run.dir='{run}'"]), Quiet())
        setup = open_run(run)
    else:
        setup = assemble(load(options))
        start_from_data(setup)
    x, _ = held_out(setup.source("train"), settings.data, seed=0)
    return setup.model, setup.guide, x


def _linear(x: Tensor, settings: EstimatorsSettings) -> list[dict[str, Any]]:
    """On the linear-Gaussian model, where the ELBO's gradient is in closed form."""
    torch.manual_seed(0)
    flat = x.flatten(1) - x.flatten(1).mean(0)
    model = PPCA(flat.shape[1:], 4)
    guide = Amortized(DiagonalNormal((4,), flat.shape[1:], Linear))
    return _compare("linear-Gaussian", model, guide, flat, linear_elbo, settings)


def _bits(x: Tensor, settings: EstimatorsSettings) -> list[dict[str, Any]]:
    """On a model with six bits, where 64 states are summed over."""
    torch.manual_seed(0)
    data = (x > x.mean()).to(x.dtype)
    model, guide = BitModel(data.shape[1:], 6), BitGuide(data.shape[1:], 6)
    return _compare("six Bernoulli bits", model, guide, data, enumerated_elbo, settings, DISCRETE)


def _compare(
    where: str,
    model: nn.Module,
    guide: nn.Module,
    x: Tensor,
    exact: Exact | None,
    settings: EstimatorsSettings,
    table: dict[tuple[str, str], Factory] = PATHWISE,
) -> list[dict[str, Any]]:
    """Every estimator with every number of particles, at these parameters."""
    records = []
    for k in settings.particles:
        references: dict[str, Reference] = {}
        for (bound, name), factory in {**table, **(LEAVE_ONE_OUT if k > 1 else {})}.items():
            if bound not in references:
                references[bound] = _reference(bound, k, model, guide, x, exact, settings)
            with evaluating(model, guide, seed=1), torch.enable_grad():
                found = measure(factory(k), model, guide, x, settings.repeats, references[bound].directions)
            records += [
                _record(where, bound, name, k, block, found, references[bound])
                for block in references[bound].directions
            ]
    return records


def _reference(
    bound: str, k: int, model: nn.Module, guide: nn.Module, x: Tensor, exact: Exact | None, settings: EstimatorsSettings
) -> Reference:
    if bound == "ELBO" and exact is not None:
        return exact_reference(exact_gradient(exact, model, guide, x))
    discrete = isinstance(model, BitModel)
    objective = IWAE(k, gradient="loo" if k > 1 else "score") if discrete else REFERENCES[bound](k)
    with evaluating(model, guide, seed=2), torch.enable_grad():
        return long_run(objective, model, guide, x, settings.reference_repeats)


def exact_gradient(exact: Exact, model: nn.Module, guide: nn.Module, x: Tensor) -> Gradient:
    """The gradient of a mean bound that is known in closed form, for each block of parameters."""
    blocks = {name: parameters for name, parameters in blocks_of(model, guide).items() if parameters}
    bound = exact(model, guide, x).mean()
    return {
        name: torch.cat([g.flatten() for g in torch.autograd.grad(bound, ps, retain_graph=True)]).double()
        for name, ps in blocks.items()
    }


def _record(
    where: str, bound: str, name: str, k: int, block: str, found: Moments, reference: Reference
) -> dict[str, Any]:
    variance = found.total_variance(block)
    bias, error = found.bias(block, reference)
    return {
        "where": where,
        "bound": bound,
        "estimator": name,
        "particles": k,
        "block": block,
        "relative_bias": bias,
        "relative_bias_stderr": error,
        "reference": reference.origin,
        "variance": variance,
        "signal_to_noise": found.signal_to_noise(block),
        "milliseconds": found.milliseconds,
        "saved_bytes": found.saved_bytes,
        "variance_x_milliseconds": variance * found.milliseconds,
    }


def _intro(settings: EstimatorsSettings) -> list[str]:
    return [
        f"The gradient of a bound per datum, for one batch of {settings.data} data at fixed parameters, drawn "
        f"{settings.repeats:,} times by each estimator. Estimators of one bound have one expectation; what differs is "
        "how far a draw lies from it and what it costs.",
        "Bias is the error of the mean along the reference gradient, as a fraction of its length, with its standard "
        "error: an unbiased estimator is within a few of those of zero. The variance is the trace of the covariance. "
        "Signal to noise is the mean over parameters of |E g| / sd g; kB are what autograd keeps between the passes.",
    ]


def _sections(records: list[dict[str, Any]], folder: Path) -> list[Section]:
    sections = []
    for where in dict.fromkeys(record["where"] for record in records):
        here = [record for record in records if record["where"] == where and record["block"] == "guide"]
        origins = dict.fromkeys(f"{record['bound']}: {record['reference']}" for record in here)
        rows = [
            {
                "bound": r["bound"],
                "estimator": r["estimator"],
                "K": r["particles"],
                "bias": f"{r['relative_bias']:+.3f}\u202f±\u202f{r['relative_bias_stderr']:.3f}",
                "variance": f"{r['variance']:.3g}",
                "signal / noise": f"{r['signal_to_noise']:.3g}",
                "ms": f"{r['milliseconds']:.2f}",
                "kB": f"{r['saved_bytes'] / 1024:.0f}",
                "variance × ms": f"{r['variance_x_milliseconds']:.3g}",
            }
            for r in here
        ]
        words = [f"Gradients with respect to the guide. Held against: {'; '.join(origins)} draws."]
        name = "".join(c if c.isalnum() else "_" for c in where)
        sections.append(
            Section(where, words, Table.from_records(rows), [_draw(where, here, folder / f"figures/{name}.png")])
        )
    return sections


def _draw(where: str, records: list[dict[str, Any]], path: Path) -> Figure:
    """Signal to noise against K, and variance x time against K, a line for each estimator."""
    figure = sheet(WIDTH, 760)
    kinds = list(dict.fromkeys((record["bound"], record["estimator"]) for record in records))
    for left, key, title in (
        (130, "signal_to_noise", "signal / noise"),
        (690, "variance_x_milliseconds", "variance × ms"),
    ):
        axes = panel(figure, left, 110, 420, 560)
        heading(axes, title)
        for place, kind in enumerate(kinds):
            line = [r for r in records if (r["bound"], r["estimator"]) == kind]
            tint = CLASS_COLOURS[place % len(CLASS_COLOURS)]
            across, up = [r["particles"] for r in line], [r[key] for r in line]
            style = "o-" if kind[0] == "ELBO" else "o--"
            axes.plot(across, up, style, color=tint, markersize=4, linewidth=1.2, label=", ".join(kind))
        axes.set_xscale("log")
        axes.set_yscale("log")
        counts = sorted({record["particles"] for record in records})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axis_labels(axes, "particles K")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.03, 1.0))
    save(figure, path)
    caption = (
        "Left: higher is better. The signal of an importance-weighted bound sinks as K grows; doubly reparameterized, "
        "its gradient has more of it throughout. Right: lower is better, the variance bought at a given time."
        if any(record["estimator"] == "doubly reparameterized" for record in records)
        else "Left: higher is better. Right: lower is better, the variance bought at a given time. Baselines and "
        "leave-one-out signals leave the mean alone and take the noise away."
    )
    return Figure(path.stem, where, caption, path)
