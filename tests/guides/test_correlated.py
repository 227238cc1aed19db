"""Variational families on probabilistic PCA, whose posterior is a normal with correlations: every gap is known."""

import numpy as np
import pytest
import torch
from pyro import poutine

from guides.free import FreeNormal, LocallyFitted
from guides.gaussian import DiagonalNormal, FullNormal, LowRankNormal, Unconditional
from guides.refinement import nodes
from guides.semi_amortized import SemiAmortized
from inference.particles import encode
from models.nets import Linear
from models.ppca import PPCA
from tests import oracles

N, D, Q = 12, 5, 3


@pytest.fixture
def model():
    model = PPCA((D,), Q)
    with torch.no_grad():
        model.likelihood.weight.copy_(torch.randn(D, Q) + 0.7)
        model.likelihood.loc.normal_()
        model.likelihood.log_scale.fill_(-0.3)
    return model


@pytest.fixture
def x(model):
    with torch.no_grad():
        return model.evidence().sample((N,))


def plain(model):
    p = model.likelihood
    return oracles.LinearModel(p.weight.detach().numpy(), p.loc.detach().numpy(), p.scale.item())


def elbo(model, q, x):
    """The exact mean ELBO of a normal q, in numpy."""
    loc = q.mean.detach().expand(N, Q).numpy()
    scale_tril = getattr(q, "scale_tril", None)
    root = torch.diag_embed(q.stddev) if scale_tril is None else scale_tril
    covariance = (root @ root.mT).detach().expand(N, Q, Q).numpy()
    rows = zip(x.numpy(), loc, covariance, strict=True)
    return np.mean([oracles.ppca_elbo(r[None], plain(model), m[None], c)[0] for r, m, c in rows])


def closed_forms(model, x):
    """Mean log p(x), and the best mean ELBO of a full, a diagonal and an unconditional diagonal normal."""
    loc, covariance = oracles.ppca_posterior(x.numpy(), plain(model))
    precision = np.linalg.inv(covariance)
    evidence = oracles.ppca_log_evidence(x.numpy(), plain(model)).mean()
    diagonal = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    spread = loc - loc.mean(0)
    blind = 0.5 * np.einsum("ni,ij,nj->n", spread, precision, spread).mean()
    return evidence, evidence - diagonal, evidence - diagonal - blind


def set_guides(model, x):
    """The best member of each family, written into its parameters."""
    with torch.no_grad():
        p, exact = model.likelihood, model.posterior(x)
        root = exact.scale_tril[0]
        covariance = root @ root.T
        gain = covariance @ p.weight.T / p.scale**2
        log_scale = -0.5 * torch.linalg.inv(covariance).diagonal().log()
        full, low_rank = FullNormal((Q,), (D,), Linear), LowRankNormal((Q,), (D,), Linear, rank=Q - 1)
        diagonal, blind = DiagonalNormal((Q,), (D,), Linear), Unconditional((Q,), (D,))
        for core in (full, low_rank, diagonal):
            core.net.output.weight.zero_()
            core.net.output.weight[:Q] = gain
            core.net.output.bias[:Q] = -gain @ p.loc
        diagonal.net.output.bias[Q:] = log_scale
        rows, columns = full.places
        full.net.output.bias[Q : 2 * Q] = root.diagonal().log()
        full.net.output.bias[2 * Q :] = (root / root.diagonal()[:, None])[rows, columns]
        # what is left of a covariance without its least eigenvalue has a rank of one less
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        low_rank.net.output.bias[Q : 2 * Q] = 0.5 * eigenvalues[0].log()
        factor = vectors[:, 1:] * (eigenvalues[1:] - eigenvalues[0]).sqrt()
        low_rank.net.output.bias[2 * Q :] = factor.flatten()
        blind.loc.copy_(exact.mean.mean(0))
        blind.log_scale.copy_(log_scale)
    return full, low_rank, diagonal, blind


@pytest.mark.row("0.5", "1.3", "2.11", "5.6")
def test_set_guides_attain_their_closed_forms_in_order(model, x):
    evidence, diagonal, blind = closed_forms(model, x)
    found = [elbo(model, core(x), x) for core in set_guides(model, x)]
    assert found == pytest.approx([evidence, evidence, diagonal, blind], abs=1e-8)
    assert evidence > diagonal + 0.01 > blind + 0.02


def bound(model, q, x):
    """The ELBO of a normal q, exact and differentiable: expectations of quadratics over the nodes."""
    root = getattr(q, "scale_tril", None)
    root = torch.diag_embed(q.stddev) if root is None else root
    z = q.mean + torch.einsum("...ij,sj->s...i", root, nodes(Q)).reshape(-1, *q.batch_shape, Q)
    z = z if q.batch_shape else z[:, None]
    joint = model.prior().log_prob(z) + model.likelihood(z).log_prob(x)
    return joint.mean() + q.entropy().mean()


