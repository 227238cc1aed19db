"""What only a GPU can show; skipped without one."""

import pytest
import torch

from inference.assemble import assemble, start_from_data
from inference.config import load
from inference.data import Batches
from inference.objectives import ELBO
from tests.programs import Frozen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


class FrozenGuide(torch.nn.Module):
    """The guide with its noise held fixed, the same on every device."""

    def __init__(self, guide, noise):
        super().__init__()
        self.guide, self.noise = guide, noise

    def forward(self, x):
        import pyro

        q = self.guide.core(x).base_dist
        with pyro.plate("data", x.shape[0], dim=-1):
            return pyro.sample("z", Frozen(q.loc, q.scale.log(), self.noise.to(x)).to_event(1))


@pytest.mark.row("5.1")
def test_losses_agree_with_the_cpu_at_frozen_noise():
    torch.set_default_dtype(torch.float32)
    noise = torch.randn(100, 20)
    losses = {}
    for device in ("cpu", "cuda"):
        setup = assemble(load([f"device={device}"]))
        start_from_data(setup)
        x = setup.source("train").fixed(torch.arange(100))
        losses[device] = float(ELBO().loss(setup.model, FrozenGuide(setup.guide, noise), x)) / 100
    assert losses["cpu"] == pytest.approx(losses["cuda"], abs=1e-4)


def test_a_step_never_waits_for_the_device():
    torch.set_default_dtype(torch.float32)
    from inference.engine import SVI, SharedOptimizer

    setup = assemble(load(["device=cuda", "objective=elbo"]))
    parameters = [*setup.model.parameters(), *setup.guide.parameters()]
    optimizer = SharedOptimizer(parameters, setup.config.factory("optimizer"), 1e-3)
    svi = SVI(setup.model, setup.guide, optimizer, setup.objective)
    batches = iter(Batches(setup.source("train"), 100))
    svi.step(next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            svi.step(next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
