"""The VQ-VAE as a model and a guide: its bound and its gradient field by hand, on enumerable grids and on digits."""

import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import nn

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from guides.quantized import Quantized
from inference.assemble import assemble
from inference.codes import code_usage, encode_tokens, fit_tokens, token_nll
from inference.config import ConfigError, load
from inference.diagnostics import elbo_terms, surgery
from inference.engine import SVI as FastSVI
from inference.engine import SharedOptimizer
from inference.evaluate import EvaluationSettings, evaluate, log_evidence
from inference.objectives import ELBO
from inference.particles import StructureError, decode, encode, generate, particles
from inference.quantization import VectorQuantization
from models import likelihoods
from models.codebook import Codebook
from models.latent import LatentVariableModel
from models.nets import MLP, ConvDecoder, ConvEncoder
from models.pixelcnn import PixelCNN
from models.priors import StandardNormal
from models.tokens import MarkovTable, PositionTable
from models.vq import CodePrior, HardCodes

IMAGE = (1, 4, 4)


class Same(nn.Module):
    """The identity between shapes of one size."""

    def __init__(self, in_shape, out_shape):
        super().__init__()
        self.dims, self.out_shape = len(in_shape), tuple(out_shape)

    def forward(self, x):
        return x.reshape(*x.shape[: x.dim() - self.dims], *self.out_shape)


def pair(codes=3, dim=2, grid=(2, 2), shape=IMAGE, encoder=None, decoder=None, likelihood=None, **options):
    mlp = partial(MLP, hidden=(8,))
    codebook = Codebook(codes, dim, **options)
    with torch.no_grad():
        codebook.vectors.normal_()
    latent = (dim, *grid)
    likelihood = likelihood or likelihoods.FixedGaussian
    model = LatentVariableModel(CodePrior(codebook, grid), likelihood(shape, latent, decoder or mlp))
    return model, Amortized(Quantized(latent, shape, encoder or mlp, model))


def parts(model, guide, x):
    """Encoder output, codes' vectors and log p(x|z_q), computed without the programs; a gradient for each leaf."""
    z_e = guide.core.net(x).detach().requires_grad_()
    rows = z_e.detach().movedim(1, -1).reshape(-1, z_e.shape[1])
    codebook = model.prior.codebook.vectors.detach()
    codes = torch.tensor([min(range(len(codebook)), key=lambda k: float((r - codebook[k]).norm())) for r in rows])
    codes = codes.reshape(x.shape[0], *z_e.shape[2:])
    z_q = codebook[codes].movedim(-1, 1).clone().requires_grad_()
    return z_e, codes, z_q, model.likelihood(z_q).log_prob(x)


@pytest.mark.row("0.33", "2.18", "2.19", "3.15", "3.29", "4.10", "4.11", "4.12")
@pytest.mark.parametrize("objective", [VectorQuantization(), ELBO(1), ELBO(1, "analytic")], ids=["vq", "elbo", "kl"])
def test_the_bound_is_the_likelihood_less_the_codes(objective):
    (model, guide), x = pair(), torch.randn(5, *IMAGE)
    _, codes, _, log_p = parts(model, guide, x)
    assert len(codes.unique()) > 1
    assert torch.equal(encode_tokens(guide, x, chunk=2), codes)
    assert torch.allclose(objective.bound(model, guide, x), log_p - 4 * math.log(3), atol=1e-12)
    draws = particles(model, guide, x)
    assert torch.allclose(draws.analytic_kl(), torch.full((1, 5), 4 * math.log(3)), atol=1e-12)
    assert not draws.analytic_kl().requires_grad
    assert torch.equal(encode(guide, x)["z"].entropy(), torch.zeros(5))


def test_pyro_agrees():
    (model, guide), x = pair(), torch.randn(5, *IMAGE)
    ours = float(VectorQuantization().bound(model, guide, x).sum().detach())
    assert math.isclose(-Trace_ELBO().loss(model, guide, x), ours, rel_tol=1e-12)


