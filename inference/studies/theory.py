"""Study: theory. Rate and distortion, the indeterminacy of the VAE, the transition at beta = 1, claim by claim."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from inference import tables, theory
from inference.blahut_arimoto import curve, entropy
from inference.canvas import (
    BLUE,
    HAIRLINE,
    INK,
    MUTED,
    PALE_BLUE,
    RUST,
    WIDTH,
    axis_labels,
    heading,
    panel,
    save,
    sheet,
)
from inference.config import ConfigError
from inference.console import Console
from inference.figures import Figure
from inference.study import Section, write_study
from inference.table import Table
from inference.theory import Claim


@dataclass
class TheorySettings:
    """What the claims are checked on.

    Args:
        symbols: of the population.
        states: of the latent, at the transition.
        starts: random starts at each beta.
        seed: of the population.
    """

    symbols: int = 5
    states: int = 3
    starts: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.symbols <= 8 or not 2 <= self.states <= self.symbols or self.starts < 1:
            raise ConfigError(
                "study.symbols lies between 2 and 8, study.states between 2 and study.symbols, and study.starts is at "
                f"least 1; got {self.symbols}, {self.states}, {self.starts}"
            )


BETAS = (0.25, 0.5, 0.75, 0.9, 0.98, 1.0, 1.02, 1.1, 1.25, 1.5, 2.0)
MULTIPLIERS = (0.5, 1.0, 2.0, 4.0)


def theory_study(arguments: list[str], settings: TheorySettings, folder: Path, console: Console, command: str) -> Path:
    """Rate and distortion, indeterminacy, beta's transition at 1, RDA = beta-VAE: each claim with its number."""
    if arguments:
        raise ConfigError(f"{arguments[0]}: the study theory trains on no data set; accepted: study.* options")
    source = theory.random_source(settings.symbols, settings.seed)
    with console.stage("claims") as progress:
        rate = list(theory.closed_form_claims())
        progress(1, 5)
        channels = theory.trained_channels(*theory.planar_source(), MULTIPLIERS)
        rate += theory.channel_claims(channels)
        progress(2, 5)
        free = [
            *theory.universality_claims(),
            *theory.held_encoder_claims(source),
            *theory.decile_claims(source),
            *theory.collapse_claims(source),
        ]
        progress(3, 5)
        points = theory.transition(source, settings.states, BETAS, settings.starts)
        phases = list(theory.transition_claims(source, settings.states, points))
        progress(4, 5)
        same = list(theory.equivalence_claims())
        progress(5, 5)
    sections = [
        Section("Rate and distortion", RATE, _shown(rate), [_draw_rate(channels, folder)]),
        Section("An encoder may be anything", FREE, _shown(free), [_draw_deciles(theory.deciles(source), folder)]),
        Section(
            "β decides how much z says", PHASES, _shown(phases), [_draw_transition(points, source, settings, folder)]
        ),
        Section("The rate-distortion autoencoder is the β-VAE", SAME, _shown(same)),
    ]
    claims = [*rate, *free, *phases, *same]
    table = Table.from_records([_record(claim) for claim in claims])
    broken = [claim.claim for claim in claims if not claim.holds]
    return write_study(
        folder, "Rate, distortion and what a VAE leaves open", _intro(claims, broken), sections, table, command
    )


RATE = [
    "A rate-distortion autoencoder (RDA) minimizes I(y; z) + λ E‖y − ŷ(z)‖². For a finite source the minimum is known: "
    "Blahut and Arimoto alternate two closed forms and end with a certificate of how far off they can still be. "
    "The autoencoder's tables are trained by gradients on the β-VAE's bound with a Gaussian decoder."
]
FREE = [
    "Encoder Q(z|y), prior P(z) and decoder P(y|z) are tables here, so that each can be anything. Hold any Q: the best "
    "prior is its aggregate, the best decoder its Bayes inverse, and the objective is then H(y), whatever Q was. The "
    "objective that is constant is E[ln Q(z|y)/P(z) − ln P(y|z)] = I(y; z) + H(y|z), with the conditional entropy of y "
    "given z: where a slide writes the entropy the other way round, the sum would not be H(y)."
]
PHASES = [
    "At the best prior and decoder the β-VAE's objective is H(y) + (β − 1) I(y; z). Below β = 1 it pays to say as much "
    "as the states of z can hold: the encoder becomes the partition of the symbols with the largest entropy. Above it "
    "pays to say nothing. At 1 nothing is decided."
]
SAME = [
    "Divide the β-VAE with decoder N(ŷ(z), σ² I) by β: KL + ‖y − ŷ‖²/(2βσ²), an RDA with λ = 1/(2βσ²). One network, "
    "one set of draws, two gradients; another λ gives another direction, which the check makes sure of first."
]


