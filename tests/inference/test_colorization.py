"""A latent segmentation is learned where the colorizer needs it, and left alone where it does not."""

import json

import numpy as np
import pytest
import torch

from inference.colorization import best_colorizer, colorizer, coloured, draw_pictures, information
from inference.config import ConfigError
from inference.console import Quiet
from inference.studies import run_study

STATES = 8


def log_likelihood(model, pictures):
    p = coloured(model, pictures.pixels)
    return float(p[torch.arange(len(p)), pictures.pixels[:, 1].long()].log().mean())


@pytest.mark.slow
@pytest.mark.row("3.4", "3.20")
def test_a_weak_colorizer_learns_the_segments_and_a_universal_one_collapses():
    train, test = draw_pictures(12, seed=0), draw_pictures(12, seed=1)
    torch.manual_seed(0)
    untrained, entropy = information(colorizer(STATES, universal=False)[0], test)
    assert untrained < 0.5 * entropy
    weak, _ = best_colorizer(train.pixels, STATES, universal=False)
    universal, _ = best_colorizer(train.pixels, STATES, universal=True, starts=1)
    assert information(weak, test)[0] > 0.9 * entropy
    assert information(universal, test)[0] < 0.02
    # Both colour as well as can be: they agree with the segment's colour but for the noise put in.
    best = 0.9625 * np.log(0.9625) + 0.0375 * np.log(0.0125)
    for model in (weak, universal):
        assert log_likelihood(model, test) == pytest.approx(best, abs=0.05)


def test_colours_are_a_distribution_with_the_segment_summed_out():
    pictures = draw_pictures(2, side=5)
    for universal in (False, True):
        torch.manual_seed(1)
        model, _ = colorizer(3, universal)
        p = coloured(model, pictures.pixels)
        assert torch.allclose(p.sum(1), torch.ones(50))
        by_hand = torch.zeros_like(p)
        shares = model.prior(model.context(pictures.pixels)).base_dist.probs[:, 0]
        for z in range(3):
            seen = torch.eye(3)[z].expand(50, 3)
            if universal:
                seen = torch.cat([seen, model.context(pictures.pixels)], 1)
            by_hand += shares[:, z : z + 1] * model.likelihood(seen).base_dist.probs[:, 1]
        assert torch.allclose(p, by_hand.detach(), atol=1e-12)


def test_the_toy_is_what_it_says():
    pictures = draw_pictures(5)
    assert pictures.pixels.shape == (5 * 256, 2)
    assert np.mean(pictures.colour == pictures.segment) == pytest.approx(0.9625, abs=0.03)
    for kind in range(4):
        assert np.ptp(pictures.grey[pictures.segment == kind]) <= 2


def test_the_study_draws_both_colorizers(tmp_path):
    page = run_study(["colorization", "study.steps=3", "study.starts=1", f"run.dir={tmp_path / 'study'}"], Quiet())
    rows = json.loads((tmp_path / "study" / "table.json").read_text())
    assert [row["colorizer"].split(":")[0] for row in rows] == ["weak", "universal"]
    assert all(0 <= row["I(z; segment)"] <= row["H(segment)"] for row in rows)
    assert page.read_text().count("<img") == 1
    for option, says in (("study.states=1", "at least 2"), ("data=mnist", "its own pictures")):
        with pytest.raises(ConfigError, match=says):
            run_study(["colorization", option, f"run.dir={tmp_path / 'x'}"], Quiet())