@pytest.mark.row("4.9", "4.12")
def test_one_code_per_image_costs_log_k():
    model, guide = pair(codes=5, grid=(1, 1))
    kl = particles(model, guide, torch.randn(6, *IMAGE)).analytic_kl()
    assert torch.allclose(kl, torch.full((1, 6), math.log(5)), atol=1e-12)


@pytest.mark.row("3.30", "4.14")
def test_masses_sum_to_one_over_all_grids():
    model, guide = pair()
    grids = torch.tensor(list(itertools.product(range(3), repeat=4))).reshape(81, 2, 2)
    values = model.prior.codebook.embed(grids).movedim(-1, 1)
    prior = model.prior()
    assert torch.allclose(prior.log_prob(values).exp().sum(), torch.tensor(1.0), atol=1e-12)
    q = encode(guide, torch.randn(3, *IMAGE))["z"]
    masses = torch.stack([q.log_prob(value.expand(3, -1, -1, -1)) for value in values]).exp()
    assert torch.equal(masses.sum(0), torch.ones(3))
    assert torch.equal(masses.argmax(0), torch.stack([(grids == c).all(-1).all(-1).long().argmax() for c in q.codes]))
    assert math.isclose(16 * math.log(16), 44.3614, abs_tol=1e-4)


def test_the_bound_is_below_the_evidence():
    """The exact log p(x), by summing over all 81 grids; the guide's importance-sampled one is the bound itself."""
    (model, guide), x = pair(), torch.randn(4, *IMAGE)
    grids = torch.tensor(list(itertools.product(range(3), repeat=4))).reshape(81, 2, 2)
    values = model.prior.codebook.embed(grids).movedim(-1, 1)
    exact = torch.stack([model.likelihood(v).log_prob(x) for v in values]).logsumexp(0) - math.log(81)
    bound = VectorQuantization().bound(model, guide, x)
    assert (bound < exact + 1e-10).all()
    with torch.no_grad():
        assert torch.allclose(log_evidence(model, guide, x, 7).log_p, bound, atol=1e-10)


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


def test_prior_draws_are_grids_of_codes():
    model, _ = pair()
    like = torch.zeros(50, *IMAGE)
    latents, _, x = generate(model, like)
    codebook = model.prior.codebook
    assert latents["z"].shape == (50, 2, 2, 2)
    assert x.shape == like.shape
    codes = codebook.nearest(latents["z"].movedim(1, -1))
    assert torch.equal(codebook.embed(codes).movedim(-1, 1), latents["z"])
    assert len(codes.unique()) == 3


@pytest.mark.row("0.37")
def test_tokens_survive_a_round_trip():
    """From image to a grid of whole numbers and back to the same reconstruction."""
    nets = {"encoder": partial(ConvEncoder, channels=(4,)), "decoder": partial(ConvDecoder, channels=(4,))}
    (model, guide), x = pair(**nets), torch.randn(5, *IMAGE)
    tokens = encode_tokens(guide, x)
    assert tokens.shape == (5, 2, 2)
    assert tokens.dtype == torch.long
    z = {"z": model.prior.codebook.embed(tokens).movedim(-1, 1)}
    direct = decode(model, {"z": particles(model, guide, x).latents["z"].value}, x).mean
    assert torch.equal(decode(model, z, x).mean, direct)
    spatial = DiagonalNormal((2, 2, 2), IMAGE, nets["encoder"])
    assert spatial(x).event_shape == (2, 2, 2)


def test_surgery_counts_distinct_grids():
    (model, guide), x = pair(), torch.randn(40, *IMAGE)
    with torch.no_grad():
        terms, parts = elbo_terms(model, guide, x), surgery(model, guide, x)
    _, counts = encode_tokens(guide, x).flatten(1).unique(dim=0, return_counts=True)
    p = counts.double() / 40
    assert math.isclose(parts.mutual_information, float(-(p * p.log()).sum()), abs_tol=1e-9)
    assert torch.allclose(terms.kl, torch.full((40,), 4 * math.log(3)))


