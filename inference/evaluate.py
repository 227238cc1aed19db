"""Held-out numbers: importance-sampled log p(x) with its reliability, the bound and its parts, ELBO surgery."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inference.codes import code_scores, is_a_point, is_certain, unbounded
from inference.data import Source
from inference.diagnostics import active_units, elbo_terms, kl_per_dimension
from inference.exact_surgery import best_surgery
from inference.export import import_arviz
from inference.parameters import in_modules
from inference.particles import Program, guess_max_plate_nesting, particles, validation
from inference.table import Table

MOST_TRACKED = 2**22  # densities for an exact surgery at each scoring of the validation data


@dataclass
class EvaluationSettings:
    """How thoroughly to score held-out data.

    Args:
        particles: importance samples per datum for log p(x).
        elbo_samples: draws per datum for the bound's expectation.
        data: number of held-out data, chosen at random; 0 for all.
        surgery_data: number of data for the ELBO surgery, whose cost is quadratic in it.
        khat_data: number of data whose Pareto k-hat is computed.
        draws: posterior draws per datum in ``posterior.nc``.
        posterior_data: number of data in ``posterior.nc``.
        engine: eager, or compiled: importance weights in one fused function, for long evaluations.
    """

    particles: int = 1000
    elbo_samples: int = 16
    data: int = 0
    surgery_data: int = 2000
    khat_data: int = 500
    draws: int = 100
    posterior_data: int = 32
    engine: str = "eager"

    def __post_init__(self) -> None:
        for name in ("particles", "elbo_samples", "surgery_data", "khat_data", "draws", "posterior_data"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name}: {getattr(self, name)} is below 1")
        if self.engine not in ("eager", "compiled"):
            raise ValueError(f"evaluation.engine: {self.engine!r} is neither eager nor compiled")
        if self.data < 0:
            raise ValueError(f"evaluation.data: {self.data} is below 0; 0 takes all")


@dataclass(frozen=True)
class Evidence:
    """Importance-sampled log p(x) of each datum, and how far to trust it."""

    log_p: Tensor  # (N,) nats
    khat: np.ndarray  # (min(N, khat_data),) Pareto shape of the largest importance weights


@contextmanager
def evaluating(*programs: Program, seed: int) -> Iterator[None]:
    """No gradients, no argument checks, evaluation mode, and random numbers of one's own: training is not disturbed.

    Parameters stay in their modules: nothing is left in Pyro's global store.
    """
    modules = [module for program in programs if isinstance(program, nn.Module) for module in program.modules()]
    modes = [module.training for module in modules]
    with in_modules(), torch.random.fork_rng(), torch.no_grad(), validation(False):
        torch.manual_seed(seed)
        for module in modules:
            module.train(False)
        try:
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode  # each its own: a part may be kept in evaluation mode throughout


def log_evidence(
    model: Program,
    guide: Program,
    x: Tensor,
    num_particles: int,
    khat_data: int = 0,
    memory_bytes: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    weigh: Callable[[Tensor, int], Tensor] | None = None,
) -> Evidence:
    """log p(x) of each datum by importance sampling from the guide (Rezende et al. 2014, section 4 and appendix E).

    A stochastic lower bound whose gap falls with ``num_particles``. Computed in chunks over particles and data, so its
    memory does not grow with either.

    Args:
        model: Pyro program.
        guide: Pyro program, the proposal.
        x: data, ``(N, *event_shape)``.
        num_particles: S, importance samples per datum.
        khat_data: number of data, from the first, whose Pareto k-hat is computed.
        memory_bytes: about how much a chunk may take; found from the device where not given.
        on_progress: called with the number of data done and in all.
        weigh: gives the log-weights ``(K, N)`` of K new particles for data; by
            :func:`~inference.particles.particles` where not given.
    """
    rows = draws_at_once(model, x, memory_bytes)
    per_chunk = max(1, min(num_particles, rows))
    data_per_chunk = max(1, min(rows // per_chunk, x.shape[0], 100))
    weigh = weigh or _weigher(model, guide, x)
    log_p, khat = [], []
    for start in range(0, x.shape[0], data_per_chunk):
        some = x[start : start + data_per_chunk]
        weights = []
        for done in range(0, num_particles, per_chunk):
            weights.append(weigh(some, min(per_chunk, num_particles - done)))
        log_weight = torch.cat(weights)  # (S, n)
        log_p.append(log_weight.logsumexp(0) - math.log(num_particles))
        if start < khat_data and num_particles > 1:
            khat.append(pareto_khat(log_weight[:, : khat_data - start].T.cpu().double().numpy()))
        on_progress(min(start + data_per_chunk, x.shape[0]), x.shape[0])
    return Evidence(torch.cat(log_p), np.concatenate(khat) if khat else np.empty(0))


def _weigher(model: Program, guide: Program, x: Tensor, engine: str = "eager") -> Callable[[Tensor, int], Tensor]:
    nesting = guess_max_plate_nesting(model, guide, x[:1])
    if engine == "compiled":
        from inference.weights import CompiledWeights

        return CompiledWeights(model, guide, nesting)
    return lambda x, k: particles(model, guide, x, k, max_plate_nesting=nesting).log_weight


def draws_at_once(model: Program, x: Tensor, memory_bytes: int | None = None) -> int:
    """How many draws, over particles and data, a chunk may score."""
    values = max(x[0].numel(), _values_per_draw(model))
    return max(1, (memory_bytes or chunk_bytes(x.device)) // (8 * values * x.element_size()))  # 8: activations a value


def _values_per_draw(model: Program) -> int:
    """Numbers that the model's parts say they compute to score one draw; 0 where they say nothing."""
    parts = model.modules() if isinstance(model, nn.Module) else ()
    return max((getattr(part, "values_per_draw", 0) for part in parts), default=0)


