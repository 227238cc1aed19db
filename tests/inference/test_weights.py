"""Compiled importance weights are those of Pyro's traces."""

import logging
import os
import subprocess
import sys
from pathlib import Path

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
    assert weigh._function is not None
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


@pytest.mark.parametrize(("samples", "data"), [(30, 5), (60, 5), (30, 10)])
def test_cost_is_linear_in_samples_and_data(samples, data):
    """Each sample of each datum is drawn once, in chunks of one size: twice the samples or data are twice the work."""
    (model, guide), x = pair(), batches(1, last=data)[0]
    drawn = []

    def weigh(some, k):
        drawn.append(k * len(some))
        return torch.zeros(k, len(some))

    log_evidence(model, guide, x, samples, memory_bytes=8 * 6 * 8 * 15, weigh=weigh)
    assert sum(drawn) == samples * data
    assert set(drawn) == {15}


_PEAK = """
import torch
from pathlib import Path
from functools import partial
from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference.evaluate import evaluating, log_evidence
from inference.weights import CompiledWeights
from models.latent import LatentVariableModel
from models.likelihoods import Bernoulli
from models.nets import MLP
from models.priors import StandardNormal

def peak():
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l) / 1024

torch.set_num_threads(1)
net = partial(MLP, hidden=(50,))
model = LatentVariableModel(StandardNormal((5,)), Bernoulli((784,), (5,), net))
guide = Amortized(DiagonalNormal((5,), (784,), net))
weigh, x = CompiledWeights(model, guide, threshold=1), (torch.rand(40, 784) < 0.2).float()
with evaluating(model, guide, seed=0):
    log_evidence(model, guide, x[:3], 5000, memory_bytes=2**24, weigh=weigh)
    before = peak()
    log_evidence(model, guide, x, 20_000, memory_bytes=2**24, weigh=weigh)
    assert weigh._function is not None
    print(peak() - before)
    kept = torch.ones(40_000, 784)  # what it would have taken at least, for 2 of 40 images
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="a system that does not tell the peak memory")
def test_peak_memory_grows_neither_with_samples_nor_with_data():
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    found = subprocess.run([sys.executable, "-c", _PEAK], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    grown, deliberate = (float(line) for line in found.stdout.split())
    assert grown < 64  # MiB; all draws of all data would take 2,400
    assert deliberate > 100
