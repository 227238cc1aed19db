"""The discrete VAE: soft embeddings, grids of one-hot vectors under a prior over tokens, runs by word."""

import math

import pytest
import torch
from torch.distributions import kl_divergence

from guides.amortized import Amortized
from guides.discrete import OneHotCategoricals
from guides.relaxed import RelaxedOneHotCategoricals
from inference.assemble import assemble, start_from_data
from inference.codes import code_scores, encode_tokens, fit_tokens, token_nll
from inference.config import ConfigError, load
from inference.engine import SVI, SharedOptimizer
from inference.objectives import ELBO
from inference.particles import StructureError, generate, particles, validation
from models.discrete import UniformOneHots
from models.dvae import OneHotPrior, SoftEmbedding
from models.latent import LatentVariableModel
from models.likelihoods import FixedGaussian
from models.local_nets import LocalEncoder
from models.nets import Linear
from models.tokens import MarkovTable, PositionTable
from models.transformer import CausalTransformer
from models.vq import UniformTokens, check_grid

WORDS = ["model=dvae", "guide=concrete", "encoder=local", "decoder=local", "device=cpu"]
SMALL = ["model.codes=8", "model.code_dim=4", "encoder.channels=4", "decoder.channels=4"]


def embedding(classes=5, dim=3, grid=(2, 2)):
    return SoftEmbedding(FixedGaussian((1, 4, 4), (dim, *grid), Linear), classes)


@pytest.mark.row("4.21")
def test_soft_embeddings_pass_gradients_to_weights_and_vectors_and_harden_to_single_codes():
    """Through the whole pair: the encoder's logits and the code vectors all move, and a cold mixture is one vector."""
    p_x = embedding()
    model = LatentVariableModel(OneHotPrior(UniformTokens((2, 2), 5), 5), p_x)
    core = RelaxedOneHotCategoricals((2, 2, 5), (1, 4, 4), Linear, hard=False, minimum=1e-4)
    x = torch.randn(3, 1, 4, 4)
    ELBO().bound(model, Amortized(core), x).sum().backward()
    for parameter in (p_x.vectors, *core.parameters()):
        assert (parameter.grad.abs() > 0).all()
    for temperature, close in ((1.0, False), (1e-4, True)):
        core.temperature.fill_(temperature)
        weights = core(x).rsample()
        nearest = p_x.vectors[weights.argmax(-1)].movedim(-1, -3)
        assert torch.allclose(p_x.embed(weights), nearest, atol=1e-3) == close
    by_hand = torch.einsum("nhwk,kd->ndhw", weights, p_x.vectors)
    assert torch.allclose(p_x.embed(weights), by_hand, atol=1e-12)


