"""Graphs written otherwise compute the same."""

import pyro.distributions as dist
import pytest
import torch
from torch.nn import functional as F

from inference import products
from inference.backends import retraced
from inference.fusions import fuse_bernoulli, log_bernoulli


@pytest.mark.parametrize("size", [1, 7, 48, 97, 784, 3072])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_log_bernoulli_is_that_of_the_distribution(size, dtype, tolerance):
    """Far logits too, where one factor is 1 and the product of 64 would overflow were the factors not below 2."""
    logits = 40 * torch.randn(5, 3, size).to(dtype).pow(3)
    logits[0] = torch.linspace(-1e-3, 1e-3, size)  # every factor close to 2
    x = torch.randint(0, 2, (3, size)).to(dtype).expand(5, 3, size)
    exact = dist.Bernoulli(logits=logits.double()).log_prob(x.double()).sum(-1)
    found = log_bernoulli(logits, x, [5, 3, size])
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=size * tolerance)
    assert (log_bernoulli(-logits, x, [5, 3, size]).double() - exact).abs().max() > 1e-3


def test_sums_of_log_probabilities_are_found_and_others_left():
    logits, x = torch.randn(4, 2, 6), torch.randint(0, 2, (2, 6)).double().expand(4, 2, 6)

    def score(logits, x):
        loss = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
        return (-loss).reshape(4, 2, -1).sum(-1), (-F.binary_cross_entropy_with_logits(logits, x)).sum()

    def looked_at(logits, x):
        each = -F.binary_cross_entropy_with_logits(logits, x, reduction="none")
        return each.sum(-1), each

    graph = retraced(score, (logits, x))
    assert fuse_bernoulli(graph) == 1
    torch.testing.assert_close(tuple(graph(logits, x)), score(logits, x), rtol=1e-13, atol=0)
    assert fuse_bernoulli(retraced(looked_at, (logits, x))) == 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_products_take_bias_and_tangent_along(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "MIN_FLOP", 0)
    a, w, bias = (torch.randn(*shape, dtype=torch.float32) for shape in ((6, 5), (5, 4), (4,)))
    batch, others = (torch.randn(*shape, dtype=torch.float32) for shape in ((3, 6, 5), (3, 5, 4)))

    def function(a, w, bias, batch, others):
        alone = torch.addmm(bias, a, w).view(2, 3, 4).tanh()
        linear = torch.addmm(bias, a, w)
        return alone, linear, linear.tanh(), torch.bmm(batch, others), torch.baddbmm(bias, batch, others)

    inputs = (a, w, bias, batch, others)
    graph = retraced(function, inputs)
    assert products.use_faster_products(graph) == 4
    tangents = [node for node in graph.graph.nodes if node.target is torch.ops.aten.tanh.default]
    assert len(tangents) == 1  # of the product that others look at as well
    exact = function(*[tensor.double() for tensor in inputs])
    for found, expected in zip(graph(*inputs), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