def _intro(claims: list[Claim], broken: list[str]) -> list[str]:
    verdict = "All of them hold." if not broken else f"These do not hold: {'; '.join(broken)}."
    return [
        f"{len(claims)} claims of the lectures on rate, distortion and indeterminacy, each as a number beside the "
        f"number that it should be, in nats and double precision. {verdict}",
        "Claims about all encoders and decoders are checked on tables over a small population, where nothing is "
        "sampled and every sum is exact; the models, guides and objectives are those that run.py trains.",
    ]


def _record(claim: Claim) -> dict[str, object]:
    return {
        "row": claim.row,
        "claim": claim.claim,
        "found": float(claim.found),
        "expected": claim.expected,
        "tolerance": claim.tolerance,
        "holds": claim.holds,
    }


def _shown(claims: list[Claim]) -> Table:
    return Table.from_records(
        [
            {
                "row": claim.row,
                "claim": claim.claim,
                "found": f"{claim.found:.6g}" if claim.expected else _power(claim.found),
                "expected": f"{claim.expected:.6g}",
                "within": _power(claim.tolerance),
                "": "✓" if claim.holds else "✗ does not hold",
            }
            for claim in claims
        ]
    )


def _power(value: float) -> str:
    """A small number, with a minus at which no line breaks."""
    return f"{value:.1e}".replace("-", "−")


def _draw_rate(channels: list[theory.TrainedPoint], folder: Path) -> Figure:
    figure = sheet(WIDTH, 760)
    left = panel(figure, 130, 110, 620, 570)
    heading(left, "closed forms and Blahut-Arimoto")
    distortions = np.linspace(1e-3, 0.499, 200)
    left.plot(distortions, [theory.binary_rate(d) for d in distortions], color=BLUE, linewidth=1.4, label="fair bit")
    wide = np.linspace(0.06, 1.0, 200)
    left.plot(wide, [theory.gaussian_rate(d) for d in wide], color=RUST, linewidth=1.4, label="N(0, 1)")
    for tint, found in ((BLUE, curve(np.full(2, 0.5), 1 - np.eye(2), np.array([0.5, 1, 2, 3, 4.5]))),
                        (RUST, _gaussian_points())):  # fmt: skip
        left.plot(found[:, 1], found[:, 0], "o", color=tint, markersize=5)
    left.set(xlim=(0, 1.02), ylim=(0, 1.5))
    left.legend(frameon=False, fontsize=10, labelcolor=INK)
    axis_labels(left, "distortion D", "rate, nats")
    right = panel(figure, 920, 110, 620, 570)
    heading(right, "trained autoencoders, 8 points in the plane")
    points, source, codebook = theory.planar_source()
    squares = (points[:, None] - codebook).square().sum(-1).numpy()
    exact = curve(source.numpy(), squares, np.geomspace(0.2, 30, 40), 1e-6)
    right.plot(exact[:, 1], exact[:, 0], color=MUTED, linewidth=1.4, label="Blahut-Arimoto")
    right.plot([c.distortion for c in channels], [c.rate for c in channels], "o", color=RUST, markersize=6,
               label="β-VAE, Gaussian decoder, by gradients")  # fmt: skip
    right.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize=10, labelcolor=INK)
    axis_labels(right, "distortion D", "rate, nats")
    caption = (
        "Left: rate-distortion functions in closed form (lines) and as the iteration finds them (dots). Right: a "
        "source without a closed form; the dots are autoencoders trained by gradients, one for each λ."
    )
    return _saved(figure, "rate_distortion", "Rate against distortion", caption, folder)


