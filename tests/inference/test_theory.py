"""Rate, distortion and indeterminacy: Blahut-Arimoto, optimality conditions, and tables trained by gradients."""

import itertools
import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import xlogy

from inference import tables, theory
from inference.annealing import BetaELBO
from inference.blahut_arimoto import blahut_arimoto, mutual_information
from inference.config import ConfigError
from inference.console import Quiet
from inference.enumeration import summed
from inference.objectives import ELBO, IWAE
from inference.structure import StructureError
from inference.studies import run_study
from tests.oracles import discrete_kl, random_tables


def entropy(p):
    return -float(xlogy(p, p).sum())


def every_claim_holds(claims):
    claims = list(claims)
    assert claims
    for claim in claims:
        assert claim.holds, f"{claim.claim}: {claim.found} for {claim.expected}"
    return {claim.claim: claim for claim in claims}


def source(symbols=5, seed=0):
    return theory.random_source(symbols, seed)


# --- Blahut-Arimoto ----------------------------------------------------------------------------------------------


@pytest.mark.row("3.22")
@pytest.mark.parametrize("multiplier", [0.3, 1.0, 2.5, 6.0])
def test_a_fair_bit_has_the_rate_of_shannon(multiplier):
    found = blahut_arimoto(np.full(2, 0.5), 1 - np.eye(2), multiplier)
    error = 1 / (1 + np.exp(multiplier))
    assert found.distortion == pytest.approx(error, abs=1e-9)
    assert found.rate == pytest.approx(np.log(2) - entropy(np.array([error, 1 - error])), abs=1e-9)


def test_a_biased_bit_is_not_worth_coding_beyond_its_own_error():
    bias, hamming = np.array([0.8, 0.2]), 1 - np.eye(2)
    threshold = np.log(0.8 / 0.2)  # the slope of H(0.2) - H(D) at D = 0.2
    below, above = (blahut_arimoto(bias, hamming, threshold + step, 1e-10) for step in (-0.1, 0.3))
    assert (below.rate, below.distortion) == pytest.approx((0, 0.2), abs=1e-6)
    d = above.distortion
    assert above.rate == pytest.approx(entropy(bias) - entropy(np.array([d, 1 - d])), abs=1e-8)


@pytest.mark.row("3.22")
@pytest.mark.parametrize("seed", range(3))
def test_the_channel_meets_the_conditions_of_kuhn_and_tucker(seed):
    rng = np.random.default_rng(seed)
    p, d, multiplier = rng.dirichlet(np.ones(6)), rng.exponential(size=(6, 4)), 3.0
    found = blahut_arimoto(p, d, multiplier, 1e-11)
    kernel = np.exp(-multiplier * d)
    growth = p @ (kernel / (kernel @ found.marginal)[:, None])
    assert np.all(growth < 1 + 1e-10)
    assert np.abs((growth - 1) * found.marginal).max() < 1e-6  # equality wherever there is mass
    assert np.allclose(found.posterior, found.marginal * kernel / (kernel @ found.marginal)[:, None], atol=1e-8)

    def lagrangian(logits):
        q = np.exp(logits.reshape(6, 4) - np.log(np.exp(logits.reshape(6, 4)).sum(1, keepdims=True)))
        return mutual_information(p, q) + multiplier * float((p[:, None] * q * d).sum())

    direct = min(minimize(lagrangian, 0.3 * rng.normal(size=24), tol=1e-12).fun for _ in range(4))
    optimum = found.rate + multiplier * found.distortion
    assert lagrangian(np.zeros(24)) > optimum + 0.05
    assert optimum <= direct + 1e-9
    assert direct - optimum < 0.01  # a search without the closed forms comes near, and stops where a logit is lost


def test_blahut_arimoto_refuses_what_is_no_source():
    with pytest.raises(ValueError, match="add up to 1"):
        blahut_arimoto(np.array([0.5, 0.4]), np.eye(2), 1.0)
    with pytest.raises(ValueError, match=r"\(M, S\)"):
        blahut_arimoto(np.full(3, 1 / 3), np.eye(2), 1.0)


