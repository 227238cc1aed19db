"""An encoder whose answer is improved on for each datum."""

import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor

from guides.gaussian import DiagonalNormal
from guides.refinement import JointDensity, check_steps, refine
from models.conditional import Conditional, NetFactory


class SemiAmortized(Conditional):
    """A diagonal normal from an encoder, then a few steps of ascent on the datum's own ELBO (Kim et al. 2018).

    The steps use no random numbers, so that q(z|x) is a function of the datum, except while a decoder with dropout is
    trained, which has its own. Each costs a decoder's forward and
    backward pass for S latents, S the smallest power of two above the number of latents.

    Args:
        model: p(x, z), made of a prior and a likelihood; referred to and not owned.
        net: builds the encoder.
        steps: number of steps.
        step_size: the fraction of the way to the optimum that a step takes; see :func:`guides.refinement.refine`.
        unroll: differentiate through the steps. Otherwise their sum counts as a constant that is added to the
            encoder's output, which is cheaper and biased.
    """

    def __init__(
        self, model: PyroModule, net: NetFactory, steps: int = 3, step_size: float = 0.3, unroll: bool = True
    ) -> None:
        check_steps(steps, step_size)
        joint = JointDensity(model, "SemiAmortized")
        super().__init__(joint.event_shape, joint.context_shape)
        self.start = DiagonalNormal(self.event_shape, self.context_shape, net)
        self.steps, self.step_size, self.unroll = steps, step_size, unroll
        object.__setattr__(self, "joint", joint)  # holds the model, which is not a submodule

    def forward(self, *context: Tensor) -> dist.Distribution:
        (x,) = context
        q = self.start(x).base_dist
        before = q.loc, q.scale.log()
        loc, log_scale = refine(self.joint.of(x), *before, self.steps, self.step_size, self.unroll)
        if not self.unroll:
            loc, log_scale = before[0] + (loc - before[0]).detach(), before[1] + (log_scale - before[1]).detach()
        return dist.Normal(loc, log_scale.exp()).to_event(1)
