"""The studies of collapse and of rate and distortion, small."""

import csv
import itertools
import json
import math

import numpy as np
import pytest

from inference.config import ConfigError, load
from inference.console import Quiet
from inference.experiment import begin
from inference.log import read_rows
from inference.studies import run_study
from inference.studies.collapse import REMEDIES, _point
from inference.studies.collapse_figures import _wrapped
from inference.studies.linear import flat_training_data

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
        (["collapse", "study.betas=[-1,1]"], "study.betas.*0 or above"),
        (["collapse", "study.linear_betas=[0,2]"], "study.linear_betas: 0 is not above 0"),
        (["collapse", "study.linear_dim=0"], "linear_dim: 0 is below 1"),
        (["collapse", "study.linear_scale=0"], "accepted: above 0"),
        (["collapse", "seed=3"], r"seed=3.*study\.seeds"),
        (["collapse", "study.seeds=[1,1]"], "twice"),
        (["collapse", "objective=annealed"], "objective=annealed.*weight 0.1"),
        (["collapse", "objective=beta", "objective.beta=2"], "objective=beta.*weight 0.1"),
        (["collapse", "study.decoders=['decoder=linear objective=iwae']"], "objective=iwae.*weight 0.1"),
        (["rate_distortion", "study.betas=[0]"], "not above 0"),
        (["rate_distortion", "study.betas=[2,2]"], "2 is there twice"),
        (["rate_distortion", "study.scale=0"], "accepted: above 0"),
        (["rate_distortion", "study.seeds=[]"], "at least one"),
        (["rate_distortion", "seed=3"], r"seed=3.*study\.seeds"),
        (["rate_distortion", "objective.beta=3"], r"objective\.beta=3.*study\.betas"),
        (["rate_distortion", "objective=elbo"], r"objective=elbo.*study\.betas"),
    ],
)
def test_bad_options_are_refused(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_study([*arguments, f"run.dir={tmp_path}"], Quiet())


def test_the_linear_models_are_of_the_data_of_the_runs(tmp_path):
    """Of a file, whose likelihood has to be stated, of a recipe's data, and not of tokens."""
    rng = np.random.default_rng(0)
    splits = {name: rng.normal(2.0, 3.0, (size, 4)) for name, size in (("train", 30), ("valid", 5), ("test", 5))}
    np.savez(tmp_path / "own.npz", **splits)
    x = flat_training_data([f"data={tmp_path / 'own.npz'}", "likelihood=gaussian", "trainer.steps=4"])
    np.testing.assert_allclose(x, splits["train"] - splits["train"].mean(0), atol=1e-6)
    (tmp_path / "recipe.yaml").write_text("data: iris\nlikelihood: gaussian\n")
    assert flat_training_data([f"experiment={tmp_path / 'recipe.yaml'}", "seed=1"]).shape[1] == 4
    (tmp_path / "own.txt").write_text("to be\nor not\n" * 20)
    with pytest.raises(ConfigError, match=r"tokens.*study\.linear_betas=\[\]"):
        flat_training_data(["data=lines", f"data.path={tmp_path / 'own.txt'}", "encoder=gru"])


def test_weights_are_told_apart_by_all_their_digits_and_reach_the_objective():
    betas = (0.12345678, 0.12345679)
    points = [_point([], beta, "mlp", "none", seed=0) for beta in betas]
    assert [point.labels["beta"] for point in points] == [str(beta) for beta in betas]
    warm = _point(["objective=combined", "objective.warmup=0.3"], 2.0, "mlp", "none", seed=0)
    assert {"objective=combined", "objective.beta=2", "objective.warmup=0.3"} <= set(warm.arguments)
    assert "objective.beta=1" in _point(["objective=beta"], 1.0, "mlp", "none", seed=0).arguments
    cured = _point(["objective=combined", "objective.warmup=0.3"], 1.0, "mlp", "free_bits", seed=0).arguments
    assert [word for word in cured if word.startswith("objective")] == [
        "objective=free_bits", "objective.nats=3", "objective.group=all"
    ]  # fmt: skip


def test_rate_and_distortion_of_a_decoder_that_knows_no_mean(tmp_path):
    """Pixels that depend on each other have a distortion in nats and none in squared error."""
    words = [*TINY, *SMALL_DECODER.split(), "data.binarization=dynamic", "data.limit=40", "evaluation.data=20"]
    options = ["study.betas=[0.5,2]", "study.seeds=[0]", "study.jobs=1", f"run.dir={tmp_path}"]
    page = run_study(["rate_distortion", *words, *options], Quiet())
    rows = json.loads((tmp_path / "table.json").read_text())
    for row in rows:
        assert row["test/distortion"] > 0
        assert row["test/squared_error"] is None
    assert page.read_text().count("<img") == 2
    assert "water-filling" not in page.read_text()


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