@pytest.mark.row("3.22")
def test_closed_form_curves():
    every_claim_holds(theory.closed_form_claims())


@pytest.mark.row("3.22", "3.27")
def test_autoencoders_trained_by_gradients_end_on_the_curve():
    every_claim_holds(theory.channel_claims(theory.trained_channels(*theory.planar_source(), (2.0,))))
    points, p, codebook = theory.planar_source()
    untrained = tables.gaussian_decoder(points, p, codebook, 0.7)
    squares = (points[:, None] - codebook).square().sum(-1).numpy()
    exact = blahut_arimoto(p.numpy(), squares, 2.0)
    spread = float((p.numpy()[:, None] * untrained.posterior * squares).sum())
    assert untrained.information + 2 * spread > exact.rate + 2 * exact.distortion + 0.1


# --- sums in place of draws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_a_bound_summed_over_states_is_its_table(beta):
    vae = tables.free_decoder(source(4), 3)
    prior, decoder = tables.prior_and_decoder(vae)
    q = random_tables(4, 3)
    vae.set_posterior(torch.tensor(q))
    expected = (q * np.log(decoder.T)).sum(1) - beta * discrete_kl(q, prior)
    found = summed(BetaELBO(beta), vae.model, vae.guide, vae.symbols, torch.arange(3))
    assert np.allclose(found.detach(), expected, atol=1e-12)


def test_only_a_mean_over_particles_is_a_sum_over_states():
    vae = tables.free_decoder(source(4), 3)
    with pytest.raises(StructureError, match="use an ELBO"):
        summed(IWAE(3), vae.model, vae.guide, vae.symbols, torch.arange(3))


# --- indeterminacy -----------------------------------------------------------------------------------------------


@pytest.mark.row("3.21")
def test_every_triple_of_tables_is_reached_by_training():
    every_claim_holds(theory.universality_claims())


@pytest.mark.row("3.23", "3.24")
def test_a_held_encoder_determines_prior_decoder_and_nothing_else():
    every_claim_holds(theory.held_encoder_claims(source(6)))
    vae = tables.free_decoder(source(6), 4)
    assert -float(vae.bound(ELBO()).detach()) > entropy(source(6).numpy()) + 0.1, "untrained"


@pytest.mark.row("3.25")
def test_information_takes_every_tenth_of_its_range():
    every_claim_holds(theory.decile_claims(source()))


@pytest.mark.row("3.19")
def test_a_universal_decoder_needs_no_latent():
    every_claim_holds(theory.collapse_claims(source()))


@pytest.mark.row("3.22", "3.26")
def test_the_transition_at_one():
    population = source()
    found = theory.transition(population, 3, (0.8, 1.0, 1.2), starts=6)
    every_claim_holds(theory.transition_claims(population, 3, found))
    assert found[0].information > 0.9
    # The best partition by all set partitions, written out another way.
    p = population.numpy()
    best = 0.0
    for cut in itertools.product(range(3), repeat=5):
        best = max(best, entropy(np.array([sum(p[i] for i in range(5) if cut[i] == k) for k in range(3)])))
    assert tables.most_informative_partition(p, 3) == pytest.approx(best, abs=1e-12)


@pytest.mark.row("3.27")
def test_the_rate_distortion_autoencoder_is_the_beta_vae():
    every_claim_holds(theory.equivalence_claims())


# --- the page ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_theory_study_prints_every_claim(tmp_path):
    page = run_study(["theory", "study.starts=6", f"run.dir={tmp_path / 'study'}"], Quiet())
    rows = json.loads((tmp_path / "study" / "table.json").read_text())
    assert {row["row"] for row in rows} == {"3.19", "3.21", "3.22", "3.23", "3.24", "3.25", "3.26", "3.27"}
    assert all(row["holds"] for row in rows)
    text = page.read_text()
    assert text.count("<img") == 3
    assert "All of them hold" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["data=mnist"], "trains on no data set"), (["study.symbols=20"], "between 2 and 8"), (["study.x=1"], "study.x")],
)
def test_bad_options_of_the_theory_study_are_refused(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_study(["theory", *arguments, f"run.dir={tmp_path}"], Quiet())
