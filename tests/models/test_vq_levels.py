"""Several levels of codes: normalized over all grids, conditional downwards, better with each level."""

import itertools
import math

import pytest
import torch

from inference.assemble import assemble, start_from_data
from inference.config import ConfigError, load
from inference.engine import SVI, SharedOptimizer
from inference.evaluate import evaluating
from inference.particles import decode, encode, generate, particles
from models.codebook import Codebook
from models.likelihoods import FixedGaussian
from models.nets import MLP
from models.pixelcnn import PixelCNN
from models.vq import CodePrior
from models.vq_levels import LevelledCodes, spread

WORDS = [
    "model=vq_levels",
    "guide=quantized_levels",
    "objective=vq",
    "encoder=local",
    "decoder=local",
    "encoder.channels=4",
    "decoder.channels=4",
    "model.codes=8",
    "model.code_dim=4",
    "device=cpu",
]


def levelled(codes=2):
    """2x2 grids of 2 codes below a grid of one, with PixelCNNs of no special parameters."""
    books = [Codebook(codes, 3), Codebook(codes, 2)]
    tokens = [
        PixelCNN((2, 2), codes, (1, 1), codes, channels=4, layers=2),
        PixelCNN((1, 1), codes, channels=4, layers=1),
    ]
    priors = [CodePrior(book, t.event_shape, t) for book, t in zip(books, tokens, strict=True)]
    model = LevelledCodes(priors, FixedGaussian((1, 4, 4), (5, 2, 2), MLP))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def vectors(model, level, grids):
    return model.priors[level].codebook.embed(grids).movedim(-1, -3)


@pytest.mark.row("3.40")
def test_masses_sum_to_one_over_all_grids_of_both_levels():
    model = levelled()
    tops = torch.tensor([0, 1]).view(2, 1, 1)
    bottoms = torch.tensor(list(itertools.product(range(2), repeat=4))).reshape(16, 2, 2)
    top, bottom = tops.repeat_interleave(16, 0), bottoms.repeat(2, 1, 1)
    log_p = model.priors[1]().log_prob(vectors(model, 1, top))
    log_p = log_p + model.priors[0](top).log_prob(vectors(model, 0, bottom))
    assert torch.allclose(log_p.exp().sum(), torch.tensor(1.0), atol=1e-12)
    assert log_p.view(2, 16).softmax(-1).diff(dim=0).abs().max() > 0.01  # the bottom reads the top


def test_the_program_scores_what_the_parts_say():
    model = levelled()
    x, top, bottom = torch.randn(3, 1, 4, 4), torch.randint(2, (3, 1, 1)), torch.randint(2, (3, 2, 2))
    latents = {"z2": vectors(model, 1, top), "z1": vectors(model, 0, bottom)}
    together = torch.cat([latents["z1"], latents["z2"].expand(-1, -1, 2, 2)], dim=1)
    by_hand = (
        model.priors[1]().log_prob(latents["z2"])
        + model.priors[0](top).log_prob(latents["z1"])
        + model.likelihood(together).log_prob(x)
    )
    import pyro
    from pyro import poutine

    trace = poutine.trace(pyro.condition(model, data=latents)).get_trace(x)
    trace.compute_log_prob()
    scored = sum(trace.nodes[name]["log_prob"] for name in ("z1", "z2", "x"))
    assert torch.allclose(scored, by_hand, atol=1e-12)
    assert torch.equal(decode(model, latents, x).mean, model.likelihood(together).mean)


def test_spread_repeats_each_vector_over_its_neighbourhood():
    z = torch.arange(4.0).view(1, 1, 1, 2, 2).expand(3, 2, 1, 2, 2)
    wide = spread(z, (4, 4))
    assert wide.shape == (3, 2, 1, 4, 4)
    assert torch.equal(wide[0, 0, 0], torch.kron(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.ones(2, 2)))
    assert spread(z, (2, 2)) is z


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("tokens", ["uniform", "markov", "pixelcnn", "transformer", "masked"])
def test_levels_by_word(levels, tokens):
    torch.set_default_dtype(torch.float32)
    setup = assemble(load([*WORDS, f"model.levels={levels}", f"tokens={tokens}"]))
    start_from_data(setup)
    x = setup.source("train").fixed(torch.arange(6))
    draws = particles(setup.model, setup.guide, x)
    assert [tuple(q.codes.shape[1:]) for q in encode(setup.guide, x).values()] == [(1, 1), (2, 2), (4, 4)][-levels:]
    if tokens == "uniform":
        places = sum(4**level for level in range(3)[-levels:])
        assert torch.allclose(draws.analytic_kl(), torch.full((1, 6), places * math.log(8)))
    bound = setup.objective.bound(setup.model, setup.guide, x)
    bound.sum().backward()
    programs = torch.nn.ModuleList([setup.model, setup.guide])
    assert all(parameter.grad is not None for parameter in programs.parameters())
    assert setup.model.priors[0].codebook.vectors.grad.abs().max() > 0
    latents, p_x, _ = generate(setup.model, x)
    assert set(latents) == {f"z{level}" for level in range(1, levels + 1)}
    assert p_x.mean.shape == x.shape


def test_misfits_are_refused():
    with pytest.raises(ConfigError, match="accepted: model=vq_levels"):
        assemble(load([*WORDS, "model=vq", "guide=quantized_levels"]))
    with pytest.raises(ConfigError, match="levels must be at least 1"):
        assemble(load([*WORDS, "model.levels=0"]))
    with pytest.raises(ConfigError, match="accepted: 1 to 3"):
        assemble(load([*WORDS, "model.levels=4", "model.grid=[3,4]"]))  # 3x4, 2x2, 1x1
    for grid in ("[4]", "[4,4,4]", "[-1]", "[0,4]"):
        with pytest.raises(ConfigError, match=r"accepted: \(H, W\)"):
            assemble(load([*WORDS, f"model.grid={grid}"]))
    with pytest.raises(ValueError, match="the levels together are"):
        LevelledCodes([CodePrior(Codebook(2, 3), (2, 2))], FixedGaussian((1, 4, 4), (4, 2, 2), MLP))


@pytest.mark.slow
@pytest.mark.row("3.40", "3.44")
def test_a_level_more_lowers_the_error():
    torch.set_default_dtype(torch.float32)
    before, after = {}, {}
    for levels in (1, 2):
        torch.manual_seed(0)
        options = ["model.grid=[2,2]", "model.ema=true", "model.restart_below=0.5", f"model.levels={levels}"]
        channels = ["encoder.channels=24", "decoder.channels=24", "data.binarization=none", "likelihood=gaussian"]
        setup = assemble(load([*WORDS, *options, *channels]))
        start_from_data(setup)
        parts = torch.nn.ModuleList([setup.model, setup.guide])
        optimizer = SharedOptimizer(parts.parameters(), torch.optim.Adam, 3e-3)
        svi = SVI(setup.model, setup.guide, optimizer, setup.objective)
        train, test = (setup.source(split).fixed() for split in ("train", "test"))

        def error(setup=setup, test=test):
            with evaluating(setup.model, setup.guide, seed=0):
                latents = {name: q.mean for name, q in encode(setup.guide, test).items()}
                return float((decode(setup.model, latents, test).mean - test).square().mean())

        before[levels] = error()
        for _ in range(350):
            svi.step(train[torch.randint(len(train), (100,))])
        after[levels] = error()
    assert min(before.values()) > 1.5 * max(after.values()), (before, after)
    assert after[2] < 0.95 * after[1], after
