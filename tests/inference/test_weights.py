"""Compiled importance weights are those of Pyro's traces."""

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from inference.evaluate import evaluating, log_evidence
from inference.weights import CompiledWeights
from tests.inference.engines import batches, pair


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_weights_equal_a_loop_over_traces(dtype, tolerance):
    torch.set_default_dtype(dtype)
    (model, guide), x = pair(), batches(1)[0]
    weigh = CompiledWeights(model, guide, threshold=1)
    with evaluating(model, guide, seed=3):
        found = weigh(x, 50)
    assert weigh.why_eager is None
    loop = []
    with evaluating(model, guide, seed=3):
        eps = torch.randn(50, len(x), 2)
        loc, scale = guide.core(x).base_dist.loc, guide.core(x).base_dist.scale
        for z in loc + scale * eps:
            held = poutine.condition(guide, data={"z": z})
            guide_trace = poutine.trace(held).get_trace(x)
            model_trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(x)
            guide_trace.compute_log_prob()
            model_trace.compute_log_prob()
            log_p = sum(model_trace.nodes[name]["log_prob"] for name in ("x", "z"))
            loop.append(log_p - guide_trace.nodes["z"]["log_prob"])
    expected = torch.stack(loop)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    assert (found.roll(1, 0) - expected).abs().min() > 10 * tolerance


def test_other_chunks_are_weighed_eagerly_with_the_same_numbers():
    (model, guide), x = pair(), batches(1, last=5)[0]
    weigh = CompiledWeights(model, guide, threshold=1)
    numbers = {}
    for name, by in (("eager", None), ("compiled", weigh)):
        with evaluating(model, guide, seed=0):
            numbers[name] = log_evidence(model, guide, x, 30, memory_bytes=8 * 6 * 8 * 20, weigh=by).log_p
    torch.testing.assert_close(numbers["compiled"], numbers["eager"], rtol=1e-12, atol=0)


def test_parameters_are_read_anew():
    (model, guide), x = pair(), batches(1)[0]
    weigh = CompiledWeights(model, guide, threshold=1)
    with evaluating(model, guide, seed=0):
        first = weigh(x, 4)
        for parameter in guide.parameters():
            parameter.mul_(0.5)
    with evaluating(model, guide, seed=0):
        second = weigh(x, 4)
    with evaluating(model, guide, seed=0):
        torch.testing.assert_close(second, CompiledWeights(model, guide)(x, 4), rtol=1e-12, atol=0)
    assert not torch.allclose(first, second)


def test_what_cannot_be_captured_is_weighed_eagerly(caplog):
    (model, guide), x = pair(), batches(1)[0]

    def restless(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0 + float(x.sum() > 0)).to_event(1))

    weigh = CompiledWeights(model, restless, threshold=1)
    with caplog.at_level(logging.WARNING, "inference"), evaluating(model, guide, seed=0):
        assert torch.isfinite(weigh(x, 3)).all()
        weigh(x, 3)
    assert "on the host" in weigh.why_eager
    assert len([record for record in caplog.records if record.name == "inference.weights"]) == 1