@pytest.mark.row("4.12")
def test_held_out_numbers_are_those_of_the_bound():
    (model, guide), x = pair(codes=4), torch.randn(30, *IMAGE)
    summary, _ = evaluate(model, guide, x, EvaluationSettings(particles=50, elbo_samples=3), seed=0)
    bound = float(VectorQuantization().bound(model, guide, x).mean().detach())
    assert summary["test/elbo"] == pytest.approx(bound, abs=1e-10)
    assert summary["test/nll"] == pytest.approx(-bound, abs=1e-10)
    assert summary["test/nll_particles"] == 1
    assert summary["test/khat_median"] is None
    assert summary["test/kl"] == pytest.approx(4 * math.log(4), abs=1e-10)
    assert summary["test/code_fixed_bits_per_image"] == 8
    assert summary["test/code_bits_per_image"] < 8
    assert summary["test/code_perplexity"] == [code_usage(encode_tokens(guide, x), 4).perplexity]


@pytest.mark.row("3.30")
def test_usage_is_of_the_data_set_not_the_batch():
    tokens = torch.arange(16).repeat_interleave(8).reshape(32, 2, 2)
    whole, batch = code_usage(tokens, 16), code_usage(tokens[:4], 16)
    assert math.isclose(whole.perplexity, 16, rel_tol=1e-12)
    assert whole.used == 16
    assert math.isclose(batch.perplexity, 2, rel_tol=1e-12)
    assert math.isclose(whole.bits_per_image, 16, rel_tol=1e-12)
    assert math.isclose(whole.fixed_bits_per_image, 16, rel_tol=1e-12)
    some = code_usage(torch.tensor([[[0, 0], [0, 1]]]), 4)
    assert math.isclose(some.entropy, -0.75 * math.log(0.75) - 0.25 * math.log(0.25), rel_tol=1e-12)
    assert some.entropy < math.log(4)


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


def test_other_guides_and_models_are_refused():
    (model, _), x = pair(), torch.randn(3, *IMAGE)
    gaussian = Amortized(DiagonalNormal((2, 2, 2), IMAGE, MLP))
    ordinary = LatentVariableModel(StandardNormal((2, 2, 2)), model.likelihood)
    with pytest.raises(StructureError, match="quantizes none"):
        VectorQuantization().bound(ordinary, gaussian, x)
    with pytest.raises(ValueError, match="vectors of the codebook"):
        ELBO(1).bound(model, gaussian, x)
    with pytest.raises(StructureError, match="quantizes no site"):
        encode_tokens(gaussian, x)
    with pytest.raises(ValueError, match="model=vq"):
        Quantized((2, 2, 2), IMAGE, MLP, ordinary)
    with pytest.raises(ValueError, match="commitment must be 0 or above"):
        VectorQuantization(commitment=-1.0)
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        CodePrior(Codebook(3, 2), (4,))
    with pytest.raises(ConfigError, match=r"model=vq: .*accepted: \(H, W\), got \(4,\)"):
        assemble(load(["model=vq", "guide=quantized", "model.grid=[4]"]))


@pytest.mark.parametrize("particles_", [1, 3])
def test_it_runs_in_pyro(particles_):
    (model, guide), x = pair(), torch.randn(5, *IMAGE)
    loss = Trace_ELBO(num_particles=particles_, vectorize_particles=particles_ > 1, max_plate_nesting=1)
    first = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss).step(x)
    assert math.isfinite(first)


def test_hard_codes_expand():
    (_, guide), x = pair(), torch.randn(5, *IMAGE)
    q = guide.core(x)
    wide = q.expand((3, 5))
    assert isinstance(wide, HardCodes)
    assert wide.rsample().shape == (3, 5, 2, 2, 2)
    assert torch.equal(wide.log_prob(q.rsample()), torch.zeros(3, 5))
    assert torch.equal(q.log_prob(q.rsample() + 1), torch.full((5,), -torch.inf))
