"""From data to pictures by one command: codes and the prior over them, chosen by words."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from inference.assemble import assemble, start_from_data
from inference.codes import codes_of
from inference.compiled import CompiledSVI
from inference.config import ConfigError, load
from inference.engine import SVI, SharedOptimizer
from inference.experiment import open_run
from inference.particles import generate
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


def moved(optimizer, rate, told=True, engine=SVI, steps=1):
    """How far codes and encoder have moved, from one start."""
    torch.manual_seed(2)
    words = [f"objective.codebook_rate={rate}", f"optimizer={optimizer}", "encoder.blocks=0", "decoder.blocks=0"]
    setup = assemble(load([*VQ, *SMALL, *words]))
    start_from_data(setup)
    programs = torch.nn.ModuleList([setup.model, setup.guide])
    speeds = setup.objective.speeds(programs) if told else None
    optim = SharedOptimizer(programs.parameters(), setup.config.factory("optimizer"), 1.0, None, speeds)
    optim.set_learning_rate(1e-6)
    svi = engine(setup.model, setup.guide, optim, setup.objective)
    parts = [[setup.model.prior.codebook.vectors], list(setup.guide.parameters())]
    before = [[p.detach().clone() for p in part] for part in parts]
    for _ in range(steps):
        svi.step(setup.source("train").fixed(torch.arange(50)))
    pairs = [zip(part, old, strict=True) for part, old in zip(parts, before, strict=True)]
    codes, encoder = (torch.cat([(p.detach() - q).flatten().double() for p, q in pair]) for pair in pairs)
    return codes.norm(), encoder.norm(), optim


@pytest.mark.parametrize("optimizer", ["adam", "adamax", "adagrad", "sgd"])
def test_the_codebook_rate_is_one_under_every_optimizer(optimizer):
    """Codes move four times as far, the encoder as far as ever, also where gradients are divided by their size."""
    (codes, encoder, _), (faster, same, _) = moved(optimizer, 1.0), moved(optimizer, 4.0)
    assert codes > 0
    assert float(faster / codes) == pytest.approx(4.0, rel=0.02)
    assert float(same / encoder) == pytest.approx(1.0, rel=1e-4)
    untold, _, _ = moved(optimizer, 4.0, told=False)
    assert float(untold / codes) == pytest.approx(4.0 if optimizer == "sgd" else 1.0, rel=0.02)


def test_a_compiled_step_and_a_checkpoint_keep_the_codebook_rate():
    (codes, encoder, optim), (again, also, _) = (
        moved("adam", 4.0, engine=engine, steps=3) for engine in (SVI, partial(CompiledSVI, inductor=False))
    )
    assert float(again / codes) == pytest.approx(1.0, rel=1e-3)
    assert float(also / encoder) == pytest.approx(1.0, rel=1e-3)
    optim.load_tensors(optim.tensors())
    assert sorted(group["lr"] for group in optim.optimizer.param_groups) == [1e-6, 4e-6]


def test_moving_averages_have_no_codebook_rate(tmp_path, capsys):
    words = [*VQ, *SMALL, "model.ema=true", "objective.codebook_rate=3", f"run.dir={tmp_path}"]
    assert main(["train", *words, "trainer.steps=1"]) == 2
    assert "whose rate is model.decay; leave it at 1, or use model.ema=false" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["dvae", "vq_levels", "composed"])
def test_code_numbers_of_draws(model):
    torch.manual_seed(3)
    guide = {"dvae": "concrete", "vq_levels": "quantized_levels", "composed": "diagonal"}[model]
    nets = [] if model == "composed" else [*SMALL, "encoder=local", "decoder=local"]
    setup = assemble(load([f"model={model}", f"guide={guide}", "device=cpu", *nets]))
    latents, _, _ = generate(setup.model.eval(), torch.zeros(20, 1, 8, 8))
    codes = codes_of(setup.model, latents)
    assert list(codes) == {"dvae": ["z"], "vq_levels": ["z1", "z2"], "composed": []}[model]
    if model == "dvae":
        assert torch.equal(torch.nn.functional.one_hot(codes["z"], 8).to(latents["z"]), latents["z"])
    for name, prior in zip(codes, getattr(setup.model, "priors", []), strict=False):
        assert torch.equal(prior.codebook.embed(codes[name]).movedim(-1, -3), latents[name])


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
    assert (folder / "samples.png").read_bytes()[:4] == b"\x89PNG"
    book = open_run(folder).model.prior.codebook.vectors.detach().numpy()
    assert drawn["codes_z"].shape == (5, 2, 2)
    assert np.array_equal(book[drawn["codes_z"]].transpose(0, 3, 1, 2), drawn["latent_z"])
    assert drawn["latent_z"].shape == (5, 4, 2, 2)
    assert main(["resume", str(folder)]) == 0
    capsys.readouterr()
