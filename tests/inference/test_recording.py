"""What keeps a recording honest: nothing that it reads or counts may lie on another device than the recorded one.

Tensors on ``meta`` stand for a GPU's, those on the CPU for the host's.
"""

import copy
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pyro.optim
import pytest
import torch

from inference import backends
from inference.annealing import AnnealedELBO
from inference.backends import Recorded, copy_of, elsewhere
from inference.capture import CannotCapture, capture
from inference.compiled import CompiledSVI
from inference.engine import SVI
from inference.updates import Update
from tests.inference import test_recorded
from tests.inference.engines import batches, losses, vae_svi
from tests.inference.test_vectorized import GRIDS, check, train_alone, train_together

GPU = torch.device("meta")


def stepped(kind):
    """A parameter on the device, and its optimizer after three steps."""
    p = torch.nn.Parameter(torch.zeros(3, device=GPU))
    optim = pyro.optim.PyroOptim(kind, {"lr": 0.1})
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optim([p])
    return p, optim, optim.optim_objs[p].state[p]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RAdam, torch.optim.NAdam, torch.optim.RMSprop])
def test_steps_that_torch_counts_on_the_host_are_counted_there(kind):
    p, optim, state = stepped(kind)
    assert state["step"].device.type == "cpu"  # not in a recording's reach
    update = Update(optim, [p])
    assert not update.counters
    assert all(tensor.device == GPU for tensor in update.tensors)
    first = update.advance(0)
    assert int(state["step"]) == 4
    assert update.recount(1)
    assert update.advance(1) == [update.slots[0].rule.advance(update.slots[0].group, 5)]
    assert int(state["step"]) == 5
    assert kind is torch.optim.RMSprop or update.advance(2) != first


def test_a_number_on_the_host_is_brought_and_one_made_on_the_way_is_no_longer_looked_at():
    weight, x = torch.tensor(0.5), torch.ones(3, device=GPU)
    captured = capture(lambda x: [(x * weight + torch.tensor(2.0)).sum()], [x])
    places = elsewhere(captured, GPU)
    assert sorted((float(captured.tensors[i]), captured.held[i]) for i in places) == [(0.5, True), (2.0, False)]
    assert not elsewhere(captured._replace(tensors=[t.to(GPU) for t in captured.tensors]), GPU)


def test_noise_of_the_host_is_refused():
    captured = capture(lambda x: [x * torch.rand(())], [torch.ones(3, device=GPU)])
    with pytest.raises(CannotCapture, match=r"rand.* draws on cpu, and a recording is of meta alone"):
        elsewhere(captured, GPU)


def test_a_tensor_of_the_host_that_is_written_is_refused():
    count = torch.tensor(0.0)
    owner = SimpleNamespace(count=count)
    captured = capture(lambda x: [x * owner.count.add_(1)], [torch.ones(3, device=GPU)], [owner])
    with pytest.raises(CannotCapture, match="writes into a tensor on cpu"):
        elsewhere(captured, GPU)
    assert float(count) == 0


def test_copies_lie_as_the_tensors_do():
    """The compiled kernels expect the strides that they were made for."""
    gaps, wide = torch.randn(4, 10)[:, :5], torch.randn(4, 1).expand(4, 3)
    for tensor in (gaps, wide, torch.randn(3, 4).T, torch.tensor(1.0)):
        found = copy_of(tensor)
        assert torch.equal(found, tensor)
        assert found.stride() == tensor.stride()
    copied = copy_of(gaps)
    copied.zero_()
    assert gaps.all()  # the copy is written, and the tensor is not


@pytest.fixture
def recorder(monkeypatch):
    """What a recording calls of ``torch.cuda``, so that it runs on a CPU; the generators that it leaves behind."""
    left = []
    cuda = {
        **{name: lambda *args, **kw: nullcontext() for name in ("device", "stream", "graph")},
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "CUDAGraph": object,
        "get_rng_state": torch.get_rng_state,
        "current_device": lambda: 0,
        "default_generators": [SimpleNamespace(graphsafe_set_state=left.append)],
    }
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(backends.torch.random, "fork_rng", lambda devices: nullcontext())
    return left


def test_a_failed_recording_leaves_a_generator_that_draws(recorder):
    """CUDA's keeps on waiting for the end of the recording, so that it gets another state, where it was."""

    def fails(x):
        if x is not given:
            return [x.add_(1)]
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    given = torch.zeros(3)
    state = torch.get_rng_state()
    with pytest.raises(CannotCapture, match=r"cannot record it: operation not permitted when stream is capturing$"):
        Recorded(fails, [given])
    assert torch.equal(recorder[0].get_state(), state)
    assert not given.any()  # tuned on copies


def test_recording_trains_nothing(recorder):
    x = torch.zeros(4, 10)[:, :5]
    Recorded(lambda t: [t.add_(1)], [x])
    assert torch.equal(x, torch.ones(4, 5))  # once, as a stand-in records by running; tuned on copies


@pytest.fixture
def recorded(monkeypatch):
    """Steps are recorded, by the stand-in of the other tests."""
    for module in ("step", "vectorized"):
        monkeypatch.setattr(f"inference.{module}.is_recorded", lambda device: True)
        monkeypatch.setattr(f"inference.{module}.Recorded", test_recorded.StandIn)


def test_a_weight_on_the_host_reaches_every_replay(monkeypatch, recorded):
    """All that the graph reads beside parameters is taken to lie elsewhere: the annealed weight does."""

    def all_but_parameters(captured, device):
        return [i for i, tensor in enumerate(captured.tensors) if not tensor.requires_grad]

    monkeypatch.setattr("inference.step.elsewhere", all_but_parameters)
    xs = batches(6)
    expected = losses(vae_svi(SVI, AnnealedELBO(warmup=0.8)), xs)
    svi = vae_svi(partial(CompiledSVI, inductor=False), AnnealedELBO(warmup=0.8))
    torch.testing.assert_close(losses(svi, xs), expected, rtol=1e-10, atol=0)
    (step,) = svi._graphs.values()
    assert any(step.captured.held[i] for i in step._elsewhere)
    still = copy.copy(step.captured.held)
    step.captured.held[:] = [False] * len(still)  # no longer looked at: the test would notice
    assert not torch.allclose(losses(svi, xs), losses(vae_svi(SVI, AnnealedELBO(warmup=0.8)), xs), rtol=1e-6)


def test_runs_together_in_a_recording_that_is_not_mapped(monkeypatch, recorded):
    """Copies on which a recording is tuned are all that the tuning writes."""

    class Tuned(test_recorded.StandIn):
        def __init__(self, function, inputs):
            with torch.no_grad():
                function(*[copy_of(tensor) for tensor in inputs])
            super().__init__(function, inputs)

    monkeypatch.setattr("inference.vectorized.Recorded", Tuned)
    xs, runs = batches(5), GRIDS["seed"]
    check(*train_together(runs, xs, mapped=False), *train_alone(runs, xs))