def fit(parameters, objective, steps=200):
    optimizer = torch.optim.LBFGS(parameters, max_iter=20, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -objective()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


TRAINED = {"full": FullNormal, "diagonal": DiagonalNormal}


@pytest.mark.row("0.5", "1.3", "2.11", "5.6")
@pytest.mark.parametrize("name", [*TRAINED, "unconditional"])
def test_trained_guides_reach_them(model, x, name):
    full, diagonal, blind = closed_forms(model, x)
    best = {"full": full, "diagonal": diagonal, "unconditional": blind}[name]
    core = TRAINED[name]((Q,), (D,), Linear) if name in TRAINED else Unconditional((Q,), (D,))
    assert elbo(model, core(x), x) < best - 0.1
    fit(core.parameters(), lambda: bound(model, core(x), x))
    assert elbo(model, core(x), x) == pytest.approx(best, abs=1e-4)


def test_the_nodes_are_exact_for_quadratics():
    for dim in (1, 2, 3, 4, 7, 8, 20):
        points = nodes(dim)
        assert dim < len(points) <= max(2 * dim, 2)
        assert torch.equal(points.mean(0), torch.zeros(dim))
        assert torch.equal(points.T @ points / len(points), torch.eye(dim))


def test_a_local_fit_has_no_amortization_gap(model, x):
    best = closed_forms(model, x)[1]
    short, long = LocallyFitted(model, steps=1), LocallyFitted(model, steps=300)
    assert elbo(model, short(x), x) < best - 0.01
    assert elbo(model, long(x), x) == pytest.approx(best, abs=1e-6)
    assert not list(long.parameters())


def test_a_table_of_free_parameters_has_no_amortization_gap(model, x):
    best, guide = closed_forms(model, x)[1], FreeNormal((Q,), N)
    assert elbo(model, encode(guide, x)["z"], x) < best - 0.1
    fit(guide.parameters(), lambda: bound(model, encode(guide, x)["z"], x))
    assert elbo(model, encode(guide, x)["z"], x) == pytest.approx(best, abs=1e-6)
    rows = torch.tensor([3, 1])
    some = poutine.trace(guide).get_trace(x[rows], rows).nodes["z"]["fn"]
    assert torch.equal(some.mean, guide.loc[rows])
    assert torch.equal(some.stddev, guide.log_scale[rows].exp())


def test_refinement_closes_the_amortization_gap(model, x):
    """An encoder that is constant and wrong is improved on by every step."""
    best = closed_forms(model, x)[1]
    gaps = []
    for steps in (1, 2, 5, 20, 300):
        core = SemiAmortized(model, Linear, steps=steps)
        with torch.no_grad():
            for parameter in core.parameters():
                parameter.fill_(0.1)
        gaps.append(best - elbo(model, core(x), x))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.1
    assert gaps[-1] == pytest.approx(0, abs=1e-6)


def test_one_full_step_solves_a_problem_without_correlations(x):
    model = PPCA((D,), Q)
    model.maximum_likelihood(x)
    core = SemiAmortized(model, Linear, steps=1, step_size=1.0)
    with torch.no_grad():
        core.start.net.output.weight[Q:] = 0  # standard deviations start at those of the prior
    q, exact = core(x), model.posterior(x)
    assert torch.allclose(q.mean, exact.mean, atol=1e-10)
    assert torch.allclose(q.stddev, exact.stddev, atol=1e-10)


@pytest.mark.parametrize("unroll", [True, False])
def test_gradients_through_the_steps(model, x, unroll):
    core = SemiAmortized(model, Linear, steps=3, unroll=unroll)
    parameters = [core.start.net.output.weight, model.likelihood.weight]

    def loss():
        return -bound(model, core(x), x)

    with torch.no_grad():
        value = loss()
    assert value.item() == pytest.approx(loss().item(), abs=1e-9)  # the steps are the same with and without gradients
    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        for size in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(size * direction)
                values.append(loss().item())
                parameter.sub_(size * direction)
        slope, found = (values[0] - values[1]) / 2e-5, (gradient * direction).sum().item()
        if unroll:
            assert found == pytest.approx(slope, rel=1e-5)
        else:
            assert found != pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: LowRankNormal((Q,), (D,), Linear, rank=4), "rank must lie between 1 and the number of latents, 3"),
        (lambda m: FullNormal((2, 2), (D,), Linear), r"event_shape \(D,\), got \(2, 2\)"),
        (lambda m: LocallyFitted(m, steps=0), "steps must be at least 1"),
        (lambda m: SemiAmortized(m, Linear, step_size=2.0), r"step_size must lie in \(0, 1\]"),
        (lambda m: LocallyFitted(Linear((2,), (2,))), "made of a prior and a likelihood"),
        (lambda m: FreeNormal((Q,), N)(torch.zeros(4, D)), "has parameters for 12 data and was given 4"),
    ],
)
def test_bad_options(model, make, message):
    with pytest.raises(ValueError, match=message):
        make(model)
