"""Autoencoders with bits and one-hot latents: every guide with every gradient, exact sums, evaluation, engines."""

import math
from functools import partial

import pyro
import pytest
import torch
from torch import nn

from guides.amortized import Amortized
from guides.discrete import BernoulliBits, OneHotCategoricals
from guides.enumerated import Enumerated
from guides.relaxed import (
    MeanPathBernoulliBits,
    MeanPathOneHotCategoricals,
    RelaxedBernoulliBits,
    RelaxedOneHotCategoricals,
)
from inference.annealing import AnnealedELBO
from inference.assemble import assemble
from inference.catalog import CATALOG
from inference.compiled import CompiledSVI
from inference.config import ConfigError, load
from inference.diagnostics import elbo_terms
from inference.engine import SVI, SharedOptimizer
from inference.evaluate import evaluating, log_evidence
from inference.gradients import DoublyReparameterized
from inference.objectives import ELBO, GRADIENTS, IWAE
from inference.particles import StructureError, particles, validation
from inference.stock import TraceEnum
from models.discrete import UniformBits, UniformOneHots
from models.latent import LatentVariableModel
from models.likelihoods import Bernoulli, LearnedGaussian
from models.nets import MLP, Linear
from run import main
from tests.inference.engines import PIXELS, batches, losses, parameters, shared

NET = partial(MLP, hidden=(5,))
SHAPES = {"bits": (3,), "onehot": (2, 3)}
CORES = {
    ("bits", "drawn"): BernoulliBits,
    ("bits", "straight-through"): partial(RelaxedBernoulliBits, hard=True),
    ("bits", "straight-through mean"): MeanPathBernoulliBits,
    ("onehot", "straight-through mean"): MeanPathOneHotCategoricals,
    ("bits", "relaxed"): partial(RelaxedBernoulliBits, hard=False),
    ("onehot", "drawn"): OneHotCategoricals,
    ("onehot", "straight-through"): partial(RelaxedOneHotCategoricals, hard=True),
    ("onehot", "relaxed"): partial(RelaxedOneHotCategoricals, hard=False),
}
PAIRS = pytest.mark.parametrize(("latents", "draws"), CORES)
LATENTS = pytest.mark.parametrize("latents", SHAPES)


def pair(latents, draws="drawn", **options):
    shape = SHAPES[latents]
    prior = UniformBits(shape) if latents == "bits" else UniformOneHots(shape)
    model = LatentVariableModel(prior, Bernoulli((PIXELS,), shape, NET))
    guide = Amortized(CORES[latents, draws](shape, (PIXELS,), NET, **options))
    with torch.no_grad():
        for parameter in nn.ModuleList([model, guide]).parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model, guide


def by_states(model, q, x):
    """log q, log p(x, z) and states, all ``(S, N)`` or ``(S, ...)``, written out."""
    states = q.enumerate_support(expand=False)
    count = len(states)
    log_joint = model.likelihood(states).log_prob(x) - math.log(count)
    return q.log_prob(states), log_joint, states


# --- Which gradients there are ----------------------------------------------------------------------------------


def accepted(objective, gradient, draws):
    if gradient == "covariance":
        return False
    if gradient == "reparameterized":
        return draws != "drawn"
    if gradient == "stl":
        return draws.startswith("straight-through") and objective == "elbo"
    if gradient in ("loo", "nvil_normalized"):
        return draws != "relaxed" and objective == "elbo"
    if gradient in ("vimco", "vimco_arithmetic"):
        return draws != "relaxed" and objective == "iwae"
    return gradient != "dreg" and draws != "relaxed"  # scores


def two_steps(objective, latents, draws):
    model, guide = pair(latents, draws)
    parts = nn.ModuleList([model, guide, *([objective] if isinstance(objective, nn.Module) else [])])
    svi = SVI(model, guide, SharedOptimizer(parts.parameters(), torch.optim.Adam, 0.01), objective)
    for progress, x in zip((0.0, 0.5), batches(2), strict=True):
        svi.at(progress)
        with validation(progress == 0):
            loss = svi.loss_and_grads(model, guide, x)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parts.parameters())
        assert all(p.grad.any() for p in guide.parameters())
        svi.optim(batch_size=len(x))
        svi.optim.zero_grad()
    return loss


