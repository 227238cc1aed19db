"""What moves codes and encoders of a VQ-VAE: the gradient field by hand, and where it leads."""

import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import nn

from inference.codes import code_usage, encode_tokens, fit_tokens, token_nll
from inference.engine import SVI as FastSVI
from inference.engine import SharedOptimizer
from inference.objectives import ELBO
from inference.particles import decode, generate, particles
from inference.quantization import VectorQuantization
from models import likelihoods
from models.nets import MLP
from models.pixelcnn import PixelCNN
from models.tokens import MarkovTable, PositionTable
from tests.vq_pairs import IMAGE, Same, pair, parts


@pytest.mark.row("2.20", "2.22", "2.23", "3.31", "3.32", "3.35", "4.13")
def test_the_gradient_field_by_hand():
    (model, guide), x = pair(), torch.randn(5, *IMAGE)
    beta, rate = 0.4, 1.7
    z_e, codes, z_q, log_p = parts(model, guide, x)
    (straight,) = torch.autograd.grad(log_p.sum(), z_q)
    field = straight - 2 * beta * (z_e - z_q).detach()
    for_codes = torch.zeros_like(model.prior.codebook.vectors)
    flat = lambda t: t.detach().movedim(1, -1).reshape(-1, 2)  # noqa: E731
    for_codes.index_add_(0, codes.reshape(-1), 2 * rate * flat(z_e - z_q))
    VectorQuantization(beta, rate).loss_and_grads(model, guide, x)
    assert torch.allclose(model.prior.codebook.vectors.grad, -for_codes, atol=1e-10)
    theirs = [p.grad.clone() for p in guide.core.net.parameters()]
    by_hand = torch.autograd.grad(guide.core.net(x), list(guide.core.net.parameters()), -field)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(theirs, by_hand, strict=True))
    decoder = torch.autograd.grad(-parts(model, guide, x)[3].sum(), list(model.likelihood.net.parameters()))
    pairs = zip(model.likelihood.net.parameters(), decoder, strict=True)
    assert all(torch.allclose(p.grad, g, atol=1e-10) for p, g in pairs)


@pytest.mark.row("2.23")
@pytest.mark.parametrize("objective", [ELBO(1), VectorQuantization(codebook_rate=0.0)], ids=["elbo", "vq"])
def test_the_reconstruction_leaves_the_codebook_alone(objective):
    (model, guide), x = pair(), torch.randn(5, *IMAGE)
    objective.loss_and_grads(model, guide, x)
    gradient = model.prior.codebook.vectors.grad
    assert gradient is None or not gradient.any()
    assert all(p.grad.any() for p in guide.core.net.parameters())


@pytest.mark.row("3.37")
def test_one_knob_leaves_the_gradients_of_the_other_unchanged():
    (model, guide), x = pair(), torch.randn(5, *IMAGE)

    def field(*weights):
        for program in (model, guide):
            program.zero_grad()
        VectorQuantization(*weights).loss_and_grads(model, guide, x)
        return model.prior.codebook.vectors.grad.clone(), [p.grad.clone() for p in guide.core.net.parameters()]

    codes, nets = field(0.25, 1.0)
    codes_faster, nets_same = field(0.25, 10.0)
    codes_same, nets_committed = field(2.5, 1.0)
    assert torch.allclose(codes_faster, 10 * codes, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(nets, nets_same, strict=True))
    assert torch.allclose(codes, codes_same, atol=1e-12)
    assert not torch.allclose(nets[0], nets_committed[0])


def test_a_codebook_of_moving_averages_learns_in_steps_alone():
    (model, guide), x = pair(ema=True, decay=0.5), torch.randn(5, *IMAGE)
    objective, codebook = VectorQuantization(), model.prior.codebook
    before = codebook.vectors.clone()
    objective.loss(model, guide, x)
    assert torch.equal(codebook.vectors, before)
    inputs, codes = guide.core.net(x).movedim(1, -1).reshape(-1, 2), encode_tokens(guide, x).reshape(-1)
    objective.loss_and_grads(model, guide, x)
    for k in codes.unique():
        assert torch.allclose(codebook.vectors[k], inputs[codes == k].mean(0), atol=1e-12)


