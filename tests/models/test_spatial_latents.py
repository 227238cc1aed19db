"""Latents on a grid of places: their divergence is the sum over all entries, and a draw has their shape."""

from functools import partial

import pytest
import torch

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference.diagnostics import elbo_terms
from inference.particles import generate, particles
from models.latent import LatentVariableModel
from models.likelihoods import Bernoulli
from models.nets import ConvDecoder, ConvEncoder
from models.priors import StandardNormal
from tests.oracles import diagonal_kl

LATENT, IMAGE = (3, 2, 2), (1, 8, 8)  # J channels at X x Y places


@pytest.mark.row("3.9")
def test_the_divergence_is_summed_over_places_and_channels():
    model = LatentVariableModel(StandardNormal(LATENT), Bernoulli(IMAGE, LATENT, partial(ConvDecoder, channels=(4,))))
    guide = Amortized(DiagonalNormal(LATENT, IMAGE, partial(ConvEncoder, channels=(4,))))
    x = torch.randint(2, (5, *IMAGE)).to(torch.get_default_dtype())
    latents, _, drawn = generate(model, x)
    assert latents["z"].shape == (5, *LATENT)
    assert drawn.shape == x.shape
    q = guide.core(x).base_dist
    loc, scale = (value.detach().flatten(1).numpy() for value in (q.loc, q.scale))  # (N, J X Y)
    by_hand = [diagonal_kl(*row) for row in zip(loc, scale, strict=True)]
    draws = particles(model, guide, x, 3)
    assert draws.latents["z"].value.shape == (3, 5, *LATENT)
    assert torch.allclose(draws.analytic_kl(), torch.tensor(by_hand).expand(3, 5), atol=1e-12)
    assert torch.allclose(elbo_terms(model, guide, x).kl, torch.tensor(by_hand), atol=1e-12)
    assert diagonal_kl(loc[0, ::4], scale[0, ::4]) < 0.9 * by_hand[0]  # of one place alone
