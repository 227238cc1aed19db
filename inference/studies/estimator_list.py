"""Which gradient estimators are compared, what each of them estimates, and what that is held against."""

from collections.abc import Callable
from dataclasses import dataclass

import pyro.infer

from inference.bounds import CIWAE, MIWAE, PIWAE, Renyi
from inference.catalog import trace_elbo, trace_enum_elbo, trace_graph_elbo, trace_mean_field_elbo
from inference.objectives import ELBO, IWAE
from inference.studies.testbeds import DRAWN
from inference.thermodynamic import TVO
from inference.wake_sleep import WakeSleep

Make = Callable[[int], pyro.infer.ELBO]
PATHWISE, PATH_ONLY, SCORE, BASELINE = "pathwise", "path alone", "score", "score with a baseline"
CONTROLLED = "score with a control variate"
WEIGHTED, RELAXED, SUMMED = "weighted draws", "relaxed draws", "summed over"
KINDS = (PATHWISE, PATH_ONLY, SCORE, BASELINE, CONTROLLED, WEIGHTED, RELAXED, SUMMED)


def groups_of(particles: int) -> int:
    """In how many parts MIWAE divides its particles: the largest divisor up to their square root."""
    return max(m for m in range(1, int(particles**0.5) + 1) if particles % m == 0)


@dataclass(frozen=True)
class Estimator:
    """One row: the target whose gradient is meant, the estimator's name and kind, and how it is made for K particles.

    ``least`` and ``most`` bound K; ``guide`` says how a testbed with several ways to draw its latents does it.
    """

    target: str
    name: str
    kind: str
    make: Make
    least: int = 1
    most: int | None = None
    guide: str = DRAWN

    def takes(self, particles: int) -> bool:
        """Whether it is defined, and something of its own, for so many particles."""
        return self.least <= particles <= (self.most or particles)


_SCORES = (
    Estimator("ELBO", "score function", SCORE, lambda k: ELBO(k, gradient="score")),
    Estimator("ELBO", "decaying average", BASELINE, lambda k: ELBO(k, gradient="score_average")),
    Estimator("ELBO", "NVIL", BASELINE, lambda k: ELBO(k, gradient="nvil")),
    Estimator("ELBO", "leave-one-out", BASELINE, lambda k: ELBO(k, gradient="loo"), 2),
)
_WEIGHTED = (
    Estimator("TVO", "covariance", WEIGHTED, TVO, 2),
    Estimator("wake", "weighted", WEIGHTED, WakeSleep, 2),
    Estimator("sleep", "weighted", WEIGHTED, lambda k: WakeSleep(k, "sleep"), 2),
    Estimator("wake and sleep", "weighted", WEIGHTED, lambda k: WakeSleep(k, "both"), 2),
)
FOR_PATHS = (
    Estimator("ELBO", "Pyro Trace_ELBO", PATHWISE, trace_elbo),
    Estimator("ELBO", "Pyro TraceMeanField_ELBO", PATHWISE, trace_mean_field_elbo),
    Estimator("ELBO", "reparameterized", PATHWISE, ELBO),
    Estimator("ELBO", "closed-form KL", PATHWISE, lambda k: ELBO(k, kl="analytic")),
    Estimator("ELBO", "sticking the landing", PATH_ONLY, lambda k: ELBO(k, gradient="stl")),
    *_SCORES,
    Estimator("IWAE", "reparameterized", PATHWISE, IWAE, 2),
    Estimator("IWAE", "doubly reparameterized", PATH_ONLY, lambda k: IWAE(k, gradient="dreg"), 2),
    Estimator("IWAE", "VIMCO", BASELINE, lambda k: IWAE(k, gradient="vimco"), 2),
    Estimator("Rényi 1/2", "reparameterized", PATHWISE, lambda k: Renyi(0.5, k), 2),
    Estimator("Rényi 1/2", "doubly reparameterized", PATH_ONLY, lambda k: Renyi(0.5, k, gradient="dreg"), 2),
    Estimator("MIWAE", "reparameterized", PATHWISE, lambda k: MIWAE(k, groups_of(k)), 4),
    Estimator("CIWAE", "reparameterized", PATHWISE, lambda k: CIWAE(0.5, k), 2),
    Estimator("PIWAE", "reparameterized", PATHWISE, lambda k: PIWAE(k, groups_of(k)), 4),
    Estimator("PIWAE", "doubly reparameterized", PATH_ONLY, lambda k: PIWAE(k, groups_of(k), gradient="dreg"), 4),
    Estimator("TVO", "reparameterized", PATHWISE, lambda k: TVO(k, gradient="reparameterized"), 2),
    *_WEIGHTED,
    Estimator("wake", "doubly reparameterized", PATH_ONLY, lambda k: WakeSleep(k, gradient="dreg"), 2),
)
FOR_BITS = (
    Estimator("ELBO", "enumerated", SUMMED, lambda k: trace_enum_elbo(), 1, 1, "enumerated"),
    Estimator("ELBO", "Pyro Trace_ELBO", SCORE, trace_elbo),
    Estimator("ELBO", "Pyro TraceGraph_ELBO", SCORE, trace_graph_elbo),
    *_SCORES,
    Estimator("ELBO", "relaxed, temperature 1", RELAXED, ELBO, guide="relaxed"),
    Estimator("ELBO", "relaxed, temperature 0.3", RELAXED, ELBO, guide="relaxed, cool"),
    Estimator("ELBO", "straight-through", RELAXED, ELBO, guide="straight-through"),
    Estimator("ELBO", "straight-through, of the mean", RELAXED, ELBO, guide="straight-through, of the mean"),
    Estimator("ELBO", "MuProp", CONTROLLED, lambda k: ELBO(k, gradient="muprop")),
    Estimator("ELBO", "REBAR", CONTROLLED, lambda k: ELBO(k, gradient="rebar")),
    Estimator("ELBO", "RELAX", CONTROLLED, lambda k: ELBO(k, gradient="relax")),
    Estimator("ELBO", "ARM", CONTROLLED, lambda k: ELBO(k, gradient="arm")),
    Estimator("IWAE", "score function", SCORE, lambda k: IWAE(k, gradient="score"), 2),
    Estimator("IWAE", "VIMCO", BASELINE, lambda k: IWAE(k, gradient="vimco"), 2),
    Estimator("IWAE", "VIMCO, arithmetic", BASELINE, lambda k: IWAE(k, gradient="vimco_arithmetic"), 2),
    *_WEIGHTED,
)

