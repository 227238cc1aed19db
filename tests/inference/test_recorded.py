"""What a CUDA graph demands of a step, as far as a CPU can show it: the same tensors at every replay.

A stand-in for the recorded graph keeps the tensors of the recording, as a real one does, and reads no others.
"""

from functools import partial

import pytest
import torch

from inference.annealing import AnnealedELBO
from inference.compiled import CompiledSVI
from inference.engine import SVI
from tests.inference.engines import batches, losses, parameters, vae_svi
from tests.inference.test_compiled import RATES
from tests.inference.test_several_steps import in_calls
from tests.inference.test_vectorized import GRIDS, check, train_alone, train_together


class StandIn:
    """Replays a function on the memory that its inputs had when it was recorded."""

    replays = 0

    def __init__(self, function, inputs):
        self.function, self.inputs = function, [tensor.detach() for tensor in inputs]

    def __call__(self):
        StandIn.replays += 1
        with torch.no_grad():
            return [output.clone() for output in self.function(*self.inputs)]


@pytest.fixture(autouse=True)
def _record(monkeypatch):
    StandIn.replays = 0
    for module in ("step", "vectorized"):
        monkeypatch.setattr(f"inference.{module}.is_recorded", lambda device: True)
        monkeypatch.setattr(f"inference.{module}.Recorded", StandIn)


def test_everything_that_changes_reaches_the_recording():
    """Batches, noise, learning rate, annealed weight and the optimizer's state."""
    xs = batches(6)
    eager = vae_svi(SVI, AnnealedELBO(warmup=0.8), clip=0.5)
    recorded = vae_svi(partial(CompiledSVI, inductor=False), AnnealedELBO(warmup=0.8), clip=0.5)
    expected = losses(eager, xs, rates=RATES)
    torch.testing.assert_close(losses(recorded, xs, rates=RATES), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(parameters(recorded), parameters(eager), rtol=1e-10, atol=1e-12)
    assert StandIn.replays == 5  # all but the first step


def test_several_steps_in_one_recording():
    xs, rates = batches(9), RATES * 2
    recorded = vae_svi(partial(CompiledSVI, inductor=False, steps_per_call=3), AnnealedELBO(warmup=0.8))
    expected = losses(vae_svi(SVI, AnnealedELBO(warmup=0.8)), xs, rates=rates)
    torch.testing.assert_close(in_calls(recorded, xs, rates=rates), expected, rtol=1e-10, atol=0)
    assert StandIn.replays == 4  # two single steps of the first call, two calls of three


def test_a_loaded_checkpoint_is_recorded_anew():
    xs = batches(6)
    recorded = vae_svi(partial(CompiledSVI, inductor=False), AnnealedELBO())
    losses(recorded, xs)
    kept = {name: tensor.clone() for name, tensor in recorded.optim.tensors().items()}
    programs = [{k: t.clone() for k, t in p.state_dict().items()} for p in (recorded.model, recorded.guide)]
    expected = losses(recorded, xs, seed=3)
    for program, state in zip((recorded.model, recorded.guide), programs, strict=True):
        program.load_state_dict(state)
    recorded.optim.load_tensors(kept)
    assert torch.equal(losses(recorded, xs, seed=3), expected)


@pytest.mark.parametrize("grid", ["seed", "annealed weight", "temperature"])
def test_runs_together_in_one_recording(grid):
    xs = batches(5)
    together, found = train_together(GRIDS[grid], xs)
    check(together, found, *train_alone(GRIDS[grid], xs))
    assert StandIn.replays == 4
