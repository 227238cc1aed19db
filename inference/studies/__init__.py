"""Studies by name: a question, the runs that answer it, and a page."""

import shlex
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from inference.config import ConfigError, settings_from
from inference.console import Console
from inference.grid import split_arguments
from inference.signals import Interrupted
from inference.studies.adversarial import AdversarialSettings, adversarial
from inference.studies.autoencoder import AutoencoderSettings, autoencoder
from inference.studies.clustering import ClusteringSettings, clustering
from inference.studies.codes import CodesSettings, codes
from inference.studies.collapse import CollapseSettings, collapse
from inference.studies.colorization import ColorizationSettings, colorization
from inference.studies.discrete import DiscreteSettings, discrete
from inference.studies.em_vs_svi import EMvsSVISettings, em_vs_svi
from inference.studies.estimators import EstimatorsSettings, estimators
from inference.studies.families import FamiliesSettings, families
from inference.studies.rate_distortion import RateDistortionSettings, rate_distortion
from inference.studies.theory import TheorySettings, theory_study

Study = Callable[[list[str], Any, Path, Console, str], Path]
STUDIES: dict[str, tuple[type, Study]] = {
    "families": (FamiliesSettings, families),
    "estimators": (EstimatorsSettings, estimators),
    "codes": (CodesSettings, codes),
    "collapse": (CollapseSettings, collapse),
    "adversarial": (AdversarialSettings, adversarial),
    "autoencoder": (AutoencoderSettings, autoencoder),
    "em_vs_svi": (EMvsSVISettings, em_vs_svi),
    "rate_distortion": (RateDistortionSettings, rate_distortion),
    "discrete": (DiscreteSettings, discrete),
    "theory": (TheorySettings, theory_study),
    "clustering": (ClusteringSettings, clustering),
    "colorization": (ColorizationSettings, colorization),
}


def run_study(arguments: Sequence[str], console: Console) -> Path:
    """Run ``NAME key=value ...``: ``study.*`` are the study's own options, the others those of its runs.

    Raises:
        ConfigError: no such study, or a bad option.
        Interrupted: a signal arrived; no page is written.
    """
    names = ", ".join(STUDIES)
    if not arguments or arguments[0] not in STUDIES:
        given = arguments[0] if arguments else "nothing"
        raise ConfigError(f"study takes the name of one, got {given}; accepted: {names}")
    settings_class, run = STUDIES[arguments[0]]
    own, rest = split_arguments(arguments[1:], ("run.dir",))
    options = [argument for argument in rest if argument.startswith("study.")]
    settings = settings_from(settings_class, "study", options)
    _check_seeds(getattr(settings, "seeds", None), rest)
    folder = Path(own.get("run.dir") or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-{arguments[0]}")
    command = f"python run.py study {shlex.join(a for a in arguments if not a.startswith('run.dir='))}"
    try:
        page = run([argument for argument in rest if argument not in options], settings, folder, console, command)
    except Interrupted as stop:
        again = f". Its finished runs are kept: give the same command, with run.dir={folder}"
        raise Interrupted(stop.signum, stop.what or again) from None
    console.say(f"report    {page}")
    return page


def _check_seeds(seeds: Sequence[int] | None, arguments: Sequence[str]) -> None:
    """A study with seeds of its own gives each run one of them, and each counts once."""
    if seeds is None:
        return
    if given := [argument for argument in arguments if argument.startswith("seed=")]:
        raise ConfigError(f"{given[0]}: this study gives its runs their seeds; accepted: study.seeds=[...]")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"study.seeds: {list(seeds)} has one of them twice, which would count as two runs")