@pytest.mark.row("0.36", "3.34")
@pytest.mark.parametrize("ema", [False, True], ids=["gradient", "ema"])
def test_with_identity_nets_it_is_kmeans(ema):
    """One code for each datum, which is its own encoding and decoding: "deep" K-means without depth."""
    points = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]).repeat_interleave(30, 0) + 0.5 * torch.randn(90, 2)
    x = points.reshape(90, 2, 1, 1)
    model, guide = pair(3, 2, (1, 1), (2, 1, 1), Same, Same, ema=ema, decay=0.8)
    start = torch.tensor([[0.5, 0.8], [3.0, 0.5], [1.0, 3.0]])
    with torch.no_grad():
        model.prior.codebook.vectors.copy_(start)
    oracle = torch.from_numpy(KMeans(3, init=start.numpy(), n_init=1, tol=0).fit(points.numpy()).cluster_centers_)
    assert (start - oracle).abs().max() > 0.3
    parameters = [*model.parameters(), *([nn.Parameter(torch.zeros(()))] if ema else [])]
    optim = SharedOptimizer(parameters, torch.optim.SGD, 0.005)
    svi = FastSVI(model, guide, optim, VectorQuantization())
    for _ in range(300):
        svi.step(x)
    assert torch.allclose(model.prior.codebook.vectors, oracle, atol=1e-4)


@pytest.mark.row("2.21")
def test_the_copied_gradient_moves_data_to_better_codes():
    """One datum whose code decodes badly: its encoding is pushed until another code is nearest."""
    model, guide = pair(2, 1, (1, 1), (1, 1, 1), encoder=MLP, decoder=Same)
    with torch.no_grad():
        model.prior.codebook.vectors.copy_(torch.tensor([[0.0], [1.0]]))
        for p in guide.core.net.parameters():
            p.zero_()
    x = torch.full((1, 1, 1, 1), 0.9)
    optim = SharedOptimizer(list(guide.parameters()), torch.optim.SGD, 1e-3)
    svi = FastSVI(model, guide, optim, VectorQuantization())
    before, loss = encode_tokens(guide, x).item(), float(svi.loss(model, guide, x))
    assert before == 0
    for _ in range(50):
        svi.step(x)
        if encode_tokens(guide, x).item() == 1:
            break
    assert encode_tokens(guide, x).item() == 1
    assert float(svi.loss(model, guide, x)) < loss


class Place(nn.Module):
    """An encoder that gives every datum the same learned vector."""

    def __init__(self, in_shape, out_shape):
        super().__init__()
        self.place, self.dims = nn.Parameter(torch.full(tuple(out_shape), 0.1)), len(in_shape)

    def forward(self, x):
        return self.place.expand(*x.shape[: x.dim() - self.dims], *self.place.shape)


class Pull(likelihoods.FixedGaussian):
    """log p(x|z) = -3 |x - z| + log 3/2, whose gradient in z has size 3 however far x is."""

    def forward(self, *context):
        return dist.Laplace(self.net(*context), 1 / 3).to_event(3)


@pytest.mark.row("2.24")
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_commitment_stops_the_growth_of_the_encoding(beta):
    """Pulled with force 3 by its copied gradient, the encoding runs away, or stops 3 / (2 beta) beyond its code."""
    model, guide = pair(2, 1, (1, 1), (1, 1, 1), encoder=Place, decoder=Same, likelihood=Pull)
    with torch.no_grad():
        model.prior.codebook.vectors.copy_(torch.tensor([[-1.0], [1.0]]))
    optim = SharedOptimizer(guide.parameters(), torch.optim.SGD, 0.2)
    svi = FastSVI(model, guide, optim, VectorQuantization(beta))
    x, sizes = torch.full((1, 1, 1, 1), 1e3), []
    for _ in range(250):
        svi.step(x)
        sizes.append(float(guide.core.net.place.detach()))
    if beta:
        assert sizes[-1] == pytest.approx(1 + 3 / (2 * beta), abs=1e-4)
        assert max(sizes) < 1 + 3 / (2 * beta) + 1e-6
    else:
        assert sizes[-1] == pytest.approx(0.1 + 250 * 0.2 * 3)