@PAIRS
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("objective", ["elbo", "iwae"])
def test_it_trains_or_says_why_not(objective, gradient, latents, draws):
    def train():
        made = (ELBO if objective == "elbo" else IWAE)(3, gradient=gradient)
        made.prepare((PIXELS,), SHAPES[latents])
        two_steps(made, latents, draws)

    if accepted(objective, gradient, draws):
        train()
        return
    with pytest.raises(StructureError) as refusal:
        train()
    assert "use " in str(refusal.value).lower()


@PAIRS
@pytest.mark.parametrize("word", ["trace_elbo", "trace_mean_field", "trace_graph", "beta", "annealed", "wake_sleep"])
def test_other_objectives_train_or_say_why_not(word, latents, draws):
    made = CATALOG["objective"][word]()
    takes_kl_from_draws = word in ("trace_elbo", "trace_graph", "wake_sleep")
    refused = (draws == "drawn" and word in ("beta", "annealed")) or (draws == "relaxed" and takes_kl_from_draws)
    if word == "trace_mean_field" and draws == "drawn":
        pytest.skip("Pyro's has no gradient through draws, and does not say so")
    if not refused:
        two_steps(made, latents, draws)
        return
    with pytest.raises(StructureError, match=r"gradient=|use objective=elbo"):
        two_steps(made, latents, draws)


@PAIRS
def test_the_closed_form_divergence_is_an_objective_of_each(latents, draws):
    objective = ELBO(3, kl="analytic", gradient="loo" if draws == "drawn" else "reparameterized")
    assert math.isfinite(float(two_steps(objective, latents, draws)))


def test_refusals_name_what_would_do():
    model, guide = pair("bits", "relaxed")
    x = batches(1)[0]
    with pytest.raises(StructureError, match=r"relaxes the draws of \['z'\].*guide=straight_through, bits or onehot"):
        ELBO(2, gradient="loo").bound(model, guide, x)
    guide.core.hard = True
    with pytest.raises(StructureError, match=r"path through the draws of \['z'\] is that of a relaxation"):
        IWAE(2, gradient=DoublyReparameterized()).bound(model, guide, x)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prior=bits", "guide=onehot"], "guide=onehot: it draws one-hot vectors.*accepted: prior=onehot"),
        (["prior=onehot", "guide=bits"], "guide=bits: it draws bits.*accepted: prior=bits"),
        (["guide=concrete"], "guide=concrete: it relaxes discrete latents: accepted: prior=bits or prior=onehot"),
        (["prior=bits", "guide=enumerated"], "1,048,576 joint states are too many"),
        (["prior=bits", "guide=family"], "KL.*is infinite"),
        (["prior=bits", "guide=semi_amortized"], "the prior must be continuous"),
        (["prior=vamp", "guide=semi_amortized"], "made of q.*accepted: one that is not, such as prior=standard"),
        (["prior=aggregated", "guide=free"], "made of q.*accepted: one that is not"),
        (["prior=vamp", "guide=deterministic"], "prior=vamp with guide=deterministic: .*accepted: a guide with noise"),
        (["prior=onehot", "prior.classes=1"], "classes must be at least 2"),
        (["prior=onehot", "model=two_layer"], "z2 has shape|vectors"),
        (["prior=bits", "guide=concrete", "guide.minimum=3"], "minimum=3"),
    ],
)
def test_parts_that_do_not_fit(words, message):
    with pytest.raises(ConfigError, match=message):
        assemble(load(["data=iris", "likelihood=learned_gaussian", "device=cpu", *words]))


@pytest.mark.parametrize(
    ("words", "accepted"),
    [
        (["prior=bits", "guide=diagonal"], "accepted: guide=bits, concrete, straight_through or enumerated"),
        (["prior=onehot", "guide=diagonal"], "accepted: guide=onehot, concrete, straight_through or enumerated"),
        (["model=vq", "guide=diagonal"], "accepted: what guide=quantized draws"),
    ],
    ids=lambda case: case[0] if isinstance(case, list) else "",
)
def test_draws_outside_of_the_prior_are_answered_with_guides_that_fit(words, accepted, tmp_path, capsys):
    assert main(["train", *words, "trainer.steps=1", "decoder.hidden=[4]", f"run.dir={tmp_path}"]) == 2
    message = capsys.readouterr().err
    assert accepted in message
    assert "Trace Shapes" not in message


