"""Several steps in one function are as many single steps: noise, schedules, other batch sizes and resume included."""

from functools import partial

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro.nn import PyroModule

from inference.annealing import AnnealedELBO
from inference.backends import is_written
from inference.capture import capture
from inference.checkpoint import rng_state, set_rng_state
from inference.compiled import CompiledSVI
from inference.engine import SVI
from inference.objectives import ELBO
from inference.particles import validation
from tests.inference.engines import PIXELS, batches, losses, pair, parameters, shared, vae_svi
from tests.inference.test_compiled import RATES, Model, Weighted

three = partial(CompiledSVI, inductor=False, steps_per_call=3)


def in_calls(svi, xs, seed=1, rates=None, total=None, done=0):
    """As :func:`tests.inference.engines.losses`, by :meth:`CompiledSVI.steps`."""

    def before(i):
        if rates is not None:
            svi.optim.set_learning_rate(rates[done + i])
        svi.at((done + i) / (total or len(xs)))

    if seed is not None:
        torch.manual_seed(seed)
    with validation(False):
        return svi.steps(xs, before)


@pytest.mark.parametrize(
    ("inductor", "dtype", "tolerance"), [(True, torch.float32, 1e-5), (False, torch.float64, 1e-10)]
)
def test_calls_follow_single_eager_steps(inductor, dtype, tolerance):
    """Fresh noise, annealed weight, changing rate, clipping and a smaller last batch; one graph for all full calls."""
    torch.set_default_dtype(dtype)
    xs, rates = [*batches(9), *batches(2, last=3)], RATES * 2
    eager = vae_svi(SVI, AnnealedELBO(warmup=0.8), clip=0.5)
    several = vae_svi(partial(CompiledSVI, inductor=inductor, steps_per_call=3), AnnealedELBO(warmup=0.8), clip=0.5)
    expected = losses(eager, xs, rates=rates)
    found = in_calls(several, xs, rates=rates)
    assert several.why_eager is None
    assert sorted(key[-1] for key in several._graphs) == [1, 1, 3]  # the rest of the first call, the last two batches
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(parameters(several), parameters(eager), rtol=tolerance, atol=tolerance)
    assert float(several.objective.kl_weight) == float(eager.objective.kl_weight)
    constant = losses(vae_svi(SVI, AnnealedELBO(warmup=0.8), clip=0.5), xs, rates=[rates[0]] * len(xs))
    assert (constant / expected - 1).abs().max() > 100 * tolerance


def test_a_call_resumes_exactly():
    xs = batches(12)
    whole = vae_svi(three, ELBO())
    in_calls(whole, xs[:6])
    programs = [{k: t.clone() for k, t in p.state_dict().items()} for p in (whole.model, whole.guide)]
    kept = {name: tensor.clone() for name, tensor in whole.optim.tensors().items()}
    noise = rng_state()
    rest = in_calls(whole, xs[6:], seed=None)
    for svi in (vae_svi(three, ELBO(), seed=5), whole):  # another object, and the same one taken back
        for program, state in zip((svi.model, svi.guide), programs, strict=True):
            program.load_state_dict(state)
        svi.optim.load_tensors({name: tensor.clone() for name, tensor in kept.items()})
        set_rng_state(noise)
        assert torch.equal(in_calls(svi, xs[6:], seed=None), rest)
    assert not torch.equal(in_calls(whole, xs[6:], seed=None), rest)


def test_numbers_that_change_within_a_call_are_never_stale():
    xs = batches(6)
    svi = vae_svi(three, Weighted())
    torch.testing.assert_close(in_calls(svi, xs), losses(vae_svi(SVI, Weighted()), xs), rtol=1e-10, atol=0)
    assert all(key[-1] == 1 for key in svi._graphs)


def test_state_written_by_a_step_is_seen_by_the_next():
    def count(model, z):
        model.seen.add_(1)
        return 0.01 * model.seen

    found = []
    for kind in (SVI, three):
        torch.manual_seed(0)
        model, guide = Model(count), pair()[1]
        svi = kind(model, guide, shared(model, guide), ELBO(max_plate_nesting=1))
        found.append((losses if kind is SVI else in_calls)(svi, batches(9)))
        assert getattr(svi, "why_eager", None) is None
        assert float(model.seen) == 9
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=0)


def test_what_cannot_be_captured_steps_one_by_one():
    svi = vae_svi(three, pyro.infer.TraceGraph_ELBO())
    expected = losses(vae_svi(SVI, pyro.infer.TraceGraph_ELBO()), batches(4))
    assert torch.equal(in_calls(svi, batches(4)), expected)
    assert "takes gradients in its own" in svi.why_eager


def test_at_least_one_step_per_call():
    with pytest.raises(ValueError, match="steps_per_call must be at least 1, got 0"):
        vae_svi(partial(CompiledSVI, steps_per_call=0), ELBO())


class Averaging(PyroModule):
    """A model that keeps a running mean of its draws in a part of a small buffer, and predicts by it."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, PIXELS)
        self.register_buffer("kept", torch.zeros(4))

    def forward(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            with torch.no_grad():
                self.kept[1:3].mul_(0.9).add_(z.detach().mean())
            pyro.sample("x", dist.Bernoulli(logits=self.net(z) + self.kept.sum()).to_event(1), obs=x)


def test_what_a_step_writes_through_a_view_the_next_one_reads():
    """It is not taken for a weight that somebody sets before each step."""

    def built(kind):
        _, guide = pair()
        model = Averaging()
        return kind(model, guide, shared(model, guide), ELBO())

    xs = batches(9)
    eager, several = built(SVI), built(three)
    expected = losses(eager, xs)
    torch.testing.assert_close(in_calls(several, xs), expected, rtol=1e-10, atol=0)
    assert any(key[-1] == 3 for key in several._graphs)
    torch.testing.assert_close(several.model.kept, eager.model.kept, rtol=1e-10, atol=0)
    assert (eager.model.kept[1:3] != 0).all()


def test_what_is_only_read_is_not_taken_for_written():
    kept, weight, whole = torch.zeros(3), torch.ones(3), torch.zeros(4, 3)

    def function(x):
        kept.add_(weight)
        whole.split(2)[1].copy_(x)
        return [kept * x]

    captured = capture(function, [torch.ones(2, 3)])
    nodes = [node for node in captured.graph.graph.nodes if node.op == "placeholder"]
    written = {id(tensor): is_written(node) for tensor, node in zip(captured.tensors, nodes, strict=False)}
    assert written == {id(kept): True, id(weight): False, id(whole): True}
