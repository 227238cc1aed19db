"""The VQ-VAE as a model and a guide: its bound and its gradient field by hand, on enumerable grids and on digits."""

import itertools
import math
from functools import partial

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from guides.quantized import Quantized
from inference.assemble import assemble
from inference.codes import code_usage, encode_tokens
from inference.config import ConfigError, load
from inference.diagnostics import elbo_terms, surgery
from inference.evaluate import EvaluationSettings, evaluate, log_evidence
from inference.objectives import ELBO
from inference.particles import StructureError, decode, encode, generate, particles
from inference.quantization import VectorQuantization
from models.codebook import Codebook
from models.latent import LatentVariableModel
from models.nets import MLP, ConvDecoder, ConvEncoder
from models.priors import StandardNormal
from models.vq import CodePrior, HardCodes
from tests.vq_pairs import IMAGE, pair, parts


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
