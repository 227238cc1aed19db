"""`inference=em` from the command line: the folder of a run, refusals, and a stop in the middle."""

import json

import numpy as np
import pytest
import torch

import run
from inference import checkpoint
from inference.assemble import assemble, start_from_data
from inference.config import ConfigError, load
from inference.data import DataError
from inference.em import EMSettings, fit
from inference.experiment import open_run
from inference.log import read_rows
from models.gmm import GaussianMixture

SMALL = ["evaluation.particles=4", "evaluation.draws=2", "data=iris"]
GMM = [*SMALL, "model=gmm", "inference=em", "model.components=2"]


@pytest.fixture(autouse=True)
def _single_precision():
    torch.set_default_dtype(torch.float32)


def test_a_run_by_em_is_a_run(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run.main(["train", *GMM, "inference.restarts=3", f"run.dir={folder}"]) == 0
    assert "the best of 3 starts" in capsys.readouterr().out
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "evidence.csv", "posterior.nc", "report.html"):
        assert (folder / name).is_file()
    summary, rows = json.loads((folder / "summary.json").read_text()), read_rows(folder / "metrics.jsonl")
    assert summary["inference"] == "em"
    assert summary["guide"] == "enumerated_exact"
    assert "objective" not in summary
    assert summary["train/converged"]
    assert len(summary["train/bounds"]) == 3
    assert summary["test/elbo"] == pytest.approx(-summary["test/nll_exact"], abs=1e-4)
    for start in range(3):
        bounds = [row[key] for row in rows if row["start"] == start for key in ("train/after_e", "train/bound")]
        assert np.diff(bounds).min() > -1e-5
        assert bounds[-1] > bounds[0] + 0.01
        assert bounds[-1] == summary["train/bounds"][start]
    setup = open_run(folder)
    x = setup.source("train").fixed()
    best = max(summary["train/bounds"])
    assert float(setup.model.log_evidence(x).mean().detach()) == pytest.approx(best, abs=1e-3)
    model = GaussianMixture((4,), 2)
    assert max(fit(model, x, EMSettings(restarts=3)).free_energies) == pytest.approx(best, abs=1e-5)
    told = {key: value for key, value in summary.items() if key.startswith("train/")}
    assert run.main(["evaluate", str(folder)]) == 0
    again = json.loads((folder / "summary.json").read_text())
    assert {key: again[key] for key in told} == told
    assert run.main(["resume", str(folder)]) == 0
    assert "nothing is left" in capsys.readouterr().out


WORDS = {
    "hard": [*GMM, "inference.variant=hard"],
    "incremental": [*GMM, "inference.variant=incremental", "inference.blocks=3"],
    "generalized": [*GMM, "inference.variant=generalized", "inference.iterations=5"],
    "diagonal": [*GMM, "model.covariance=diagonal"],
    "tied": [*GMM, "model.covariance=tied"],
    "spherical": [*GMM, "model.covariance=spherical"],
    "pPCA": [*SMALL, "model=ppca", "inference=em"],
    "HMM": [*SMALL, "model=hmm", "inference=em", "model.states=2"],
    "K-means": [*SMALL, "model=kmeans", "inference=em", "model.codewords=5"],
    "variational": [
        *[word for word in GMM if word != "inference=em"],
        *["inference=variational_em", "guide=enumerated", "objective=trace_enum", "encoder.hidden=[8]"],
        "inference.iterations=5",
    ],
    "variational, with a draw": [
        *SMALL,
        *["inference=variational_em", "inference.iterations=3", "encoder.hidden=[8]", "decoder.hidden=[8]"],
        "model.latent_dim=2",
    ],
}


