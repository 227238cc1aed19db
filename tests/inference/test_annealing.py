"""The weighted ELBO: what it is at the exact posterior, what it is equivalent to, and how its weight changes."""

import math
from itertools import pairwise

import pyro
import pytest
import torch

from guides.amortized import Amortized
from guides.exact import ExactPosterior
from guides.gaussian import DiagonalNormal
from inference import experiment
from inference.annealing import AnnealedELBO, BetaELBO
from inference.assemble import assemble
from inference.config import ConfigError, load
from inference.objectives import ELBO
from inference.particles import particles
from models.nets import Linear
from models.ppca import PPCA
from tests.oracles import LinearModel as Oracle
from tests.oracles import gaussian_kl, ppca_elbo, ppca_log_evidence

D, Q, N = 4, 2, 6


@pytest.fixture
def linear():
    """A linear model, an affine guide and data."""
    model = PPCA((D,), Q)
    with torch.no_grad():
        model.likelihood.weight.normal_()
        model.likelihood.loc.normal_()
        model.likelihood.log_scale.fill_(-0.3)
    return model, Amortized(DiagonalNormal((Q,), (D,), Linear)), torch.randn(N, D)


def oracle(model):
    p = model.likelihood
    return Oracle(p.weight.detach().numpy(), p.loc.detach().numpy(), p.scale.item())


def posterior(guide, x):
    q = guide.core(x)
    return q.mean, q.base_dist.scale


@pytest.mark.row("1.22")
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 2.5])
def test_at_the_exact_posterior_it_is_log_p_and_the_rest_of_the_kl(weight, linear):
    model, _, x = linear
    guide = Amortized(ExactPosterior(model))
    log_p = torch.tensor(ppca_log_evidence(x.numpy(), oracle(model)))
    q = model.posterior(x)
    kl = torch.tensor([gaussian_kl(m.numpy(), q.covariance_matrix[0].detach().numpy()) for m in q.mean.detach()])
    expected = log_p + (1 - weight) * kl
    bound = BetaELBO(weight, 20_000, kl="analytic").bound(model, guide, x).detach()
    torch.testing.assert_close(bound, expected, rtol=0, atol=0.15)
    if weight < 1:
        assert (expected > log_p + 0.2).all()  # no bound
        assert (bound > log_p).all()
    torch.manual_seed(1)
    draw = BetaELBO(weight).bound(model, guide, x).detach()
    torch.manual_seed(1)
    draws = particles(model, guide, x)
    exactly = log_p + (1 - weight) * (draws.log_q - draws.log_prior)[0].detach()
    torch.testing.assert_close(draw, exactly, rtol=0, atol=1e-9)


def closed_form(model, guide, x, weight):
    """E_q log p(x|z) - weight KL of the linear model, by its formulas."""
    p = model.likelihood
    loc, scale = posterior(guide, x)
    residual = (x - p.loc - loc @ p.weight.T).square().sum(-1) + (scale**2 @ p.weight.square().T).sum(-1)
    distortion = residual / (2 * p.scale**2) + D / 2 * (2 * math.pi * p.scale**2).log()
    kl = 0.5 * (loc**2 + scale**2 - 1 - 2 * scale.log()).sum(-1)
    return -distortion - weight * kl, kl, residual


def flat_gradient(target, *programs):
    parameters = [p for program in programs for p in program.parameters()]
    found = torch.autograd.grad(target, parameters, allow_unused=True, retain_graph=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


@pytest.mark.row("1.21")
def test_value_and_gradient_are_those_of_the_closed_form(linear):
    model, guide, x = linear
    loc, scale = posterior(guide, x)
    exact, _, _ = closed_form(model, guide, x, 1.0)
    rows = [
        ppca_elbo(
            x[i : i + 1].numpy(),
            oracle(model),
            loc[i : i + 1].detach().numpy(),
            scale[i].detach().diag().square().numpy(),
        )
        for i in range(N)
    ]
    torch.testing.assert_close(exact.detach(), torch.tensor([row[0] for row in rows]))  # the formula itself
    wanted = flat_gradient(closed_form(model, guide, x, 0.4)[0].sum(), model, guide)
    draws = torch.stack(
        [
            flat_gradient(BetaELBO(0.4, 200, kl=kl).bound(model, guide, x).sum(), model, guide)
            for kl in ("analytic", "monte_carlo")
            for _ in range(100)
        ]
    )
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - wanted).abs() < 5 * error + 1e-9).all()
    elbo = flat_gradient(exact.sum(), model, guide)
    assert not ((draws.mean(0) - elbo).abs() < 5 * error + 1e-9).all()


