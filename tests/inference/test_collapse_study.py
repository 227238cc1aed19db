"""The studies of collapse and of rate and distortion, small."""

import csv
import itertools
import json
import math

import pytest

from inference.config import ConfigError, load
from inference.console import Quiet
from inference.experiment import begin
from inference.log import read_rows
from inference.studies import run_study
from inference.studies.collapse import REMEDIES, _point
from inference.studies.collapse_figures import _wrapped

TINY = [
    "trainer.steps=4",
    "evaluation.particles=4",
    "evaluation.draws=2",
    "encoder.hidden=[8]",
    "trainer.validations=2",
]


@pytest.mark.row("5.8")
def test_the_collapse_study_measures_every_cell_along_the_training(tmp_path):
    free = "objective=free_bits objective.nats=0.3"
    cells = ["study.betas=[0.5,1]", "study.decoders=['decoder=linear']", f"study.remedies=[none,'{free}']"]
    linear = ["study.linear_betas=[4]", "study.linear_steps=3", "study.linear_dim=3"]
    options = [*cells, *linear, "study.seeds=[0]", "study.jobs=1"]
    page = run_study(["collapse", *TINY, *options, f"run.dir={tmp_path / 'study'}"], Quiet())
    rows = json.loads((tmp_path / "study" / "table.json").read_text())
    assert [(r["beta"], r["remedy"]) for r in rows] == [("0.5", "none"), ("1", "none"), ("1", free)]
    for row in rows:
        assert 0 <= row["test/mutual_information"] <= math.log(300)
        assert row["test/kl"] == pytest.approx(row["test/mutual_information"] + row["test/marginal_kl"], abs=1e-6)
        assert row["test/kl_to_posterior"] == pytest.approx(-row["test/nll"] - row["test/elbo"], abs=1e-9)
    with (tmp_path / "study" / "curves.csv").open() as file:
        steps = list(csv.DictReader(file))
    assert [(r["remedy"], r["step"]) for r in steps[-2:]] == [(free, "2"), (free, "4")]
    assert all(
        r[name] for r in steps for name in ("kl", "mutual_information", "active_units", "kl_to_posterior", "nll")
    )
    used = tmp_path / "study" / "runs" / json.loads((tmp_path / "study/runs/runs.json").read_text())[-1]["run"]
    assert "nats: 0.3" in (used / "config.yaml").read_text()
    text = page.read_text()
    assert text.count("<img") >= 4
    assert "Lucas et al. 2019" in text


@pytest.mark.row("3.22")
def test_the_rate_distortion_study_places_every_run(tmp_path):
    options = ["study.betas=[0.5,8]", "study.seeds=[0]", "study.linear_steps=3", "study.linear_dim=3", "study.jobs=1"]
    page = run_study(["rate_distortion", *TINY, *options, f"run.dir={tmp_path / 'study'}"], Quiet())
    rows = json.loads((tmp_path / "study" / "table.json").read_text())
    assert [row["beta"] for row in rows] == ["0.5", "8"]
    for row in rows:
        # The Gaussian's nats and squared error are one number, up to the noise's scale.
        nats = row["test/squared_error"] / (2 * 0.2**2) + 32 * math.log(2 * math.pi * 0.2**2)
        assert nats == pytest.approx(row["test/distortion"], rel=1e-5)
        assert row["above_envelope"] >= 0
        assert row["linear/exact_active"] <= 3
    assert min(row["above_envelope"] for row in rows) == 0
    assert page.read_text().count("<img") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collapse", "study.remedies=[prayer]"], "prayer.*none, beta_half"),
        (["collapse", "study.remedies=[annealing+cyclical]"], r"annealing.cyclical.*twice what objective\.warmup is"),
        (["collapse", "study.remedies=[vq+mmd]"], "vq.mmd.*twice what objective is"),
        (["collapse", "study.decoders=[]"], "at least one"),
        (["rate_distortion", "study.betas=[0]"], "not above 0"),
        (["rate_distortion", "study.seeds=[]"], "at least one"),
    ],
)
def test_bad_options_are_refused(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_study([*arguments, f"run.dir={tmp_path}"], Quiet())


SMALL_DECODER = (
    "likelihood=pixelcnn likelihood.channels=2 likelihood.kernel=3 likelihood.layers=1 likelihood.features=1 "
    "decoder=linear"
)


MANY = ("beta_half+annealing+free_bits+mmd+aggressive+committed+skip", "cyclical+free_bits+mmd+semi_amortized")


def combinations():
    """Every remedy, every two that can be told apart, and as many as there are."""
    words = [word for word in REMEDIES if word != "none"]
    together = [f"{a}+{b}" for a, b in itertools.combinations(words, 2) if compatible(a, b)]
    return [*words, *together, *MANY]


def compatible(first, second):
    """Not two schedules of the KL, nor two guides; codes have no bound of another kind."""
    if {first, second} == {"annealing", "cyclical"} or {first, second} == {"committed", "semi_amortized"}:
        return False
    return "vq" not in (first, second) or bool({first, second} & {"aggressive", "skip"})


@pytest.mark.parametrize("remedy", combinations())
def test_every_remedy_and_every_two_of_them_train(remedy, tmp_path):
    words = ["encoder.hidden=[4]", "data.limit=60", "data.batch_size=20", "trainer.steps=2"]
    point = _point(words, 1.0, SMALL_DECODER, remedy, seed=0)
    given = [word for word in point.arguments if not word.startswith(("trainer.", "evaluation."))]
    run = begin(load([*given, "trainer.steps=2", "trainer.validations=1", f"run.dir={tmp_path / 'run'}"]), Quiet())
    run.trainer.fit()
    (row,) = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "valid/kl" in row]
    assert math.isfinite(row["valid/elbo"])
    if "committed" in remedy:
        assert row["valid/kl"] > 3  # the rate, in nats


def test_names_of_many_remedies_are_written_on_several_lines():
    assert _wrapped("free_bits") == "free bits"
    written = _wrapped("annealing+free_bits+mmd+aggressive+skip")
    assert written.replace("\n", "") == "annealing+free bits+mmd+aggressive+skip"
    assert max(len(line) for line in written.split("\n")) <= 18
