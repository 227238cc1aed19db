"""Hidden Markov models against sums over all state sequences and Pyro's enumeration."""

import itertools

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from scipy.special import logsumexp
from scipy.stats import norm

from guides.enumerated import SummedOut, exact
from inference.em import EMError, EMSettings, fit
from inference.particles import generate, particles
from models.hmm import HMM
from models.tractable import DegenerateError

STEPS, STATES = 5, 3


def random_model(emission):
    shape = (STEPS,) if emission == "categorical" else (STEPS, 2)
    model = HMM(shape, STATES, emission, symbols=4 if emission == "categorical" else 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def data(emission, size=6):
    torch.manual_seed(1)
    return torch.randint(4, (size, STEPS)).double() if emission == "categorical" else torch.randn(size, STEPS, 2)


def log_normalized(logits):
    logits = logits.detach().numpy()
    return logits - logsumexp(logits, axis=-1, keepdims=True)


def brute_force(model, x):
    """All state sequences, ``(S^T, T)``, and log p(x, z) of each, ``(N, S^T)``."""
    paths = np.array(list(itertools.product(range(STATES), repeat=STEPS)))
    initial, transition = log_normalized(model.initial_logits), log_normalized(model.transition_logits)
    if model.emission == "categorical":
        emission = log_normalized(model.symbol_logits).T[x.long().numpy()]
    else:
        loc, scale = model.loc.detach().numpy(), model.log_scale.exp().detach().numpy()
        emission = norm(loc, scale).logpdf(x.numpy()[:, :, None]).sum(-1)
    prior = initial[paths[:, 0]] + transition[paths[:, :-1], paths[:, 1:]].sum(1)
    return paths, prior + emission[:, np.arange(STEPS), paths].sum(-1)


@pytest.mark.row("3.7")
@pytest.mark.parametrize("emission", ["categorical", "gaussian"])
def test_forward_smoothing_and_viterbi_are_sums_and_maxima_over_all_sequences(emission):
    model, x = random_model(emission), data(emission)
    paths, log_joint = brute_force(model, x)
    evidence = logsumexp(log_joint, axis=1)
    assert np.allclose(model.log_evidence(x).detach(), evidence, atol=1e-9)
    posterior = np.exp(log_joint - evidence[:, None])
    marginals = np.einsum("np,pts->nts", posterior, np.eye(STATES)[paths])
    assert np.allclose(model.smoothed(x).detach(), marginals, atol=1e-9)
    best, best_log_joint = model.viterbi(x)
    assert np.array_equal(best, paths[log_joint.argmax(1)])
    assert np.allclose(best_log_joint, log_joint.max(1), atol=1e-9)


@pytest.mark.row("3.7", "5.2")
@pytest.mark.parametrize("emission", ["categorical", "gaussian"])
def test_forward_is_pyros_enumeration(emission):
    model, x = random_model(emission), data(emission)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    bound = -elbo.loss(config_enumerate(model, "parallel"), SummedOut(model), x)
    assert bound == pytest.approx(float(model.log_evidence(x).sum().detach()), abs=1e-8)


@pytest.mark.row("3.7")
def test_the_first_state_emits_before_any_transition():
    """The convention in which the initial distribution is moved once first would give another number."""
    model, x = random_model("categorical"), data("categorical")
    _, log_joint = brute_force(model, x)
    moved = HMM((STEPS,), STATES, "categorical", symbols=4)
    moved.load_state_dict(model.state_dict())
    with torch.no_grad():
        moved.initial_logits.copy_((model.initial_logits.softmax(0) @ model.transition_logits.softmax(1)).log())
    assert np.allclose(model.log_evidence(x).detach(), logsumexp(log_joint, axis=1), atol=1e-9)
    assert not np.allclose(moved.log_evidence(x).detach(), model.log_evidence(x).detach(), atol=1e-2)


@pytest.mark.row("3.7")
@pytest.mark.parametrize("emission", ["categorical", "gaussian"])
def test_expected_counts_and_entropy_are_those_of_the_table(emission):
    model, x = random_model(emission), data(emission)
    paths, log_joint = brute_force(model, x)
    evidence = logsumexp(log_joint, axis=1, keepdims=True)
    posterior = np.exp(log_joint - evidence)
    statistics, log_evidence = model.e_step(x)
    assert np.allclose(log_evidence, evidence[:, 0], atol=1e-9)
    states = np.eye(STATES)[paths]
    pairs = np.einsum("np,pti,ptj->ij", posterior, states[:, :-1], states[:, 1:])
    assert np.allclose(statistics["transition"], pairs, atol=1e-9)
    assert np.allclose(statistics["initial"], np.einsum("np,pi->i", posterior, states[:, 0]), atol=1e-9)
    assert float(statistics["entropy"]) == pytest.approx(-(posterior * (log_joint - evidence)).sum(), abs=1e-8)
    expected = (posterior * log_joint).sum()
    assert float(model.expected_log_joint(statistics).detach()) == pytest.approx(expected, abs=1e-8)


@pytest.mark.row("3.7")
@pytest.mark.parametrize("emission", ["categorical", "gaussian"])
@pytest.mark.parametrize("variant", ["exact", "hard"])
def test_baum_welch_climbs_to_a_stationary_point(emission, variant):
    model, x = random_model(emission), data(emission, 40)
    untrained = float(model.log_evidence(x).mean().detach())
    result = fit(
        model, x, EMSettings(variant, restarts=2, iterations=3000, tolerance=0 if variant == "hard" else 1e-11)
    )
    assert result.converged
    energies = np.array([step.free_energy for step in result.history])
    assert np.all(np.diff(energies) >= -1e-10)
    assert energies[-1] > untrained + 0.1
    if variant == "exact":
        for gradient in torch.autograd.grad(model.log_evidence(x).mean(), list(model.parameters())):
            assert gradient.abs().max() < 1e-3


@pytest.mark.row("3.7")
@pytest.mark.parametrize("emission", ["categorical", "gaussian"])
def test_in_evaluation_mode_it_is_a_program_with_one_observation(emission):
    model, x = random_model(emission).eval(), data(emission)
    guide = SummedOut(model).eval()
    with torch.no_grad():
        draws = particles(model, guide, x, 4)
        exact_evidence = model.log_evidence(x)
        _, p_x, drawn = generate(model, x)
    assert draws.log_weight.shape == (4, 6)
    assert torch.allclose(draws.log_weight, exact_evidence.expand(4, 6), atol=1e-9)
    assert drawn.shape == p_x.mean.shape == x.shape
    assert torch.allclose(model.log_evidence(drawn), model.log_evidence(drawn.double()))


def test_posterior_draws_have_the_smoothed_marginals():
    model, x = random_model("gaussian"), data("gaussian", 2)
    with torch.no_grad():
        trace = poutine.trace(SummedOut(model).eval()).get_trace(x.repeat_interleave(20_000, 0))
    drawn = torch.stack([trace.nodes[f"z_{t}"]["value"] for t in range(STEPS)], 1).reshape(2, 20_000, STEPS)
    frequency = torch.nn.functional.one_hot(drawn, STATES).double().mean(1)
    expected = model.smoothed(x).detach()
    allowed = 5 * (expected * (1 - expected) / 20_000).sqrt() + 1e-6
    assert ((frequency - expected).abs() <= allowed).all()
    assert ((frequency - expected.flip(1)).abs() > allowed).any()


def test_long_sequences_do_not_underflow():
    model = HMM((2000,), 2)
    assert torch.isfinite(model.log_evidence(torch.randn(2, 2000) * 20)).all()


def test_bad_shapes_and_data_get_one_message():
    with pytest.raises(ValueError, match=r"\(T,\)"):
        HMM((1, 2, 3))
    with pytest.raises(ValueError, match="symbols"):
        HMM((5,), emission="categorical")
    with pytest.raises(ValueError, match="gaussian, categorical"):
        HMM((5,), emission="poisson")
    with pytest.raises(ValueError, match="model with discrete latents"):
        exact(HMM((5,)))
    with pytest.raises(ValueError, match="symbols 0 to 1"):
        HMM((2,), emission="categorical", symbols=2).initialize(torch.tensor([[0.0, 2.0]]))
    with pytest.raises(DegenerateError, match="constant"):
        HMM((2,)).initialize(torch.ones(3, 2))
    with pytest.raises(EMError, match="2 distinct rows"):
        fit(HMM((2,), 3), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    model = HMM((2,), 2)
    with torch.no_grad():
        model.loc[1] = 1e6
    with pytest.raises(EMError, match="state 1 of 2 is empty"):
        fit(model, torch.randn(5, 2), EMSettings(restarts=0))


@pytest.mark.row("3.7")
@pytest.mark.parametrize("emission", ["categorical", "gaussian"])
def test_forward_viterbi_and_smoothing_are_hmmlearns(emission):
    hmm = pytest.importorskip("hmmlearn.hmm", reason="hmmlearn, an implementation of somebody else, is not installed")
    model, x = random_model(emission), data(emission)
    kind = hmm.CategoricalHMM if emission == "categorical" else hmm.GaussianHMM
    theirs = kind(STATES)
    theirs.startprob_ = np.exp(log_normalized(model.initial_logits))
    theirs.transmat_ = np.exp(log_normalized(model.transition_logits))
    if emission == "categorical":
        theirs.emissionprob_ = np.exp(log_normalized(model.symbol_logits))
    else:
        theirs.means_, theirs.n_features = model.loc.detach().numpy(), 2
        theirs.covars_ = (2 * model.log_scale).exp().detach().numpy()
    for row, log_p, path, states in zip(
        x, model.log_evidence(x).detach(), model.viterbi(x)[0], model.smoothed(x).detach(), strict=True
    ):
        rows = row.long().numpy()[:, None] if emission == "categorical" else row.numpy()
        assert theirs.score(rows) == pytest.approx(float(log_p), abs=1e-8)
        assert np.array_equal(theirs.decode(rows)[1], path)
        assert np.allclose(theirs.predict_proba(rows), states, atol=1e-8)


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.ones(1, 2), EMError, "constant"),
        (torch.ones(6, 2), EMError, "constant"),
        (torch.stack([torch.arange(6.0), torch.ones(6)], 1).unsqueeze(1).expand(6, 2, 2), EMError, "constant"),
        (torch.tensor([[0.0, 1.0]]).repeat(6, 1), EMError, "2 distinct rows"),
        (torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), ValueError, "row 1"),
        (torch.empty(0, 2), ValueError, "no data"),
    ],
)
def test_degenerate_sequences_give_one_message(x, error, says):
    with pytest.raises(error, match=says):
        fit(HMM(x.shape[1:], 3), x.double(), EMSettings(restarts=2))
