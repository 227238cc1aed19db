"""Pictures of priors: what their numbers are, for every prior, bits and one-hots."""

import math

import numpy as np
import pytest
import torch

from inference.assemble import assemble, start_from_data
from inference.config import load
from inference.figures import draw
from inference.pictures import gallery
from inference.prior_figures import Density, code_usage, is_binary

SMALL = ["encoder.hidden=[8]", "decoder.hidden=[8]"]


def test_contours_of_a_grid_hold_what_they_say():
    across = np.linspace(-6, 6, 401)
    one = np.exp(-(across**2) / 2) / math.sqrt(2 * math.pi)
    density = Density(across, across, np.outer(one, one))
    assert density.mass == pytest.approx(1, abs=1e-6)
    for share in (0.5, 0.9):  # the disc of radius r holds 1 - exp(-r^2/2), so that the density on its rim is known
        assert density.level(share) == pytest.approx((1 - share) / (2 * math.pi), rel=0.01)


@pytest.mark.parametrize("prior", ["standard", "mixture", "vamp", "realnvp", "maf", "iaf", "spline", "aggregated"])
def test_every_prior_in_the_plane_has_its_density_drawn(prior, tmp_path):
    torch.set_default_dtype(torch.float32)
    few = {"vamp": ["prior.components=5"], "aggregated": ["prior.size=20"]}.get(prior, [])
    setup = assemble(load([*SMALL, "model.latent_dim=2", f"prior={prior}", *few]))
    start_from_data(setup)
    drawn = gallery(setup)
    found = drawn.prior_density
    assert 0.95 < found.mass < 1.001
    place = torch.tensor([[found.across[30], found.up[70]]], dtype=torch.float32)
    with torch.no_grad():
        assert found.value[30, 70] == pytest.approx(float(setup.model.prior().log_prob(place).exp()), rel=1e-4)
    if prior == "realnvp":
        figures = {figure.name: figure for figure in draw(drawn, [], tmp_path)}
        assert "90 %" in figures["prior_density"].caption


@pytest.mark.parametrize(
    ("words", "said"),
    [(["prior=onehot", "guide=onehot", "model.latent_dim=3"], "3 latents of 10 states"),
     (["model=dvae", "guide=concrete", "model.codes=30"], "4 latents of 30 states"),
     (["prior=bits", "guide=bits", "model.latent_dim=2"], "each bit is on")],
)  # fmt: skip
def test_discrete_codes_are_counted_and_not_averaged(words, said, tmp_path):
    torch.set_default_dtype(torch.float32)
    setup = assemble(load([*SMALL, *words, "objective=elbo", "objective.gradient=score"]))
    start_from_data(setup)
    figures = {figure.name: figure for figure in draw(gallery(setup), [], tmp_path)}
    assert said in figures["aggregated_posterior"].caption
    assert "prior_density" not in figures


def test_what_is_binary():
    bits = np.array([[0.0, 1.0], [1.0, 1.0]])
    assert is_binary(bits, bits)
    assert not is_binary(bits, bits + 0.5)
    assert "of 2 states" in code_usage(bits, bits, 2).caption