def test_one_hots_by_words():
    words = ["prior=onehot", "prior.classes=4", "model.latent_dim=3", "guide=concrete", "guide.temperature=0.8"]
    setup = assemble(load(["data=iris", "device=cpu", *words]))
    assert setup.model.prior.event_shape == setup.model.likelihood.context_shape == (3, 4)
    assert isinstance(setup.guide.core, RelaxedOneHotCategoricals)
    assert float(setup.guide.core.temperature) == pytest.approx(0.8)


# --- Against sums over all states -------------------------------------------------------------------------------


@pytest.mark.row("0.29", "4.16")
@LATENTS
def test_summing_over_states_is_exact(latents):
    """TraceEnum_ELBO over joint states; the ELBO by hand; and ELBO + KL(q || p(z|x)) = log p(x)."""
    model, guide = pair(latents)
    x = batches(1)[0]
    log_q, log_joint, _ = by_states(model, guide.core(x), x)
    elbo = (log_q.exp() * (log_joint - log_q)).sum(0)
    loss = TraceEnum(max_plate_nesting=1).differentiable_loss(model, Enumerated(guide.core), x)
    assert float(loss.detach()) == pytest.approx(-float(elbo.detach().sum()), abs=1e-10)
    evidence = log_joint.logsumexp(0)
    to_posterior = (log_q.exp() * (log_q - (log_joint - evidence))).sum(0)
    assert torch.allclose(elbo + to_posterior, evidence, rtol=0, atol=1e-10)
    assert (to_posterior > 1e-3).all()


@pytest.mark.row("0.31")
@PAIRS
def test_evaluation_is_of_hard_codes(latents, draws):
    model, guide = pair(latents, draws)
    x = batches(1, size=3)[0]
    guide.eval()
    log_q, log_joint, _ = by_states(model, guide.core(x), x)
    guide.train()
    log_w = log_joint - log_q
    elbo = (log_q.exp() * log_w).sum(0)
    error = ((log_q.exp() * (log_w - elbo).square()).sum(0) / 20_000).sqrt()
    with evaluating(model, guide, seed=0):
        drawn = particles(model, guide, x, 20_000)
        terms = elbo_terms(model, guide, x, 100)
        evidence = log_evidence(model, guide, x, 20_000).log_p
    z = drawn.latents["z"].value
    assert ((z == 0) | (z == 1)).all()
    assert ((drawn.log_weight.mean(0) - elbo).abs() < 5 * error).all()
    assert terms.kl_estimator == "closed form"
    kl = (log_q.exp() * (log_q + math.log(len(log_q)))).sum(0)
    assert torch.allclose(terms.kl, kl, atol=1e-10)
    assert torch.allclose(evidence, log_joint.logsumexp(0), atol=0.1)
    if draws == "relaxed":  # in training the value is of something else, and one must be able to see it
        soft = particles(model, guide, x, 20_000).log_weight.mean(0)
        assert ((soft - elbo).abs() > 10 * error).any()


@pytest.mark.row("0.31")
@LATENTS
def test_the_bias_of_each_gradient_of_the_bound(latents):
    """Scores are unbiased; straight-through and relaxed gradients are not, but are less noisy."""
    model, guide = pair(latents)
    x = batches(1, size=2)[0]
    wanted = list(guide.parameters())
    log_q, log_joint, _ = by_states(model, guide.core(x), x)
    elbo = (log_q.exp() * (log_joint - log_q)).sum()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(elbo, wanted)])
    found, count = {}, 2000
    many = x.repeat(count, 1)
    for draws, gradient in (
        ("drawn", "loo"),
        *((d, "reparameterized") for d in ("straight-through", "straight-through mean", "relaxed")),
    ):
        other = Amortized(CORES[latents, draws](SHAPES[latents], (PIXELS,), NET))
        other.load_state_dict(guide.state_dict())
        runs = []
        for _ in range(8):
            bound = ELBO(5, gradient=gradient).bound(model, other, many).sum() / count
            runs.append(torch.cat([g.flatten() for g in torch.autograd.grad(bound, list(other.parameters()))]))
        found[draws] = torch.stack(runs)
    away = {k: ((v.mean(0) - exact).norm() / exact.norm()).item() for k, v in found.items()}
    noise = {k: (v.std(0) / 8**0.5).norm().item() / exact.norm().item() for k, v in found.items()}
    assert away["drawn"] < 3 * noise["drawn"]
    assert away["straight-through"] > 5 * noise["straight-through"]
    assert away["straight-through mean"] > 5 * noise["straight-through mean"]
    assert away["relaxed"] > 5 * noise["relaxed"]
    slope = {k: torch.cosine_similarity(v.mean(0), exact, dim=0).item() for k, v in found.items()}
    assert min(slope.values()) > 0.5  # they still climb


