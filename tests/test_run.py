"""The command line as a user meets it, from training to the page, in one process."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import run
from inference.config import load
from tests.browser import open_page

ROOT = Path(__file__).parent.parent
SMALL = [
    "trainer.steps=60",
    "trainer.log_every=20",
    "encoder.hidden=[16]",
    "decoder.hidden=[16]",
    "model.latent_dim=2",
    "evaluation.particles=20",
    "evaluation.draws=5",
]
KEYS = {
    "test/elbo", "test/reconstruction", "test/kl", "test/mutual_information", "test/marginal_kl", "test/active_units",
    "test/nll", "test/nll_stderr", "test/nll_particles", "test/bits_per_dim", "test/khat_median", "train/steps",
    "train/epochs", "train/seconds", "train/steps_per_second", "device", "seed", "model", "guide", "objective", "data",
    "binarization", "versions",
}  # fmt: skip
TIMES = ("train/seconds", "train/steps_per_second")


@pytest.fixture(autouse=True)
def _single_precision(_clean_state):
    """As users run it."""
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("run") / "one"
    assert run.main([*SMALL, f"run.dir={folder}"]) == 0
    torch.set_default_dtype(before)
    return folder


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.row("5.9")
def test_a_run_writes_what_it_promises(finished):
    summary = summary_of(finished)
    assert set(summary) >= KEYS
    assert summary["test/elbo"] == pytest.approx(summary["test/reconstruction"] - summary["test/kl"], abs=1e-9)
    parts = summary["test/mutual_information"] + summary["test/marginal_kl"]
    assert parts == pytest.approx(summary["test/kl"], abs=1e-9)
    assert summary["test/elbo"] < -summary["test/nll"]
    assert sum(summary["test/kl_per_dimension"]) == pytest.approx(summary["test/kl"], abs=1e-3)
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/bound" in row][-1] == 60
    assert rows[-1]["train/bound"] > rows[0]["train/bound"]  # it did learn
    for name in ("config.yaml", "posterior.nc", "report.html", "checkpoint/checkpoint.json"):
        assert (finished / name).stat().st_size > 0
    drawn = {path.stem for path in (finished / "figures").glob("*.png")}
    assert {"manifold", "latent_scatter", "reconstructions", "samples", "kl_per_dimension"} <= drawn


def test_log_p_and_khat_are_kept_datum_by_datum(finished):
    rows = np.genfromtxt(finished / "evidence.csv", delimiter=",", names=True)
    summary = summary_of(finished)
    assert sorted(rows["row"]) == list(range(300))
    assert -rows["log_p"].mean() == pytest.approx(summary["test/nll"], abs=1e-5)


def test_its_page_opens_with_all_pictures_and_no_complaint(finished, chromium, tmp_path):
    widths, complaints = open_page(chromium, finished / "report.html", tmp_path)
    assert len(widths) == len(list((finished / "figures").glob("*.png")))
    assert all(width > 0 for width in widths)
    assert complaints == []


@pytest.mark.row("5.9")
def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(finished, tmp_path):
    assert run.main([*SMALL, f"run.dir={tmp_path / 'same'}"]) == 0
    assert run.main([*SMALL, "seed=1", f"run.dir={tmp_path / 'other'}"]) == 0
    first, same, other = (summary_of(path) for path in (finished, tmp_path / "same", tmp_path / "other"))
    assert {k: v for k, v in first.items() if k not in TIMES} == {k: v for k, v in same.items() if k not in TIMES}
    assert first["test/nll"] != other["test/nll"]


def test_its_config_is_a_recipe_that_repeats_it(finished, tmp_path):
    assert run.main([f"experiment={finished / 'config.yaml'}", f"run.dir={tmp_path / 'again'}"]) == 0
    assert summary_of(tmp_path / "again")["test/nll"] == summary_of(finished)["test/nll"]


def test_a_run_on_data_by_a_relative_path_goes_on_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("bits.npy", (np.random.default_rng(0).random((60, 1, 4, 4)) < 0.3).astype(np.uint8))
    options = ["data=bits.npy", "likelihood=bernoulli", "trainer.steps=3", "evaluation.particles=2", "run.dir=one"]
    assert run.main(options) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run.main(["report", str(tmp_path / "one")]) == 0


@pytest.mark.parametrize(("recipe", "given"), [("epochs: 7", "trainer.steps=10"), ("steps: 9", "trainer.epochs=2")])
def test_a_budget_on_the_command_line_replaces_the_recipes_in_the_other_unit(tmp_path, recipe, given):
    (tmp_path / "recipe.yaml").write_text(f"trainer: {{{recipe}}}")
    settings = load([f"experiment='{tmp_path / 'recipe.yaml'}'", given]).section("trainer")
    assert (settings.steps, settings.epochs) == ((10, 0) if "steps" in given else (0, 2))


def test_evaluate_scores_again_as_asked(finished, capsys):
    before = summary_of(finished)
    assert run.main(["evaluate", str(finished), "evaluation.particles=400"]) == 0
    after = summary_of(finished)
    assert after["test/nll_particles"] == 400
    assert after["test/nll"] < before["test/nll"]  # more samples, a tighter bound
    assert run.main(["evaluate", str(finished), "evaluation.particles=20"]) == 0
    assert summary_of(finished) == before


def test_sample_report_and_list(finished, capsys):
    assert run.main(["sample", str(finished), "7"]) == 0
    with np.load(finished / "samples.npz", allow_pickle=False) as drawn:
        assert drawn["mean"].shape == drawn["x"].shape == (7, 1, 8, 8)
        assert set(np.unique(drawn["x"])) <= {0.0, 1.0}
        assert drawn["latent_z"].shape == (7, 2)
    page = (finished / "report.html").read_bytes()
    (finished / "report.html").unlink()
    assert run.main(["report", str(finished)]) == 0
    assert (finished / "report.html").read_bytes() == page
    capsys.readouterr()
    assert run.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "eq. 3). Default with guide=quantized, quantized_levels." in listed
    for word in ("digits", "diagonal", "iwae", "bernoulli", "standard", "ppca", "conv", "adagrad", "families"):
        assert f"  {word}" in listed


@pytest.mark.row("1.17")
def test_algorithm_1_with_minibatches_draws_and_adagrad(tmp_path):
    """M and L of Kingma and Welling (2014), algorithm 1, and the optimizer that they used."""
    folder = tmp_path / "aevb"
    options = ["data.batch_size=50", "objective.particles=3", "optimizer=adagrad", "trainer.learning_rate=0.05"]
    assert run.main([*SMALL, *options, f"run.dir={folder}"]) == 0
    assert run.main([*SMALL, *options, "trainer.learning_rate=1e-12", f"run.dir={tmp_path / 'still'}"]) == 0
    assert summary_of(folder)["train/epochs"] == pytest.approx(60 / -(-1297 // 50), abs=1e-3)
    assert summary_of(folder)["test/elbo"] > summary_of(tmp_path / "still")["test/elbo"] + 1


def test_a_tractable_model_is_scored_exactly_beside_the_estimate(tmp_path):
    folder = tmp_path / "ppca"
    options = ["model=ppca", "guide=exact", "objective=elbo", "data=iris", "model.latent_dim=2", "trainer.steps=400"]
    assert run.main([*options, "evaluation.particles=10", f"run.dir={folder}"]) == 0
    summary = summary_of(folder)
    # At the exact posterior every importance weight is p(x).
    assert summary["test/nll"] == pytest.approx(summary["test/nll_exact"], abs=1e-4)
    assert summary["test/elbo"] == pytest.approx(-summary["test/nll_exact"], abs=0.1)


def test_help_is_quick():
    start = time.monotonic()
    done = subprocess.run([sys.executable, "run.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 1
    for verb in run.VERBS:
        assert f"  {verb}" in done.stdout
