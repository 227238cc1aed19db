"""The study of EM beside SVI: what its traces say, half step by half step."""

import json
import math

import numpy as np
import pytest
import torch

from guides.enumerated import Enumerated, FreeCategorical
from inference.config import ConfigError
from inference.console import Quiet
from inference.em import EMSettings, fit
from inference.reduction import principal
from inference.studies import run_study
from inference.studies.counterexample import em_step, log_densities, svi_step
from inference.studies.held import log_evidence, standing
from inference.studies.optima import destinations, told
from inference.studies.traces import Point, Trace, optimum_near
from models.gmm import GaussianMixture
from tests import oracles


@pytest.fixture(autouse=True)
def _single_precision():
    torch.set_default_dtype(torch.float32)


def study(folder, *words):
    net = [] if "model=ppca" in words else ["encoder.hidden=[8]"]
    page = run_study(["em_vs_svi", "data=iris", *net, *words, f"run.dir={folder}"], Quiet())
    rows = json.loads((folder / "table.json").read_text())
    ways = {row["fit"]: [other for other in rows if other["fit"] == row["fit"]] for row in rows}
    return page.read_text(), ways


@pytest.mark.row("0.27", "1.18", "5.5")
@pytest.mark.parametrize("model", ["gmm", "ppca"])
def test_em_is_monotone_and_svi_ends_where_it_does(model, tmp_path):
    options = ["model.components=2"] if model == "gmm" else []
    words = [f"model={model}", *options, "study.guides=[exact]", "study.variational=2", "study.batch_size=20"]
    page, ways = study(tmp_path, *words, "study.steps=400", "study.learning_rate=0.05")
    em, svi = ways["EM"], ways["SVI, exact"]
    assert np.diff([row["bound"] for row in em]).min() >= -1e-10
    assert np.diff([row["log_p"] for row in em]).min() >= -1e-10
    assert all(abs(row["gap"]) < 1e-8 for row in em if row["kind"] == "E")
    after_m = [row for row in em if row["kind"] == "M"]
    assert all(row["gap"] > 1e-4 for row in after_m[:5])
    assert after_m[4]["log_p"] > after_m[0]["log_p"] + 1e-3
    assert svi[0]["log_p"] == pytest.approx(em[0]["log_p"], abs=1e-12)  # one start
    assert em[-1]["log_p"] > em[0]["log_p"] + 0.5
    assert svi[-1]["log_p"] == pytest.approx(em[-1]["log_p"], abs=0.02)
    assert np.diff([row["log_p"] for row in svi]).min() < -1e-6
    assert all(abs(row["gap"]) < 1e-8 for row in svi)
    variational = ways["variational EM"]
    assert all(row["gap"] > -1e-9 for row in variational)
    assert np.diff([row["bound"] for row in variational]).min() >= -1e-10
    assert variational[-1]["bound"] > variational[0]["bound"] + 0.1
    assert page.count("<img") == 5
    assert "EM leads on to" in page
    assert "passes" in page


def test_every_guide_and_variational_em_have_a_trace(tmp_path):
    words = ["study.steps=4", "study.variational=2", "study.iterations=3", "study.components=2", "model.components=2"]
    page, ways = study(tmp_path, *words)
    assert list(ways) == ["EM", "variational EM", *(f"SVI, {g}" for g in ("exact", "amortized", "relaxed", "uniform"))]
    assert page.count("<img") == 6  # two numbers: the fits are drawn, too
    for rows in ways.values():
        assert rows[0]["kind"] == "start"
        assert all(row["gap"] > -1e-9 for row in rows)
    assert np.diff([row["bound"] for row in ways["variational EM"]]).min() >= -1e-10


def test_the_standing_a_guide_is_the_evidence_less_its_divergence():
    torch.set_default_dtype(torch.float64)
    model, x = GaussianMixture((3,), 4), torch.randn(7, 3)
    guide = Enumerated(FreeCategorical(7, 4))
    q = oracles.random_tables(7, 4)
    with torch.no_grad():
        guide.core.logits.copy_(torch.tensor(q).log())
    gap = oracles.discrete_kl(q, model.posterior(x).probs.detach().numpy()).mean()
    evidence = float(model.log_evidence(x).mean().detach())
    assert gap > 0.1
    assert standing(model, guide, x) == pytest.approx((evidence - gap, evidence), abs=1e-9)
    assert guide.training


