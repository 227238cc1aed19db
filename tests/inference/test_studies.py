import json

import pytest

import run
from inference.config import ConfigError
from inference.console import Quiet
from inference.studies import run_study

TINY = ["trainer.steps=5", "evaluation.particles=4", "evaluation.draws=2", "encoder.hidden=[8]", "decoder.hidden=[8]"]


@pytest.mark.row("5.6")
def test_the_families_study_splits_the_gap_of_each_guide(tmp_path):
    options = ["study.guides=[unconditional,diagonal,free]", "study.seeds=[0]", "study.data=6", "study.steps=20"]
    page = run_study(
        ["families", *TINY, *options, "study.particles=40", "study.jobs=1", f"run.dir={tmp_path / 'study'}"], Quiet()
    )
    rows = json.loads((tmp_path / "study" / "table.json").read_text())
    assert [row["guide"] for row in rows] == ["unconditional", "diagonal", "free"]
    for row in rows:
        assert row["inference_gap"] == pytest.approx(row["approximation_gap"] + row["amortization_gap"], abs=1e-9)
        assert row["inference_gap_stderr"] > 0
    assert rows[0]["amortization_gap"] > 0  # one posterior for all data loses something
    assert abs(rows[2]["amortization_gap"]) < 0.5 * rows[0]["amortization_gap"]  # fitted one by one; few steps
    text = page.read_text()
    assert text.count("<img") == 2
    assert "python run.py study families" in text
    assert "study.guides=[unconditional,diagonal,free]" in text


@pytest.mark.row("5.7")
def test_the_estimators_study_measures_every_pair(tmp_path):
    few = ["study.particles=[1,4]", "study.moments=[0]", "study.repeats=40", "study.reference_repeats=40"]
    options = [*few, "study.reference_particles=30", "study.warm_up=20", "study.data=8", "study.jobs=1"]
    page = run_study(["estimators", *options, f"run.dir={tmp_path / 'study'}"], Quiet())
    rows = json.loads((tmp_path / "study" / "table.json").read_text())
    found = {(r["where"], r["target"], r["estimator"], r["particles"], r["block"]): r for r in rows}
    assert len(found) == len(rows)
    for k in (1, 4):
        # On the linear model the reference is in closed form, and Pyro's estimator is ours draw by draw.
        pyros = found["linear-Gaussian", "ELBO", "Pyro Trace_ELBO", k, "guide"]
        ours = found["linear-Gaussian", "ELBO", "reparameterized", k, "guide"]
        assert pyros["reference"] == "exact"
        assert pyros["variance"] == pytest.approx(ours["variance"], rel=1e-9)
        score, nvil = (found["linear-Gaussian", "ELBO", n, k, "guide"]["variance"] for n in ("score function", "NVIL"))
        assert score > 4 * nvil > 12 * ours["variance"]
        assert abs(ours["bias_along"]) < 5 * ours["bias_along_stderr"] < 2.5
    summed = found["6 Bernoulli bits after 0 steps", "ELBO", "enumerated", 1, "guide"]
    assert summed["variance"] < 1e-12
    assert abs(summed["squared_bias"]) < 1e-9
    bits = {(r["target"], r["estimator"]) for r in rows if r["where"].startswith("6")}
    assert {("ELBO", "relaxed, temperature 1"), ("ELBO", "straight-through"), ("IWAE", "VIMCO")} < bits
    paths = {(r["target"], r["estimator"]) for r in rows if r["where"].startswith("VAE")}
    assert {"TVO", "MIWAE", "PIWAE", "CIWAE", "wake", "sleep", "wake and sleep"} < {target for target, _ in paths}
    for row in rows:
        assert row["milliseconds"] > 0
        assert row["saved_bytes"] > 0
        if row["reference"] == "exact" and row["target"] == "ELBO" and row["kind"] not in ("relaxed draws",):
            assert abs(row["squared_bias"]) < 5 * row["squared_bias_stderr"] + 1e-9, row
    assert page.read_text().count("<img") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "accepted: families, estimators"),
        (["nonsense"], "got nonsense"),
        (["families", "study.guide=diagonal"], "study.guides"),
        (["families", "study.data=many"], "study.data"),
        (["families", "study.seeds=[]"], "at least one"),
        (["families", "guides=[diagonal]"], "unknown key"),
        (["estimators", "study.particles=[]"], "study.particles needs at least one number"),
        (["estimators", "study.repeats=1"], "below 2"),
    ],
)
def test_a_bad_study_is_refused(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_study([*arguments, *([f"run.dir={tmp_path}"] if arguments else [])], Quiet())


def test_the_command_line_knows_studies(capsys):
    assert run.main(["study", "nonsense"]) == 2
    assert "families" in capsys.readouterr().err
