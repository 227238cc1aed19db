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
    assert rows[2]["amortization_gap"] == 0  # a fit of its own for each datum loses nothing
    text = page.read_text()
    assert text.count("<img") == 2
    assert "python run.py study families" in text
    assert "study.guides=[unconditional,diagonal,free]" in text


@pytest.mark.row("5.7")
def test_the_estimators_study_measures_every_pair(tmp_path):
    options = ["study.particles=[1,3]", "study.moments=[0]", "study.repeats=30", "study.reference_repeats=60"]
    run_study(["estimators", *options, "study.data=8", f"run.dir={tmp_path / 'study'}"], Quiet())
    rows = json.loads((tmp_path / "study" / "table.json").read_text())
    guide = {(r["where"], r["bound"], r["estimator"], r["particles"]): r for r in rows if r["block"] == "guide"}
    for k in (1, 3):
        # On the linear model the reference is in closed form, and Pyro's estimator is ours draw by draw.
        pyros = guide["linear-Gaussian", "ELBO", "Pyro Trace_ELBO", k]
        ours = guide["linear-Gaussian", "ELBO", "reparameterized", k]
        assert pyros["reference"] == "exact"
        assert pyros["variance"] == pytest.approx(ours["variance"], rel=1e-9)
        score = guide["linear-Gaussian", "ELBO", "score function", k]
        assert score["variance"] > 10 * ours["variance"]
        assert abs(ours["relative_bias"]) < 5 * ours["relative_bias_stderr"] < 2.5
    assert ("six Bernoulli bits", "IWAE", "VIMCO", 3) in guide
    for row in rows:
        assert row["milliseconds"] > 0
        assert row["saved_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "accepted: families, estimators"),
        (["nonsense"], "got nonsense"),
        (["families", "study.guide=diagonal"], "study.guides"),
        (["families", "study.data=many"], "study.data"),
        (["families", "study.seeds=[]"], "at least one"),
        (["families", "guides=[diagonal]"], "unknown key"),
    ],
)
def test_a_bad_study_is_refused(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_study([*arguments, *([f"run.dir={tmp_path}"] if arguments else [])], Quiet())


def test_the_command_line_knows_studies(capsys):
    assert run.main(["study", "nonsense"]) == 2
    assert "families" in capsys.readouterr().err