@pytest.mark.row("1.19")
def test_the_counterexample_is_its_closed_form():
    svi, em = svi_step(), em_step()
    for outcome in (svi, em):
        before, after = (log_densities(torch.tensor(t, dtype=torch.float64)) for t in (0.0, outcome.theta))
        assert outcome.log_p_before == pytest.approx(float(before[0]), abs=1e-10)
        assert outcome.log_p_after == pytest.approx(float(after[0]), abs=1e-10)
    assert svi.bound_before == pytest.approx(float(log_densities(torch.tensor(0.0).double())[1]), abs=1e-7)
    assert svi.theta == pytest.approx(0.1 - 0.5, abs=1e-7)  # two logits, each by half of 2 (q - 1/2)
    assert svi.bound_after > svi.bound_before + 0.1
    assert svi.log_p_after < svi.log_p_before - 0.1
    assert em.theta == pytest.approx(2.0, abs=1e-9)  # the posterior's log-odds: ((1 + 1)^2 - 0) / 2
    assert em.log_p_before <= em.bound_after <= em.log_p_after
    assert em.log_p_after > em.log_p_before + 0.1


def test_principal_components_keep_what_varies_most():
    from inference.datasets import digits

    dataset = digits()
    small = principal(dataset, 5)
    x = small.splits["train"].double()
    raw = torch.as_tensor(dataset.splits["train"]).double().flatten(1)
    values = torch.linalg.eigvalsh(torch.cov(raw.T, correction=0)).flip(0)[:5]
    assert torch.allclose(x.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(torch.cov(x.T, correction=0), torch.diag(values / values.mean()), atol=1e-5)
    assert small.splits["test"].shape[1:] == (5,)
    with pytest.raises(ValueError, match="1 to 64 principal components"):
        principal(dataset, 65)


def test_small_data_are_reduced_to_fewer_components(tmp_path):
    page, _ = study(
        tmp_path, "data=digits", "study.iterations=2", "study.variational=0", "study.guides=[]", "study.steps=1"
    )
    assert "Reduced to its first 10 principal components" in page


def trace(way, end, optimum):
    return Trace(way, [Point("M", 1, 1.0, 1.0, end, end)], optimum=optimum)


def test_fits_that_end_at_different_places_are_told_apart():
    traces = [trace("EM", -2.0, -2.0), trace("SVI, exact", -1.52, -1.5), trace("SVI, uniform", -3.0, -1.9995)]
    assert destinations(traces) == {"EM": "B", "SVI, exact": "A", "SVI, uniform": "B"}
    text = told([*traces, trace("SVI, relaxed", -1.0, None)])
    assert "to A (-1.5000) from SVI, exact (0.0200); to B (-1.9995) from EM (0.0000) and SVI, uniform (1.0005)." in text
    assert "From SVI, relaxed it comes to a singular component" in text
    assert "need not end together" in text
    assert "need not end together" not in told(traces[:1])


def test_the_optimum_near_a_fit_leaves_the_fit_alone():
    torch.set_default_dtype(torch.float64)
    model, x = GaussianMixture((2,), 2), torch.randn(60, 2)
    model.initialize(x, torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = log_evidence(model, x)
    found = optimum_near(model, x, 500, 1e-10)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fit(model, x, EMSettings(iterations=500, restarts=0, tolerance=1e-10))
    assert found == pytest.approx(log_evidence(model, x), abs=1e-12)
    assert found > start + 0.01
    with torch.no_grad():
        model.loc[0], model.log_scale[0] = x[0], -8.0  # a component that has one datum
        model.lower.zero_()
    assert optimum_near(model, x, 500, 1e-10) is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=tabular"], "accepted: gmm, ppca"),
        (["study.guides=[diagonal]"], "diagonal is not known for model=gmm; accepted: exact, amortized, relaxed, unif"),
        (["guide=exact"], "this study chooses it"),
        (["study.steps=0"], "study.steps must be at least 1"),
        (["model.components=1000"], "distinct rows"),
        (["model.ridge=0.1"], "EM would climb a penalized objective, and SVI another"),
    ],
)
def test_what_the_study_cannot_do_is_refused(words, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        study(tmp_path, *words)


def test_log_densities_are_those_of_the_mixture():
    """Against numbers worked out by hand at s = 1/2: a = exp(-2) b, b = 1/sqrt(2 pi)."""
    b = 1 / math.sqrt(2 * math.pi)
    log_p, bound = log_densities(torch.tensor(0.0).double())
    assert float(log_p) == pytest.approx(math.log(b * (1 + math.exp(-2)) / 2), abs=1e-12)
    entropy = -0.1 * math.log(0.1) - 0.9 * math.log(0.9)
    assert float(bound) == pytest.approx(math.log(b / 2) + 0.9 * -2 + entropy, abs=1e-12)