def test_a_grid_of_one_hot_vectors_has_the_mass_of_its_tokens():
    table = PositionTable((2, 2), 3)
    with torch.no_grad():
        table.table.normal_()
    prior = OneHotPrior(table, 3)
    states = UniformOneHots((4, 3))().enumerate_support(expand=False).reshape(-1, 2, 2, 3)
    log_p = prior().log_prob(states)
    assert float(log_p.detach().logsumexp(0)) == pytest.approx(0.0, abs=1e-10)
    by_hand = (table.table[0].log_softmax(-1) * states).sum((-1, -2, -3))
    assert torch.allclose(log_p, by_hand, atol=1e-12)
    drawn = prior().expand((20_000,)).sample()
    assert torch.equal(drawn.sum(-1), torch.ones(20_000, 2, 2))
    p = table.table[0].detach().softmax(-1)
    assert ((drawn.mean(0) - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt()).all()
    soft = 0.6 * drawn[:4] + 0.4 / 3
    assert torch.equal(prior().log_prob(soft), prior().log_prob(drawn[:4]))


def test_the_uniform_prior_has_its_divergence_in_closed_form():
    q = OneHotCategoricals((2, 2, 3), (4,), Linear)(torch.randn(5, 4))
    kl = kl_divergence(q, OneHotPrior(UniformTokens((2, 2), 3), 3)())
    entropy = q.base_dist.entropy().sum((-1, -2))
    assert torch.allclose(kl, 4 * math.log(3) - entropy, atol=1e-12)


def test_classes_are_channels_of_what_the_encoder_writes():
    core = OneHotCategoricals((2, 2, 7), (1, 8, 8), LocalEncoder)
    x = torch.randn(3, 1, 8, 8)
    image = core.net.image(x)
    assert image.shape == (3, 7, 2, 2)
    assert torch.allclose(core(x).base_dist.probs[:, 1, 0], image.softmax(1)[:, :, 1, 0])


@pytest.mark.parametrize("word", ["uniform", "table", "markov", "pixelcnn", "transformer", "masked"])
def test_priors_over_its_tokens_by_word(word):
    torch.set_default_dtype(torch.float32)
    setup = assemble(load([*WORDS, *SMALL, f"tokens={word}", "objective=elbo"]))
    start_from_data(setup)
    x = setup.source("train").fixed(torch.arange(6))
    setup.objective.bound(setup.model, setup.guide, x).sum().backward()
    for program in (setup.model, setup.guide):
        for name, parameter in program.named_parameters():
            assert parameter.grad is not None, name
    setup.guide.eval()
    scores = code_scores(setup.guide, x)
    assert 1 <= scores["test/code_perplexity"][0] <= 8
    assert scores["test/code_fixed_bits_per_image"] == 12
    latents, _, drawn = generate(setup.model.eval(), x)
    assert drawn.shape == x.shape
    assert torch.equal(latents["z"].sum(-1), torch.ones(6, 2, 2))


def test_evaluation_is_of_one_hot_codes():
    core = RelaxedOneHotCategoricals((2, 2, 5), (1, 4, 4), Linear, hard=False)
    guide = Amortized(core).eval()
    x = torch.randn(6, 1, 4, 4)
    draws = particles(LatentVariableModel(OneHotPrior(MarkovTable((2, 2), 5), 5), embedding()), guide, x, 3)
    z = draws.latents["z"].value
    assert ((z == 0) | (z == 1)).all()
    assert torch.equal(encode_tokens(guide, x), core(x).base_dist.probs.argmax(-1))
    flat = Amortized(OneHotCategoricals((4, 5), (1, 4, 4), Linear))
    with pytest.raises(StructureError, match="use guide=quantized, or model=dvae"):
        encode_tokens(flat, x)
    assert code_scores(flat, x) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.grid=[3,3]"], "grids of 8x8, 4x4, 2x2, 1x1"),
        (["model.grid=[0,2]"], r"accepted: \(H, W\)"),
        (["guide=bits"], "draws bits.*accepted: prior=bits"),
        (["model.codes=1"], "2"),
        (["model.code_dim=0"], "model.code_dim: 0 is below 1"),
    ],
)
def test_parts_that_do_not_fit(words, message):
    with pytest.raises(ConfigError, match=message):
        assemble(load([*WORDS, *SMALL, *words]))
    with pytest.raises(ValueError, match="height and a width"):
        check_grid((2,))


@pytest.fixture(scope="module")
def trained():
    """Digits as grids of 2x2 tokens; the temperature falls to 1/16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    try:
        annealed = ["guide.minimum=0.0625", "guide.rate=2.8", "objective=annealed", "objective.warmup=0.7"]
        setup = assemble(load([*WORDS, *annealed, "model.codes=32", "model.code_dim=16"]))
        start_from_data(setup)
        untrained = errors(setup)
        parts = torch.nn.ModuleList([setup.model, setup.guide])
        svi = SVI(
            setup.model, setup.guide, SharedOptimizer(parts.parameters(), torch.optim.Adam, 3e-3), setup.objective
        )
        data, steps = setup.source("train").fixed(torch.arange(1297)), 1200
        with validation(False):
            for step in range(steps):
                svi.at(step / steps)
                svi.step(data[torch.randint(len(data), (100,))])
        svi.at(1.0)
        yield setup, untrained
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def errors(setup):
    """Mean squared error per pixel of held-out data decoded from soft weights, and from the most probable codes."""
    x = setup.source("test").fixed(torch.arange(300))
    mean = lambda z: setup.model.likelihood(z).mean  # noqa: E731
    soft = setup.guide.train().core(x).rsample()
    hard = torch.nn.functional.one_hot(encode_tokens(setup.guide, x), soft.shape[-1]).to(soft)
    return tuple(float((mean(z) - x).square().mean()) for z in (soft, hard))


@pytest.mark.slow
@pytest.mark.row("4.22")
def test_digits_decode_from_hard_tokens_as_well_as_from_soft_ones(trained):
    torch.set_default_dtype(torch.float32)
    setup, untrained = trained
    soft, hard = errors(setup)
    assert hard < 1.3 * soft
    assert hard < 0.7 * untrained[1]


@pytest.mark.slow
@pytest.mark.row("4.22")
def test_a_transformer_over_the_tokens_beats_the_table_of_positions(trained):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(1)
    setup, _ = trained
    seen, valid, held = (
        encode_tokens(setup.guide, setup.source(split).fixed(torch.arange(count)))
        for split, count in (("train", 1297), ("valid", 200), ("test", 300))
    )
    table, transformer = (
        PositionTable((2, 2), 32),
        CausalTransformer((2, 2), 32, width=32, layers=2, heads=2, dropout=0.2),
    )
    table.fit(seen)
    before = float(token_nll(transformer, held).mean())
    fit_tokens(transformer, seen, steps=400, learning_rate=3e-3, valid=(valid, None))
    apart, together = (float(token_nll(prior, held).mean()) for prior in (table, transformer))
    assert together < apart - 0.2 < before - 0.5