def _gaussian_points() -> np.ndarray:
    grid, mass = theory.gaussian_grid()
    return curve(mass, (grid[:, None] - grid) ** 2, np.array([0.6, 1.0, 2.0, 4.0]), 1e-3)  # enough for a dot


def _draw_deciles(found: list[theory.Decile], folder: Path) -> Figure:
    figure = sheet(WIDTH, 620)
    axes = panel(figure, 130, 110, WIDTH - 190, 420)
    places = np.arange(len(found))
    information = [d.information for d in found]
    rest = [d.conditional_entropy for d in found]
    axes.bar(places, information, 0.7, color=BLUE, label="I(y; z): what z says of y")
    axes.bar(places, rest, 0.7, bottom=information, color=PALE_BLUE, label="H(y|z): what the decoder still has to code")
    axes.plot(places, [d.objective for d in found], "o", color=RUST, markersize=6, label="objective −ELBO")
    axes.set_xticks(places, [f"{tenth / 10:.1f}" for tenth in range(len(found))])
    axes.set_ylim(0, 1.22 * max(d.objective for d in found))
    axes.legend(frameon=False, fontsize=10, labelcolor=INK, ncols=3, loc="upper left")
    axis_labels(axes, "I(y; z) / H(y) of the encoder that was held", "nats")
    caption = (
        "Eleven encoders, from one that ignores y to one that copies it, each with the prior and decoder that suit it "
        "best. The ELBO cannot tell them apart."
    )
    return _saved(figure, "indeterminacy", "One objective, every amount of information", caption, folder)


def _draw_transition(found: list[theory.Transition], source: Tensor, settings: TheorySettings, folder: Path) -> Figure:
    content = entropy(source.numpy())
    most = tables.most_informative_partition(source.numpy(), settings.states)
    figure = sheet(WIDTH, 760)
    left = panel(figure, 130, 110, 620, 570)
    heading(left, "information of the encoder")
    left.plot([0.2, 1, 1, 2.05], [most, most, 0, 0], color=MUTED, linewidth=1.2, zorder=0, label="theory")
    left.axhline(content, color=HAIRLINE, linewidth=1.2, zorder=0)
    left.annotate("H(y)", (2.05, content), ha="right", va="bottom", fontsize=10, color=MUTED)
    for t in found:
        left.plot([t.beta] * len(t.starts), t.starts, "o", color=PALE_BLUE, markersize=4, zorder=1)
    decided = [t for t in found if t.beta != 1]
    left.plot([t.beta for t in decided], [t.information for t in decided], "o", color=RUST, markersize=6,
              label="best of the starts")  # fmt: skip
    left.plot([], [], "o", color=PALE_BLUE, markersize=4, label="every start")
    left.set(ylim=(-0.05, 1.12 * content), xlim=(0.2, 2.07))
    left.legend(frameon=False, fontsize=10, labelcolor=INK, loc="center right")
    axis_labels(left, "β", "I(y; z), nats")
    right = panel(figure, 920, 110, 620, 570)
    heading(right, "objective at the optimum")
    line = np.array([0.2, 1.0, 2.05])
    right.plot(line, content + np.minimum(line - 1, 0) * most, color=MUTED, linewidth=1.2, zorder=0,
               label="H(y) + (β − 1) I*")  # fmt: skip
    right.plot([t.beta for t in found], [t.objective for t in found], "o", color=RUST, markersize=6, label="trained")
    right.set(xlim=(0.2, 2.07), ylim=(0, 1.12 * content))
    right.legend(frameon=False, fontsize=10, labelcolor=INK, loc="lower right")
    axis_labels(right, "β", "−E ln P(y|z) + β KL, nats")
    caption = (
        f"{len(source)} symbols, {settings.states} latent states, {settings.starts} random starts at each β, trained "
        "by gradients. Left: I(y; z) jumps at β = 1, where every value is optimal; below 1 some starts end in a "
        "partition that is not the best one. Right: the objective has its kink there."
    )
    return _saved(figure, "transition", "The transition at β = 1", caption, folder)


def _saved(figure: object, name: str, title: str, caption: str, folder: Path) -> Figure:
    path = folder / "figures" / f"{name}.png"
    save(figure, path)  # type: ignore[arg-type]
    return Figure(name, title, caption, path)
