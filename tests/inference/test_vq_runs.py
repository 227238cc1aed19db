"""From data to pictures by one command: codes and the prior over them, chosen by words."""

import json

import numpy as np
import pytest
import torch

from inference.assemble import assemble, start_from_data
from inference.config import ConfigError, load
from models.masked_tokens import MaskedTransformer
from models.pixelcnn import PixelCNN
from models.tokens import MarkovTable, PositionTable
from models.transformer import CausalTransformer
from models.vq import UniformTokens
from run import main

VQ = ["model=vq", "guide=quantized", "objective=vq", "encoder=local", "decoder=local", "device=cpu"]
SMALL = ["model.codes=8", "model.code_dim=4", "encoder.channels=4", "decoder.channels=4"]
TOKENS = {
    "uniform": UniformTokens,
    "table": PositionTable,
    "markov": MarkovTable,
    "pixelcnn": PixelCNN,
    "transformer": CausalTransformer,
    "masked": MaskedTransformer,
}


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("word", TOKENS)
def test_priors_over_codes_by_word(word):
    setup = assemble(load([*VQ, *SMALL, f"tokens={word}", "model.grid=[4,4]"]))
    start_from_data(setup)
    assert type(setup.model.prior.tokens) is TOKENS[word]
    x = setup.source("train").fixed(torch.arange(6))
    bound = setup.objective.bound(setup.model, setup.guide, x)
    bound.sum().backward()
    for name, parameter in setup.model.prior.tokens.named_parameters():
        assert parameter.grad is not None, name
    assert setup.model.prior.codebook.vectors.grad is not None


def test_learning_the_prior_leaves_the_codes_alone():
    """The gradient of everything but the prior is the same under any prior."""
    gradients = []
    for word in ("uniform", "pixelcnn"):
        setup = assemble(load([*VQ, *SMALL, f"tokens={word}"]))
        parts = torch.nn.ModuleList([setup.guide, setup.model.likelihood, setup.model.prior.codebook])
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in parts.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
        x = setup.source("train").fixed(torch.arange(6))
        setup.objective.bound(setup.model, setup.guide, x).sum().backward()
        gradients.append([parameter.grad for parameter in parts.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert any(g.abs().max() > 0 for g in gradients[0])


@pytest.mark.parametrize("start", ["kmeans", "data", "uniform"])
def test_codebooks_start_by_word(start):
    setup = assemble(load([*VQ, *SMALL, f"guide.start={start}"]))
    before = setup.model.prior.codebook.vectors.detach().clone()
    start_from_data(setup)
    after = setup.model.prior.codebook.vectors.detach()
    assert torch.equal(before, after) == (start == "uniform")
    if start == "data":
        x = setup.source("train").fixed()
        vectors = setup.guide.core.net(x).detach().movedim(1, -1).reshape(-1, 4)
        assert torch.cdist(after, vectors).min(-1).values.max() < 1e-3


def test_bad_words_are_refused():
    with pytest.raises(ConfigError, match="start='means' is not known; accepted: kmeans, data, uniform"):
        assemble(load([*VQ, *SMALL, "guide.start=means"]))
    with pytest.raises(ConfigError, match="tokens=pixelcn is not known; did you mean pixelcnn"):
        load([*VQ, "tokens=pixelcn"])
    with pytest.raises(ConfigError, match="model=composed has tokens of its own or none: leave out tokens"):
        assemble(load(["tokens=pixelcnn"]))
    with pytest.raises(ConfigError, match="accepted: grids of 8x8, 4x4, 2x2, 1x1"):
        assemble(load([*VQ, *SMALL, "model.grid=[3,3]"]))


def test_one_command_from_data_to_pictures(tmp_path, capsys):
    folder = tmp_path / "run"
    options = [*VQ, *SMALL, "tokens=markov", "trainer.steps=3", "evaluation.data=20", "evaluation.surgery_data=20"]
    assert main(["train", *options, f"run.dir={folder}"]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tokens"] == "markov"
    assert 0 < summary["test/kl"] < 100
    assert summary["test/code_prior_bits_per_image"] == pytest.approx(summary["test/kl"] / np.log(2))
    assert (folder / "figures" / "samples.png").is_file()
    assert main(["sample", str(folder), "5"]) == 0
    drawn = np.load(folder / "samples.npz")
    assert drawn["mean"].shape == (5, 1, 8, 8)
    assert drawn["latent_z"].shape == (5, 4, 2, 2)
    assert main(["resume", str(folder)]) == 0
    capsys.readouterr()
