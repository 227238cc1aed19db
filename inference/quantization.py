"""The objective of vector-quantized models."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from inference.gradients import with_gradient
from inference.objectives import ELBO
from inference.particles import Particles, Program, StructureError
from models.codebook import Codebook
from models.vq import HardCodes


class VectorQuantization(ELBO):
    """The ELBO under hard codes; its gradient has the codebook and commitment losses (van den Oord et al. 2017, eq. 3).

    The value is log p(x|z_q) - KL, exact since the guide has one code for each place, with KL = H W log K under a
    uniform prior: a bound on log p(x). What is climbed is

        log p(x|z_q) + log p(z_q) - codebook_rate ||sg(z_e) - e||^2 - commitment ||z_e - sg(e)||^2,

    both losses summed over the grid. They are in the gradient alone: no bound contains them. The gradient of
    log p(x|z_q) is passed straight through to the encoder and leaves the codebook alone, so the field is that of no
    single loss. The two weights are independent: codebook_rate scales the gradient of the codes only, commitment that
    of the encoder only. A codebook of moving averages is brought up to date where a gradient is taken in training mode.

    The first is a learning rate: an optimizer that divides gradients by their size does not see it in them, and is told
    of it by :meth:`speeds`.

    Args:
        commitment: weight of what keeps the encoder's vectors at their codes; beta in the paper.
        codebook_rate: weight of what draws codes to their vectors: how much faster than all else they learn. Of a
            codebook of moving averages the decay is the rate, and a run with another one than 1 is refused.
        max_plate_nesting: see :class:`~inference.objectives.Objective`.
    """

    adds_losses = True  # the losses of the guide's own parts

    def __init__(
        self, commitment: float = 0.25, codebook_rate: float = 1.0, max_plate_nesting: int | None = None
    ) -> None:
        super().__init__(1, "analytic", max_plate_nesting)
        for name, value in (("commitment", commitment), ("codebook_rate", codebook_rate)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or above and finite, got {value}")
        self.commitment, self.codebook_rate = commitment, codebook_rate

    def speeds(self, programs: nn.Module) -> dict[nn.Parameter, float]:
        """The codebooks' parameters, with the factor that their gradients have for the sake of their step size.

        Raises:
            StructureError: a rate for codebooks that are no parameters.
        """
        books = [module for module in programs.modules() if isinstance(module, Codebook)]
        if self.codebook_rate != 1 and any(book.ema for book in books):
            raise StructureError(
                f"codebook_rate={self.codebook_rate:g} is for a codebook that learns by gradient, and this one is made "
                "of moving averages, whose rate is model.decay; leave it at 1, or use model.ema=false"
            )
        return {parameter: self.codebook_rate for book in books for parameter in book.parameters()}

    def estimate(self, model: Program, guide: Program, *args: Any, **kw: Any) -> tuple[Tensor, Particles]:
        """The bound, ``(N,)`` nats, with the gradient of the docstring; and the particle behind it."""
        draws = self.drawing(model, guide, *args, **kw)()
        quantized = [latent.q for latent in draws.latents.values() if isinstance(latent.q, HardCodes)]
        if not quantized:
            raise StructureError("the guide quantizes none of its latents; use guide=quantized, or objective=elbo")
        bound = surrogate = self.from_particles(draws)
        for q in quantized:
            losses = q.losses()
            surrogate = surrogate - self.codebook_rate * losses.codebook - self.commitment * losses.commitment
            if torch.is_grad_enabled():
                q.update_codebook()
        return with_gradient(bound, surrogate), draws