def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).reshape(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long()


@pytest.mark.row("0.33", "3.31")
@pytest.mark.parametrize("ema", [False, True], ids=["gradient", "ema"])
def test_it_learns_digits(ema):
    x, _ = digits()
    train, test = x[:1500], x[1500:]
    nets = {"encoder": partial(MLP, hidden=(64,)), "decoder": partial(MLP, hidden=(64,))}
    model, guide = pair(
        16, 4, (2, 2), (1, 8, 8), likelihood=partial(likelihoods.FixedGaussian, scale=0.2), **nets, ema=ema
    )
    guide.core.initialize(train)
    optim = SharedOptimizer([*model.parameters(), *guide.parameters()], torch.optim.Adam, 2e-3)
    svi = FastSVI(model, guide, optim, VectorQuantization())

    def bound():
        return -float(svi.loss(model, guide, test)) / len(test)

    @torch.no_grad()
    def error():
        z = {"z": particles(model, guide, test).latents["z"].value}
        return float((decode(model, z, test).mean - test).square().mean())

    spread = float((test - train.mean(0)).square().mean())
    untrained = bound()
    assert error() > spread
    for _ in range(400):
        svi.step(train[torch.randint(1500, (128,))])
    assert bound() > untrained + 10
    assert error() < 0.6 * spread
    assert code_usage(encode_tokens(guide, train), 16).perplexity > 6


class Convolutions(nn.Module):
    """From images to a grid of half their size, or back; every place is treated alike."""

    def __init__(self, in_shape, out_shape):
        super().__init__()
        if in_shape[-1] > out_shape[-1]:
            layers = [nn.Conv2d(in_shape[0], 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, out_shape[0], 3, 1, 1)]
        else:
            layers = [nn.Conv2d(in_shape[0], 32, 3, 1, 1), nn.ReLU(), nn.ConvTranspose2d(32, out_shape[0], 4, 2, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


@pytest.mark.slow
@pytest.mark.row("0.37", "0.39", "2.15", "3.38")
def test_two_phases_on_digits():
    """Codes first, then a prior over them: held out, a PixelCNN beats the tables, and the class helps it."""
    torch.set_default_dtype(torch.float32)
    x, y = digits()
    order = torch.randperm(len(x))
    x, y = x[order].float(), y[order]
    likelihood = partial(likelihoods.FixedGaussian, scale=0.2)
    model, guide = pair(8, 4, (4, 4), (1, 8, 8), Convolutions, Convolutions, likelihood)
    guide.core.initialize(x[:1500])
    optim = SharedOptimizer([*model.parameters(), *guide.parameters()], torch.optim.Adam, 3e-3)
    svi = FastSVI(model, guide, optim, VectorQuantization())
    for _ in range(150):
        svi.step(x[torch.randint(1500, (128,))])
    train, test = encode_tokens(guide, x[:1500]), encode_tokens(guide, x[1500:])
    assert code_usage(train, 8).perplexity > 4
    tables = [PositionTable((4, 4), 8), MarkovTable((4, 4), 8)]
    for table in tables:
        table.fit(train, smoothing=0.3)
    independent, markov = (float(token_nll(table, test).mean()) for table in tables)
    pixelcnn, by_class = (PixelCNN((4, 4), 8, context_codes=n, channels=16, layers=2) for n in (0, 10))
    assert token_nll(pixelcnn, test).mean() > independent
    fit_tokens(pixelcnn, train, steps=150, learning_rate=5e-3)
    fit_tokens(by_class, train, y[:1500], steps=150, learning_rate=5e-3)
    alone, told = float(token_nll(pixelcnn, test).mean()), float(token_nll(by_class, test, y[1500:]).mean())
    assert told < alone - 0.5 < markov - 1.5 < independent - 2
    before = float(VectorQuantization().loss(model, guide, x[1500:]))
    model.prior.tokens = pixelcnn
    after = float(VectorQuantization().loss(model, guide, x[1500:]))
    assert (before - after) / len(test) == pytest.approx(16 * math.log(8) - alone, rel=1e-3)
    assert generate(model, x[:20])[2].shape == (20, 1, 8, 8)