@pytest.mark.row("1.21", "3.27")
@pytest.mark.parametrize("beta", [0.25, 1.0, 4.0])
def test_a_weight_is_a_change_of_noise_and_rate_distortion_with_another_multiplier(beta, linear):
    """beta KL + D/(2 s^2) is beta times (KL + D/(2 beta s^2)): s^2 becomes beta s^2, lambda 1/(2 beta s^2)."""
    model, guide, x = linear
    torch.manual_seed(2)
    weighted = flat_gradient(BetaELBO(beta, kl="analytic").bound(model, guide, x).sum(), model.likelihood.net, guide)
    torch.manual_seed(2)
    draws = particles(model, guide, x)
    rate = draws.analytic_kl().sum()
    decoded = draws.latents["z"].value @ model.likelihood.weight.T + model.likelihood.loc
    distortion = (x - decoded).square().sum()
    multiplier = 1 / (2 * beta * model.likelihood.scale.item() ** 2)
    rate_distortion = flat_gradient(rate + multiplier * distortion, model.likelihood.net, guide)
    torch.testing.assert_close(weighted, -beta * rate_distortion, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        model.likelihood.log_scale.add_(0.5 * math.log(beta))
    torch.manual_seed(2)
    noisier = flat_gradient(ELBO(kl="analytic").bound(model, guide, x).sum(), model.likelihood.net, guide)
    torch.testing.assert_close(weighted, beta * noisier, rtol=1e-8, atol=1e-10)


@pytest.mark.row("1.21")
def test_a_linear_warm_up_ends_at_exactly_one():
    objective = AnnealedELBO(warmup=0.3, start=0.1)
    steps = 7_000
    weights = [objective.weight_at(step / steps) for step in range(steps)]
    assert weights[0] == 0.1
    assert all(a <= b for a, b in pairwise(weights))
    assert weights[1050] == pytest.approx(0.1 + 0.9 * 0.5)
    assert all(0.1 <= w < 1 for w in weights[:2100])
    assert all(w == 1.0 for w in weights[2100:])


def test_a_cyclical_warm_up_starts_anew_and_ends_at_exactly_one():
    objective = AnnealedELBO(warmup=0.8, schedule="cyclical", cycles=4)
    weights = {p: objective.weight_at(p) for p in (0.0, 0.05, 0.1, 0.15, 0.1999, 0.2001, 0.45, 0.7, 0.8, 0.9, 1.0)}
    assert weights[0.0] == 0
    assert weights[0.05] == pytest.approx(0.5)
    assert weights[0.1] == pytest.approx(1)
    assert weights[0.15] == weights[0.1999] == 1
    assert weights[0.2001] < 0.01
    assert weights[0.45] == pytest.approx(0.5)
    assert weights[0.7] == pytest.approx(1)
    assert weights[0.8] == weights[0.9] == weights[1.0] == 1.0


def test_the_objective_listens_in_place_and_says_what_its_weight_is(linear):
    model, guide, x = linear
    objective = AnnealedELBO(warmup=0.5, kl="analytic")
    tensor = objective.kl_weight
    values = {}
    for progress in (0.0, 0.25, 0.5, 1.0):
        objective.at(progress)
        assert objective.kl_weight is tensor
        torch.manual_seed(0)
        values[progress] = objective.bound(model, guide, x).detach()
    assert objective.info() == {"train/kl_weight": 1.0}
    torch.manual_seed(0)
    draws = particles(model, guide, x)
    torch.testing.assert_close(values[0.0], draws.log_likelihood[0].detach())
    torch.testing.assert_close(values[0.25], (draws.log_likelihood - 0.5 * draws.analytic_kl())[0].detach())
    assert torch.equal(values[0.5], values[1.0])
    torch.testing.assert_close(values[1.0], (draws.log_likelihood - draws.analytic_kl())[0].detach())


def test_until_told_otherwise_it_is_the_elbo_and_no_warm_up_is_none(linear):
    model, guide, x = linear
    for objective in (AnnealedELBO(), AnnealedELBO(warmup=0.0)):
        torch.manual_seed(0)
        found = objective.bound(model, guide, x)
        torch.manual_seed(0)
        torch.testing.assert_close(found, ELBO().bound(model, guide, x))
    objective.at(0.0)
    assert objective.info() == {"train/kl_weight": 1.0}


def test_the_weight_stays_outside_of_the_scale_of_the_data(linear):
    """Pyro's own way to temper, a scale on every site, would multiply the likelihood too."""
    model, guide, x = linear
    torch.manual_seed(0)
    loss = BetaELBO(3.0, kl="analytic").differentiable_loss(model, guide, x)
    torch.manual_seed(0)
    kl = particles(model, guide, x).analytic_kl().sum()
    torch.manual_seed(0)
    pyros = pyro.infer.TraceMeanField_ELBO().differentiable_loss(model, guide, x)
    torch.testing.assert_close(loss, pyros + 2 * kl)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: BetaELBO(-1.0), "beta must be 0 or above"),
        (lambda: BetaELBO(math.nan), "beta must be 0 or above"),
        (lambda: AnnealedELBO(warmup=1.5), "warmup is a part of the run, from 0 to 1"),
        (lambda: AnnealedELBO(schedule="sigmoid"), "'linear' or 'cyclical', got 'sigmoid'"),
        (lambda: AnnealedELBO(start=2.0), r"start must lie in \[0, 1\]"),
        (lambda: AnnealedELBO(cycles=0), "cycles must be at least 1"),
    ],
)
def test_bad_options_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_the_last_step_of_a_warmup_over_the_whole_run_is_at_exactly_one(steps, tmp_path):
    small = ["model.latent_dim=2", "encoder.hidden=[4]", "decoder.hidden=[4]", f"trainer.steps={steps}"]
    config = load(["data=iris", "device=cpu", "objective=annealed", "objective.warmup=1", *small])
    trainer = experiment._trainer(assemble(config), tmp_path, None)
    weights = []
    for step in range(trainer.total_steps):
        trainer.prepare(step)
        weights.append(float(trainer.svi.objective.kl_weight))
    assert weights[-1] == 1
    assert weights == sorted(weights)
    assert steps == 1 or weights[0] == 0


@pytest.mark.parametrize(
    "bad",
    [
        "objective=beta objective.beta=inf", "objective=free_bits objective.nats=inf",
        "objective=infovae objective.scale=nan", "objective=infovae objective.scale=-5",
        "objective=infovae objective.alpha=inf", "objective=infovae objective.bandwidth=inf",
        "objective=renyi objective.alpha=nan", "objective=ciwae objective.weight=nan",
        "objective=tvo objective.first=nan",
        "objective=annealed objective.warmup=inf", "objective=annealed objective.start=nan",
        "objective=vq objective.commitment=inf", "objective=vq objective.codebook_rate=nan",
    ],
)  # fmt: skip
def test_options_that_are_no_numbers_are_refused_by_name(bad):
    word, option = bad.split()
    name = option.partition("=")[0].removeprefix("objective.")
    with pytest.raises(ConfigError, match=rf"^{word}: {name} .*got"):
        assemble(load(["data=iris", "device=cpu", *bad.split()]))
