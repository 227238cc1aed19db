"""Importance weights as one compiled function: what scoring held-out data spends its time on."""

import logging

import torch
from torch import Tensor

from inference.backends import Function, compiled, retraced
from inference.capture import CannotCapture, capture
from inference.particles import Program, particles

log = logging.getLogger(__name__)


class CompiledWeights:
    """Draws particles and weighs them, ``(x, K) -> (K, N)`` nats, with everything but the products of matrices fused.

    Compiled for the first size of data and particles that comes and has at least ``threshold`` of them; other sizes,
    such as the last of several chunks, run eagerly, which gives the same numbers to rounding. Gradients do not flow.

    Args:
        model: Pyro program.
        guide: Pyro program, the proposal.
        max_plate_nesting: number of nested plates in the programs.
        threshold: data times particles below which compiling is not worth its seconds.
    """

    def __init__(self, model: Program, guide: Program, max_plate_nesting: int = 1, threshold: int = 1000) -> None:
        self.model, self.guide, self.nesting, self.threshold = model, guide, max_plate_nesting, threshold
        self.why_eager: str | None = None
        self._size: tuple[torch.Size, int] | None = None
        self._function: Function | None = None
        self._read: list[Tensor] = []

    def __call__(self, x: Tensor, num_particles: int) -> Tensor:
        size = (x.shape, num_particles)
        if self._size is None and x.shape[0] * num_particles >= self.threshold:
            self._compile(x, num_particles)
            self._size = size
        if self._function is None or size != self._size:
            return self._eager(x, num_particles)
        with torch.no_grad():
            return self._function(*self._read, x.contiguous())[0]

    def _eager(self, x: Tensor, num_particles: int) -> Tensor:
        return particles(self.model, self.guide, x, num_particles, max_plate_nesting=self.nesting).log_weight

    def _compile(self, x: Tensor, num_particles: int) -> None:
        x = x.contiguous()
        try:
            with torch.no_grad():
                captured = capture(lambda x: [self._eager(x, num_particles)], [x], [self.model, self.guide])
            inputs = [*captured.tensors, x]
            self._function = compiled(retraced(captured.graph, inputs), inputs)
            self._read = captured.tensors
        except CannotCapture as error:
            self.why_eager = " ".join(str(error).split())
            log.warning("importance weights are computed eagerly: %s", self.why_eager)