def pareto_khat(log_weights: np.ndarray) -> np.ndarray:
    """Pareto shape of the upper tail of each row of ``(N, S)`` log-weights (Vehtari et al. 2024); ``(N,)``.

    Above 0.7 the importance-sampled estimate is not to be trusted; below it need not be right either. NaN where a row
    has too few draws for a tail or all its weights are equal; infinite where almost all weight is on a few draws.
    """
    khat = np.full(log_weights.shape[0], np.nan)
    spread = np.ptp(log_weights, axis=1)
    has_tail = spread > 1e-12 * np.abs(log_weights).max(axis=1)  # equal but for rounding is equal
    if log_weights.shape[1] >= 25 and has_tail.any():
        with np.errstate(over="ignore"):  # where an overflow is what leads to the right limit
            khat[has_tail] = import_arviz().psislw(log_weights[has_tail])[1]
    return khat


def chunk_bytes(device: torch.device) -> int:
    """What one chunk of an evaluation may take: what keeps caches busy, and less only where memory is nearly full.

    Chunks decide in which order random numbers are drawn, so that their size must not follow every change in what is
    free, or the same seed would not give the same numbers.
    """
    if device.type == "cuda":
        return min(2**31, torch.cuda.mem_get_info(device)[0] // 4)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(2**27, max(free // 2, 2**22))


def held_out(source: Source, limit: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most ``limit`` data of a split (all for 0), in random order, their noise drawn once; with their indices.

    The order matters: some published test sets are sorted by class, and any first so many of these data are to be a
    fair sample.
    """
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    index = order[: limit or len(source)]
    return source.fixed(index), index


def repeated(x: Tensor, count: int) -> Tensor:
    """``count`` rows, those of ``x`` again and again: what a model that reads inputs off its data draws at."""
    return x[torch.arange(count, device=x.device) % len(x)]


def validation_scores(
    model: Program, guide: Program, x: Tensor, seed: int, surgery_data: int = 0, gap_particles: int = 0
) -> dict[str, float]:
    """What the training log says of the validation set, in nats per datum.

    Args:
        model: Pyro program.
        guide: Pyro program.
        x: validation data, ``(N, *event_shape)``, in random order.
        seed: of the random numbers used here.
        surgery_data: on how many of them to take the KL apart and count active units; 0 for none.
        gap_particles: importance samples per datum for KL(q(z|x) || p(z|x)) = log p(x) - ELBO; 0 for none. Estimated
            low on average, for so is log p(x). A guide without noise has no such divergence, and gets no entry.
    """
    with evaluating(model, guide, seed=seed):
        terms = [elbo_terms(model, guide, some) for some in x.split(draws_at_once(model, x))]
        reconstruction = float(torch.cat([t.reconstruction for t in terms]).mean())
        kl = float(torch.cat([t.kl for t in terms]).mean())
        point = is_a_point(model, guide, x)
        parts = best_surgery(model, guide, x[:surgery_data], x.shape[0], MOST_TRACKED) if surgery_data else None
        if parts is not None and parts.exact and parts.num_data == x.shape[0]:
            kl = parts.kl
        scores = {"valid/elbo": reconstruction - kl, "valid/reconstruction": reconstruction, "valid/kl": kl}
        if parts is not None:
            scores["valid/mutual_information"] = parts.mutual_information
            if not point:
                scores["valid/marginal_kl"] = kl - parts.mutual_information
            scores["valid/active_units"] = active_units(guide, x)
        if gap_particles and not is_certain(guide, x):
            log_p = log_evidence(model, guide, x, gap_particles).log_p
            scores["valid/kl_to_posterior"] = float(log_p.mean()) - scores["valid/elbo"]
    return scores


def evaluate(
    model: Program,
    guide: Program,
    x: Tensor,
    settings: EvaluationSettings,
    seed: int,
    log_levels: float = 0.0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], Evidence]:
    """Score held-out data.

    Args:
        model: Pyro program.
        guide: Pyro program.
        x: held-out data, ``(N, *event_shape)``.
        settings: how thoroughly.
        seed: of the random numbers used here.
        log_levels: log of the number of grey levels where ``x`` is a dequantized density of them, else 0; it turns a
            density in nats into bits of the discrete pixel.
        on_progress: called with the number of data done and in all.

    Returns:
        The ``test/...`` entries of ``summary.json`` in nats per datum, None what a guide without noise leaves unknown,
        and the evidence datum by datum.
    """
    with evaluating(model, guide, seed=seed):
        certain = is_certain(guide, x)  # then one draw tells all, and log p(x) is estimated by the bound itself
        elbo_samples, num_particles = (1, 1) if certain else (settings.elbo_samples, settings.particles)
        at_once = max(1, min(256, draws_at_once(model, x) // elbo_samples))
        terms = [elbo_terms(model, guide, some, elbo_samples) for some in x.split(at_once)]
        parts = best_surgery(model, guide, x[: settings.surgery_data], x.shape[0])
        units = active_units(guide, x)
        by_dimension = kl_per_dimension(model, guide, x[: settings.surgery_data])
        weigh = _weigher(model, guide, x, settings.engine)
        evidence = log_evidence(
            model, guide, x, num_particles, settings.khat_data, on_progress=on_progress, weigh=weigh
        )
        if point := is_a_point(model, guide, x):
            evidence = replace(evidence, log_p=torch.full_like(evidence.log_p, math.nan))
        codes = code_scores(guide, x)
        exact = _exact(model, x)
        words = _per_token(model, x, evidence)
    reconstruction = float(torch.cat([t.reconstruction for t in terms]).double().mean())
    kl, kl_estimator = float(torch.cat([t.kl for t in terms]).double().mean()), terms[0].kl_estimator
    if parts.exact and parts.num_data == x.shape[0]:
        kl, kl_estimator = parts.kl, kl_estimator if kl_estimator == "closed form" else parts.estimator
    nll = -evidence.log_p.double()
    dimensions = x[0].numel()
    summary = {
        "test/elbo": reconstruction - kl,
        "test/reconstruction": reconstruction,
        "test/kl": kl,
        "test/kl_estimator": kl_estimator,
        "test/kl_per_dimension": None if by_dimension is None else [round(v, 6) for v in by_dimension.tolist()],
        "test/mutual_information": parts.mutual_information,
        "test/mutual_information_upper": parts.upper,
        "test/marginal_kl": kl - parts.mutual_information,
        "test/mutual_information_estimator": parts.estimator,
        "test/surgery_data": parts.num_data,
        "test/active_units": units,
        "test/nll": float(nll.mean()),
        "test/nll_stderr": float(nll.std() / math.sqrt(len(nll))) if len(nll) > 1 else math.nan,
        "test/nll_particles": num_particles,
        "test/bits_per_dim": (float(nll.mean()) / dimensions + log_levels) / math.log(2),
        "test/khat_median": _median(evidence.khat),
        "test/data": x.shape[0],
        **exact,
        **codes,
        **({"test/code_prior_bits_per_image": kl / math.log(2)} if codes else {}),
        **words,
    }
    return unbounded(summary) if point else summary, evidence


def _exact(model: Program, x: Tensor) -> dict[str, float]:
    """-log p(x) of a model that has it in closed form: what the estimate is to be held against."""
    if not hasattr(model, "log_evidence"):
        return {}
    return {"test/nll_exact": -float(torch.cat([model.log_evidence(some) for some in x.split(256)]).double().mean())}


def _per_token(model: Program, x: Tensor, evidence: Evidence) -> dict[str, float]:
    """The code length of text by its tokens, the ends of lines among them; places after the end are none."""
    parts = model.modules() if isinstance(model, nn.Module) else ()
    count = next((part.token_counts for part in parts if hasattr(part, "token_counts")), None)
    if count is None:
        return {}
    tokens = int(count(x).sum())  # type: ignore[operator]
    nats = -float(evidence.log_p.double().sum()) / tokens
    perplexity = math.exp(nats) if nats < 700 else math.inf
    return {
        "test/nll_per_token": nats,
        "test/perplexity": perplexity,
        "test/tokens": tokens,
        "test/bits_per_dim": nats / math.log(2),
    }


def training_bound(model: Program, guide: Program, x: Tensor, settings: EvaluationSettings, seed: int) -> float:
    """The ELBO of training data ``(N, *event_shape)``, nats per datum, as :func:`evaluate` takes that of held-out data.

    How far it lies above is what model, guide and prior know of the training data alone.
    """
    with evaluating(model, guide, seed=seed):
        draws = 1 if is_certain(guide, x) else settings.elbo_samples
        at_once = max(1, min(256, draws_at_once(model, x) // draws))
        return float(
            torch.cat([elbo_terms(model, guide, some, draws).elbo for some in x.split(at_once)]).double().mean()
        )


def evidence_table(index: Tensor, evidence: Evidence) -> Table:
    """Datum by datum: its row in the split, log p(x) in nats, and its Pareto k-hat where that was computed."""
    khat = [*evidence.khat.tolist(), *[None] * (len(index) - len(evidence.khat))]
    log_p = [None if math.isnan(value) else value for value in evidence.log_p.tolist()]
    rows = zip(index.tolist(), log_p, khat, strict=True)
    return Table(("row", "log_p", "khat"), tuple(rows))


def _median(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]  # infinite ones are the worst of all, and count
    return float(np.median(known)) if known.size else None
