"""A decoder that cannot hear its latents: what a collapsed model is worth, in closed form."""

from functools import partial

import pytest
import torch

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference.diagnostics import elbo_terms, surgery
from inference.engine import SVI, SharedOptimizer
from inference.objectives import ELBO
from models.latent import LatentVariableModel
from models.likelihoods import Bernoulli
from models.nets import MLP, Linear
from models.priors import StandardNormal


@pytest.mark.row("1.23")
def test_a_deaf_decoder_is_worth_the_entropies_of_its_pixels():
    x = torch.bernoulli(torch.linspace(0.1, 0.9, 6).expand(300, 6))
    model = LatentVariableModel(StandardNormal((2,)), Bernoulli((6,), (2,), Linear))
    guide = Amortized(DiagonalNormal((2,), (6,), partial(MLP, hidden=(8,))))
    net, mean = model.likelihood.net, x.mean(0)
    entropy = float(-(torch.xlogy(mean, mean) + torch.xlogy(1 - mean, 1 - mean)).sum())
    with torch.no_grad():
        net.output.weight.zero_()
        before = elbo_terms(model, guide, x)
        assert float(before.kl.mean()) > 0.01
        assert -float(before.elbo.mean()) > entropy + 0.05
    moving = [net.output.bias, *guide.parameters()]
    optimizer = SharedOptimizer(moving, lambda p, lr: torch.optim.Adam(p, lr=lr), 0.02)
    svi = SVI(model, guide, optimizer, ELBO(kl="analytic"))
    for _ in range(500):
        svi.step(x)
    with torch.no_grad():
        after = elbo_terms(model, guide, x)
        assert model.likelihood(torch.randn(500, 2)).base_dist.probs.var(0).max() < 1e-6
    assert float(after.kl.mean()) < 1e-4
    assert surgery(model, guide, x).mutual_information < 1e-2
    assert -float(after.elbo.mean()) == pytest.approx(entropy, abs=1e-3)