@pytest.mark.row("0.30")
def test_a_latent_class_explains_two_modes_and_one_normal_does_not():
    x = torch.cat([0.3 * torch.randn(100, 1) - 2, 0.3 * torch.randn(100, 1) + 2])
    single = 0.5 * math.log(2 * math.pi * math.e * float(x.var(correction=0)))  # nats per datum, maximum likelihood
    model = LatentVariableModel(UniformOneHots((1, 2)), LearnedGaussian((1,), (1, 2), Linear))
    guide = Enumerated(OneHotCategoricals((1, 2), (1,), Linear))
    optimizer = SharedOptimizer(nn.ModuleList([model, guide]).parameters(), torch.optim.Adam, 0.05)
    svi = SVI(model, guide, optimizer, TraceEnum(max_plate_nesting=1))

    def nll():
        _, log_joint, _ = by_states(model, guide.core(x), x)
        return -float(log_joint.detach().logsumexp(0).mean())

    assert nll() > single - 0.3
    with validation(False):
        for _ in range(200):
            svi.step(x)
    assert nll() < single - 0.3


# --- In a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [False, True], ids=["relaxed", "straight-through"])
def test_single_precision_with_many_classes_and_a_low_temperature(hard):
    """Where a relaxed density in single precision fails torch's check of its simplex."""
    torch.set_default_dtype(torch.float32)
    shape = (4, 64)
    model = LatentVariableModel(UniformOneHots(shape), Bernoulli((PIXELS,), shape, Linear))
    core = RelaxedOneHotCategoricals(shape, (PIXELS,), Linear, hard=hard, temperature=0.1, minimum=0.1)
    svi = SVI(model, Amortized(core), shared(model, core, rate=0.02), ELBO(kl="analytic"))
    x, values = batches(1, size=4)[0].repeat(16, 1), []
    with pyro.validation_enabled(True):
        for _ in range(200):
            values.append(svi.step(x))
    values = torch.stack(values) / len(x)
    assert values.isfinite().all()
    assert all(p.isfinite().all() for p in core.parameters())
    assert values[-20:].mean() < values[:20].mean() - 0.1


@pytest.mark.parametrize("latents", SHAPES)
@pytest.mark.parametrize("draws", ["relaxed", "straight-through"])
def test_a_compiled_step_sees_the_temperature_fall(latents, draws):
    found = []
    for kind in (SVI, partial(CompiledSVI, inductor=False)):
        torch.manual_seed(3)
        model, guide = pair(latents, draws, rate=3.0, minimum=0.1)
        svi = kind(model, guide, shared(model, guide), ELBO(2))
        found.append((losses(svi, batches(6)), parameters(svi)))
    assert svi.why_eager is None
    assert len(svi._graphs) == 1
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-9)
    torch.manual_seed(3)
    model, guide = pair(latents, draws, rate=0.0)
    constant = SVI(model, guide, shared(model, guide), ELBO(2))
    assert not torch.allclose(losses(constant, batches(6)), found[0][0], atol=1e-6)


def test_whatever_is_annealed_is_told_and_speaks():
    model, guide = pair("bits", "relaxed", rate=2.0, minimum=0.1)
    svi = SVI(model, guide, shared(model, guide), AnnealedELBO(warmup=1.0))
    svi.at(0.25)
    assert svi.info() == {
        "train/temperature": pytest.approx(math.exp(-0.5)),
        "train/kl_weight": pytest.approx(0.25),
    }
    pyros = SVI(*pair("bits"), shared(model, guide), pyro.infer.Trace_ELBO())
    pyros.at(0.5)
    assert pyros.info() == {}