def made(words, folder):
    setup = assemble(load([*words, f"run.dir={folder}"]))
    start_from_data(setup)
    parts = {"guide": setup.guide, "objective": setup.objective, "optimizer": None}
    return setup.build("inference", object, setup=setup, folder=folder, observers=(), **parts)


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_stopped_anywhere_it_goes_on_to_the_same_bits(words, tmp_path):
    """Trainers alone, without the evaluation: one that goes through, and one made anew after every second iteration."""

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = made(words, tmp_path / "whole")
    whole.fit()
    assert whole.finished
    first = made(words, tmp_path / "parts")
    first.check()
    first.save()
    for _ in range(whole.step):
        part = made(words, tmp_path / "parts")
        part.restore()
        for _ in range(2):
            if not part.em.finished:
                part._iterate()
        part.save()
        if part.em.finished:
            break
    one, other = (checkpoint.load(tmp_path / name / "checkpoint")[0] for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    bounds = [[row["train/bound"] for row in read_rows(tmp_path / n / "metrics.jsonl")] for n in ("whole", "parts")]
    assert bounds[0] == bounds[1]
    assert bounds[0][-1] > bounds[0][0]


REFUSED = {
    "inference=em": "model=composed has no e_step.*model=ppca, model=gmm, .*model=hmm, model=kmeans.*variational_em",
    "model=gmm inference=em objective=elbo": "inference=em has no objective",
    "model=gmm inference=em optimizer=sgd": "inference=em has no optimizer",
    "model=gmm inference=em guide=enumerated": "guide=enumerated untrained",
    "model=gmm inference=em trainer.steps=5": r"trainer.steps has no part.*inference\.\*",
    "model=gmm inference=em inference.variant=soft": "exact, hard, incremental, generalized",
    "model=gmm inference=em inference.iterations=0": "inference.iterations must be at least 1",
    "model=gmm inference=variational_em guide=enumerated_exact objective=trace_enum": "guide=enumerated_exact has none",
    "inference=variational_em inference.e_steps=0": "inference.e_steps must be at least 1",
    "inference=variational_em objective=trace_graph": "objective=trace_graph has its gradient alone; use .*trace_elbo",
    "inference=variational_em objective=annealed": "climbs one bound",
    "inference=hmc": "inference=hmc is not known; accepted: .*em, svi, variational_em",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_em_cannot_do_is_refused(words, tmp_path):
    with pytest.raises(ConfigError, match=REFUSED[words]):
        made([*SMALL, *words.split()], tmp_path)


def saved(place, rows):
    np.savez(place, train=rows, valid=rows[:3], test=rows[:3])
    return f"data={place}"


CLOUD = np.random.default_rng(0).normal(size=(40, 4))
DEGENERATE = {
    "one point": CLOUD[:1],
    "duplicates": CLOUD[[0, 1] * 20],
    "a constant column": np.where(np.arange(4) == 2, 1.5, CLOUD),
    "all the same": np.ones((9, 4)),
    "NaN": np.where(np.arange(160).reshape(40, 4) == 7, np.nan, CLOUD),
    "a far one": np.where(np.arange(40)[:, None] == 0, 1e8, CLOUD),
}
METHODS = ["model=gmm", "model=gmm model.covariance=tied", "model=kmeans model.codewords=3", "model=ppca", "model=hmm"]


FITTED = [("model=kmeans model.codewords=3", "a constant column"), ("model=ppca", "a constant column"),
          ("model=hmm", "duplicates")]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_degenerate_data_end_in_one_line(method, tmp_path, capsys):
    for name in [name for name in DEGENERATE if (method, name) not in FITTED]:
        rows = saved(tmp_path / f"{name}.npz", DEGENERATE[name])
        status = run.main(["train", rows, "inference=em", f"run.dir={tmp_path / name}", *method.split()])
        said = capsys.readouterr().err
        assert status in (1, 2), name  # 1: the run began
        assert said.count("\n") == 1, said
        assert "; " in said, said  # and then what to try


@pytest.mark.parametrize("method", METHODS)
def test_numbers_too_large_for_their_squares_are_told_so(method, tmp_path, capsys):
    rows = saved(tmp_path / "x.npz", (1e20 * CLOUD).astype(np.float32))
    assert run.main(["train", rows, "inference=em", f"run.dir={tmp_path / 'run'}", *method.split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "constant" not in said
    assert "standardize" in said


@pytest.mark.parametrize("method", ["model=gmm", "model=gmm model.covariance=spherical", "model=hmm"])
def test_columns_that_vary_by_less_than_float32_tells_are_not_called_constant(method, tmp_path, capsys):
    rows = saved(tmp_path / "x.npz", (CLOUD + 1e6).astype(np.float32))
    assert run.main(["train", rows, "inference=em", f"run.dir={tmp_path / 'run'}", *method.split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "constant" not in said
    assert "try float64 or standardized data" in said


@pytest.mark.parametrize(("method", "name"), FITTED)
def test_degenerate_data_that_can_be_fitted_are(method, name, tmp_path):
    setup = assemble(load([saved(tmp_path / "x.npz", DEGENERATE[name]), "inference=em", *method.split()]))
    result = fit(setup.model, setup.source("train").fixed())
    assert result.converged
    assert np.isfinite(result.free_energy)


def test_bits_in_a_file_go_to_models_of_bits(tmp_path):
    words = [saved(tmp_path / "bits.npz", (CLOUD > 0).astype(np.uint8)), "inference=em"]
    for model in ("tabular", "latent_class", "hmm model.emission=categorical model.symbols=2"):
        start_from_data(assemble(load([*words, *f"model={model}".split()])))
    with pytest.raises(DataError, match="observations are bits"):
        assemble(load([*words, "model=gmm"]))
