"""Files of tokens: as long as the prior says, and read back bit for bit."""

import io
import math
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from inference.codes import token_nll
from inference.compression import bits, compress, decompress, png_bits, raw_bits, token_bits
from models.masked_tokens import MaskedTransformer
from models.pixelcnn import PixelCNN
from models.tokens import MarkovTable
from models.transformer import CausalTransformer

GRID, CODES = (3, 4), 5
PRIORS = {
    "markov": MarkovTable,
    "pixelcnn": lambda *a, **kw: PixelCNN(*a, **kw, channels=6, layers=2),
    "transformer": lambda *a, **kw: CausalTransformer(*a, **kw, width=8, layers=1, heads=2),
    "masked": lambda *a, **kw: MaskedTransformer(*a, **kw, width=8, layers=1, heads=2),
}


def build(name, **context):
    prior = PRIORS[name](GRID, CODES, **context)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return prior


def ideal_bits(prior, tokens):
    return float(token_nll(prior, tokens).sum()) / math.log(2)


@pytest.mark.row("3.39")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PRIORS)
def test_length_is_the_nll_and_nothing_is_lost(name, dtype):
    torch.set_default_dtype(dtype)
    prior = build(name)
    tokens = prior.eval()().sample((1200,))  # more than are coded together
    message = compress(prior.train(), tokens)
    assert prior.training
    ideal = ideal_bits(prior, tokens)
    assert 6400 < ideal < 0.98 * len(tokens) * token_bits(12, CODES)
    assert -16 < bits(message) - ideal < 2 + 0.01 * ideal
    assert torch.equal(decompress(prior, message, len(tokens)), tokens)


@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_a_short_message_costs_two_bits_and_the_rest_of_a_byte(count):
    for _ in range(20):
        prior = build("markov")
        tokens = prior().sample((count,))
        message, ideal = compress(prior, tokens), ideal_bits(prior, tokens)
        assert bits(message) < 2 + 1.01 * ideal + 7  # seven where the last byte holds a single bit
        assert torch.equal(decompress(prior, message, count), tokens)


def test_certain_tokens_take_no_room():
    prior = MarkovTable(GRID, CODES)
    prior.fit(torch.zeros(1000, *GRID, dtype=torch.long), smoothing=1e-9)
    for count in (1, 50):
        tokens = torch.zeros(count, *GRID, dtype=torch.long)
        assert bits(compress(prior, tokens)) == 0
        assert torch.equal(decompress(prior, b"", count), tokens)


@pytest.mark.parametrize("name", ["markov", "pixelcnn"])
def test_another_prior_reads_something_else(name):
    tokens = build(name)().sample((50,))
    message = compress(build(name), tokens)
    with suppress(ValueError):  # which says that the message was not written with this prior
        assert not torch.equal(decompress(build(name), message, 50), tokens)


def test_a_message_given_classes():
    prior = build("pixelcnn", context_codes=3)
    classes = torch.arange(300) % 3
    tokens = prior(classes).sample()
    message = compress(prior, tokens, classes)
    assert torch.equal(decompress(prior, message, 300, classes), tokens)
    assert bits(message) < bits(compress(prior, tokens, classes.roll(1)))


def test_rare_tokens_can_be_written():
    prior = MarkovTable(GRID, CODES)
    prior.fit(torch.zeros(1000, *GRID, dtype=torch.long), smoothing=1e-6)
    tokens = torch.randint(CODES, (20, *GRID))
    assert torch.equal(decompress(prior, compress(prior, tokens), 20), tokens)


@pytest.mark.row("3.44")
def test_ratios_are_arithmetic():
    assert raw_bits((3, 128, 128), 256) / token_bits(32 * 32, 512) == pytest.approx(42.667, abs=1e-3)
    assert raw_bits((3, 256, 256), 256) == 3 * 256 * 256 * 8
    assert raw_bits((1, 8, 8), 17) == 64 * 5
    assert token_bits(49, 128) == 343


def test_png_lengths_are_of_files_that_open():
    images = np.random.default_rng(0).integers(0, 17, (3, 1, 8, 8)).astype(float)
    lengths = png_bits(images, 17)
    assert lengths.shape == (3,)
    assert (lengths > 8 * 64 * 4 / 2).all()
    bits_only = (np.indices((2, 1, 28, 28))[3] > 13).astype(float)
    file = io.BytesIO()
    Image.fromarray((255 * bits_only[0, 0]).astype(np.uint8)).convert("1").save(file, format="PNG", optimize=True)
    assert png_bits(bits_only, 2)[0] == 8 * len(file.getvalue())
    assert png_bits(np.zeros((1, 3, 4, 4)), 256)[0] > 0
    with pytest.raises(ValueError, match="one or three channels"):
        png_bits(np.zeros((1, 2, 4, 4)), 256)
