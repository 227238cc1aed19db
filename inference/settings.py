"""What is configured beside the parts: settings, each checked where it is defined."""

import math
from dataclasses import dataclass, field

from inference.evaluate import EvaluationSettings
from inference.schedules import SCHEDULES

MAX_THREADS = 1024  # torch takes any number and dies of too many


@dataclass
class TrainerSettings:
    """How long and how to train.

    Args:
        epochs: passes over the training data.
        steps: number of optimization steps, if not told in epochs; without either, 15,000.
        learning_rate: step size at the start.
        schedule: how it changes: constant, linear, cosine or burda.
        gradient_clip: largest gradient norm per datum; 0 for no limit.
        log_every: steps between rows of the log, each of which waits once for the device.
        validations: how many times the validation set is scored over the run.
        surgery_data: validation data on which each scoring takes the KL apart (``valid/mutual_information``,
            ``valid/marginal_kl``) and counts ``valid/active_units``; its cost is quadratic in them; 0 for none.
        gap_particles: importance samples per datum with which each scoring estimates ``valid/kl_to_posterior``; 0 for
            none.
        checkpoint_seconds: seconds between checkpoints.
        engine: eager, or compiled: the same numbers to rounding, faster steps after some seconds of compiling.
        steps_per_call: steps that the compiled engine takes in one call: less time goes by between them.
    """

    epochs: int = 0
    steps: int = 0
    learning_rate: float = 1e-3
    schedule: str = "constant"
    gradient_clip: float = 0.0
    log_every: int = 50
    validations: int = 20
    surgery_data: int = 0
    gap_particles: int = 0
    checkpoint_seconds: float = 20.0
    engine: str = "eager"
    steps_per_call: int = 1

    def __post_init__(self) -> None:
        if self.steps_per_call < 1 or (self.steps_per_call > 1 and self.engine != "compiled"):
            raise ValueError(
                f"trainer.steps_per_call: {self.steps_per_call} with trainer.engine={self.engine}; accepted: 1, or "
                "more with trainer.engine=compiled"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"trainer.schedule: {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if self.engine not in ("eager", "compiled"):
            raise ValueError(f"trainer.engine: {self.engine!r} is neither eager nor compiled")
        for name in ("log_every", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"trainer.{name}: {getattr(self, name)} is not above 0")
        for name in ("epochs", "steps", "gradient_clip", "validations", "surgery_data", "gap_particles",
                     "checkpoint_seconds"):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ValueError(f"trainer.{name}: {getattr(self, name)} is not 0 or above")
        if self.epochs and self.steps:
            raise ValueError(
                f"trainer.epochs={self.epochs} and trainer.steps={self.steps} contradict: give one of them"
            )
        if not math.isfinite(self.learning_rate):
            raise ValueError(f"trainer.learning_rate: {self.learning_rate} is not finite")


@dataclass
class Batching:
    """How data reach the device.

    Args:
        batch_size: data in a batch.
        limit: training data used, chosen at random once for all seeds; 0 for all.
        resident: whether all raw rows lie on the device: auto, yes or no.
        workers: processes that read ahead when they do not.
    """

    batch_size: int = 100
    limit: int = 0
    resident: str = "auto"
    workers: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size: {self.batch_size} is below 1")
        if self.limit < 0:
            raise ValueError(f"data.limit: {self.limit} is below 0; 0 takes all training data")
        if self.workers < 0:
            raise ValueError(f"data.workers: {self.workers} is below 0; 0 reads in the training's own process")
        if self.resident not in ("auto", "yes", "no"):
            raise ValueError(f"data.resident: {self.resident!r} is not one of auto, yes, no")


@dataclass
class RunSettings:
    """Where a run is kept, and where it comes from.

    Args:
        dir: its folder, by default a new one under ``runs/``.
        start: the folder of a finished run whose parameters it starts from, where names and shapes agree.
    """

    dir: str | None = None
    start: str | None = None


@dataclass
class Root:
    """What is configured beside the parts.

    Args:
        seed: of initial values, batches, noise and evaluation.
        device: auto (a GPU where there is one), cpu, cuda or cuda:1.
        threads: of the CPU; one is fastest for small nets and for several runs at a time; 0 leaves it to torch.
    """

    seed: int = 0
    device: str = "auto"
    threads: int = 1
    run: RunSettings = field(default_factory=RunSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    batching: Batching = field(default_factory=Batching)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: {self.seed} is not between 0 and 2^63 - 1")
        if not 0 <= self.threads <= MAX_THREADS:
            raise ValueError(f"threads: {self.threads} is not between 0, which leaves it to torch, and {MAX_THREADS}")