# What the model and the guide follow under each target, where that is not the target itself.
FOLLOWS = {
    "PIWAE": {"model": "IWAE", "guide": "MIWAE"},
    "wake": {"model": "IWAE"},
    "sleep": {"model": "IWAE"},
    "wake and sleep": {"model": "IWAE"},
}
TARGETS = {
    "ELBO": "the evidence lower bound",
    "IWAE": "the importance-weighted bound of K draws",
    "Rényi 1/2": "the Rényi bound of order 1/2 of K draws",
    "MIWAE": "the importance-weighted bound of K/M draws, averaged over M groups, M the divisor of K below its root",
    "CIWAE": "the mean of ELBO and importance-weighted bound",
    "PIWAE": "for the model the importance-weighted bound of K draws, for the guide that of K/M",
    "TVO": "the thermodynamic sum under the exact tempered posteriors; draws are biased for it, the less the larger K",
    "wake": "for the model the importance-weighted bound of K draws, for the guide the mean of log q(z|x) under the "
    "exact posterior; draws are biased for the latter, the less the larger K",
    "sleep": "for the model the importance-weighted bound, for the guide the mean of log q(z|x) under the model's own "
    "latents and data",
    "wake and sleep": "for the model the importance-weighted bound, for the guide the mean of the two others",
}
OF_ALL_DRAWS = ("IWAE", "Rényi 1/2", "MIWAE", "CIWAE")  # a target for each number of particles


@dataclass(frozen=True)
class LongRun:
    """An estimator whose mean stands for the exact gradient; ``many`` where that is only right for many particles."""

    name: str
    make: Make
    many: bool = False


def long_run_for(target: str, discrete: bool) -> LongRun:
    """What is repeated to know the gradient of a target that has no closed form."""
    if discrete:
        return _FOR_BITS[target]
    return _FOR_PATHS[target]


_FOR_PATHS = {
    "ELBO": LongRun("closed-form KL with 8 particles", lambda k: ELBO(8, kl="analytic")),
    "IWAE": LongRun("doubly reparameterized", lambda k: IWAE(k, gradient="dreg")),
    "Rényi 1/2": LongRun("doubly reparameterized", lambda k: Renyi(0.5, k, gradient="dreg")),
    "MIWAE": LongRun("doubly reparameterized", lambda k: MIWAE(k, groups_of(k), gradient="dreg")),
    "CIWAE": LongRun("doubly reparameterized", lambda k: CIWAE(0.5, k, gradient="dreg")),
    "TVO": LongRun("covariance", TVO, many=True),
    "wake": LongRun("doubly reparameterized", lambda k: WakeSleep(k, gradient="dreg"), many=True),
    "sleep": LongRun("dreams", lambda k: WakeSleep(2, "sleep")),
    "wake and sleep": LongRun("weighted", lambda k: WakeSleep(k, "both"), many=True),
}
_FOR_BITS = {
    "IWAE": LongRun("VIMCO", lambda k: IWAE(k, gradient="vimco")),
    "sleep": LongRun("dreams", lambda k: WakeSleep(2, "sleep")),
    "wake and sleep": LongRun("weighted", lambda k: WakeSleep(k, "both"), many=True),
}
