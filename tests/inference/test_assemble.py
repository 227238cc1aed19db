"""Parts put together from words."""

import numpy as np
import pytest
import torch

import inference.assemble
from inference.assemble import assemble, start_from_data
from inference.config import load
from inference.particles import encode


@pytest.mark.parametrize("likelihood", ["logistic", "categorical"])
@pytest.mark.parametrize("encoder", ["linear", "mlp", "gated", "conv"])
def test_encoders_start_as_well_from_levels_as_from_fractions(tmp_path, encoder, likelihood):
    """Whole numbers up to 255 start q(z|x) where fractions of 255 do: neither saturated nor far outside the prior."""
    images = np.random.default_rng(0).integers(0, 256, (200, 3, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "greys.npz", x=images)
    words = [f"data={tmp_path / 'greys.npz'}", f"likelihood={likelihood}", f"encoder={encoder}", "device=cpu"]
    setup = assemble(load(words))
    start_from_data(setup)
    x = setup.source("train").fixed()
    assert x.max() == 255
    q = encode(setup.guide, x)["z"].base_dist
    assert q.loc.abs().max() < 20
    assert q.scale.min() > 1e-3
    assert q.scale.max() < 1e3
    for net in setup.guide.modules():
        if hasattr(net, "input_scale"):
            net.input_scale = 1.0
    fractions = encode(setup.guide, x / 255)["z"].base_dist
    torch.testing.assert_close((fractions.loc, fractions.scale), (q.loc, q.scale), rtol=1e-4, atol=1e-4)


def test_the_aggregated_posterior_keeps_as_many_of_all_training_data_as_it_was_asked_to(monkeypatch):
    """Other parts start from the first few, which are no fair part where a file has an order."""
    monkeypatch.setattr(inference.assemble, "INITIAL_DATA", 50)
    setup = assemble(load(["prior=aggregated", "prior.size=300", "data.limit=400", "encoder.hidden=[4]"]))
    start_from_data(setup)
    kept = setup.model.prior.data
    assert len(kept) == 300
    every, first = setup.source("train").fixed(torch.arange(400)), 0
    for row in kept:
        places = (every == row).flatten(1).all(1).nonzero()
        assert len(places)
        first += int(places[0]) < 50
    assert 20 < first < 55  # three in eight of them
