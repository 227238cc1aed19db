"""Finished runs compared: on the same data, datum by datum, over seeds, and never on different ones."""

import csv
import json
import math
import statistics

import numpy as np
import pytest
import torch
import yaml

import run
from inference.comparison import mean_over_data

TINY = ["trainer.steps=4", "trainer.validations=2", "evaluation.particles=4", "evaluation.draws=2",
        "evaluation.data=60", "encoder.hidden=[4]", "decoder.hidden=[4]", "model.latent_dim=2"]  # fmt: skip
HALF = ["objective=beta", "objective.beta=0.5"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two small finished runs, and what others like them would have written."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("compared")
    for name, words in {"plain0": [], "half0": HALF}.items():
        assert run.main([*TINY, *words, f"run.dir={folder / name}"]) == 0
    torch.set_default_dtype(before)
    written(folder / "plain1", folder / "plain0", seed=1)
    written(folder / "half1", folder / "half0", seed=1)
    written(folder / "fewer", folder / "half0", evaluation={"data": 50})
    written(folder / "grey", folder / "plain0", data={"binarization": "none"}, likelihood={"name": "logistic"})
    return folder


def written(folder, like, seed=0, **changed):
    """The files of a run like another one, but for its seed or a group of options, with made-up scores."""
    folder.mkdir()
    recipe = yaml.safe_load((like / "config.yaml").read_text()) | {"seed": seed}
    for group, options in changed.items():
        recipe[group] = options if "name" in options else recipe[group] | options
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "summary.json").write_bytes((like / "summary.json").read_bytes())
    rows = list(log_p(like)) if seed == 0 else np.random.default_rng(seed).permutation(300)
    scores = np.random.default_rng(seed + len(folder.name)).normal(-40, 5, size=recipe["evaluation"]["data"])
    lines = [f"{row},{score!r},\n" for row, score in zip(rows, scores.tolist(), strict=False)]
    (folder / "evidence.csv").write_text("row,log_p,khat\n" + "".join(lines))


def log_p(folder):
    with (folder / "evidence.csv").open() as file:
        return {int(row["row"]): float(row["log_p"]) for row in csv.DictReader(file)}


def compared(runs, names, tmp_path):
    assert run.main(["compare", *(str(runs / name) for name in names), f"run.dir={tmp_path}"]) == 0
    return json.loads((tmp_path / "table.json").read_text())


def test_the_gain_of_a_run_is_the_mean_of_what_it_gains_on_each_datum(runs, tmp_path, capsys):
    first, second = compared(runs, ["plain0", "half0"], tmp_path)
    theirs, ours = log_p(runs / "plain0"), log_p(runs / "half0")
    gains = [ours[row] - theirs[row] for row in ours]
    assert second["log_p_gain"] == pytest.approx(statistics.mean(gains), rel=1e-9)
    stderr = statistics.stdev(gains) / math.sqrt(60)
    assert second["log_p_gain_stderr_over_data"] == pytest.approx(stderr, rel=1e-9)
    assert second["log_p_gain_stderr_over_data"] < 0.5 * second["test/nll_stderr_over_data"]  # pairing pays
    summary = json.loads((runs / "half0" / "summary.json").read_text())
    assert second["test/kl"] == summary["test/kl"]
    assert second["test/nll_stderr_over_data"] == pytest.approx(summary["test/nll_stderr"], rel=1e-5)
    assert first["log_p_gain"] is None
    assert (first["objective"], second["objective"], second["objective.beta"]) == ("trace_elbo", "beta", "0.5")
    assert not any("seeds" in key for key in second if key != "seeds")  # one seed has no spread
    assert f"log p(x) less the first's {statistics.mean(gains):+.2f} +- {stderr:.2f}" in capsys.readouterr().out


def test_the_page_shows_the_runs_pictures_side_by_side(runs, tmp_path):
    compared(runs, ["plain0", "half0"], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count('<div class="beside">') >= 3
    assert page.count("beta, beta 0.5, seed 0: I(x; z)") >= 3
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"compare.png", "courses.png"}


def test_runs_that_differ_in_seed_alone_are_one_row_with_both_errors(runs, tmp_path):
    rows = compared(runs, ["plain0", "half1", "plain1", "half0"], tmp_path)
    assert [row["seeds"] for row in rows] == ["0 1", "0 1"]
    by_seed = []
    for seed in (0, 1):
        theirs, ours = log_p(runs / f"plain{seed}"), log_p(runs / f"half{seed}")
        by_seed.append({row: ours[row] - theirs[row] for row in ours})
    means = [statistics.mean(gains.values()) for gains in by_seed]
    assert rows[1]["log_p_gain"] == pytest.approx(statistics.mean(means), rel=1e-9)
    assert rows[1]["log_p_gain_stderr_over_seeds"] == pytest.approx(statistics.stdev(means) / math.sqrt(2), rel=1e-9)
    assert rows[1]["log_p_gain_stderr_over_data"] > 0


def test_runs_of_two_seeds_may_each_have_started_from_alike(runs, tmp_path):
    starts = {name: str(runs / name) for name in ("plain0", "plain1", "half1")}
    written(runs / "on_half0", runs / "half0", run={"start": starts["plain0"]})
    written(runs / "on_half1", runs / "half0", seed=1, run={"start": starts["plain1"]})
    written(runs / "on_other1", runs / "half0", seed=1, run={"start": starts["half1"]})
    written(runs / "on_gone1", runs / "half0", seed=1, run={"start": str(runs / "gone")})
    written(runs / "scored1", runs / "plain0", seed=1, evaluation={"data": 50})
    written(runs / "on_scored1", runs / "half0", seed=1, run={"start": str(runs / "scored1")})
    written(runs / "on_same1", runs / "half0", seed=1, run={"start": starts["plain0"]})
    for second in ("on_half1", "on_same1", "on_scored1"):  # how a start was scored has no part in it
        rows = compared(runs, ["plain0", "plain1", "on_half0", second], tmp_path / second)
        assert [row["seeds"] for row in rows] == ["0 1", "0 1"]
        assert rows[1]["run.start"] == starts["plain0"]
    for other in ("on_other1", "on_gone1"):  # another start, and one of which nothing is known
        rows = compared(runs, ["plain0", "plain1", "on_half0", other], tmp_path / other)
        assert [row["seeds"] for row in rows] == ["0 1", "0", "1"]


def test_a_datum_that_two_runs_saw_is_one_draw():
    rng = np.random.default_rng(0)
    rows, first, second = np.arange(50), rng.normal(size=50), rng.normal(size=50)
    # The same data twice: the error is that of their averages; other data: that of a mean of independent means.
    same = mean_over_data([rows, rows[::-1]], [first, second[::-1]])
    averages = (first + second) / 2
    assert same == pytest.approx((averages.mean(), averages.std(ddof=1) / np.sqrt(50)), rel=1e-12)
    twice = mean_over_data([rows, rows], [first, first])
    assert twice == pytest.approx(mean_over_data([rows], [first]), rel=1e-12)
    apart = mean_over_data([rows, rows + 50], [first, first])
    assert apart[1] == pytest.approx(first.std(ddof=0) * np.sqrt(100 / 99) / 10, rel=1e-12)
    assert mean_over_data([rows[:1]], [first[:1]]) == (first[0], None)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["plain0"], "two runs or more"),
        (["plain0", "plain0"], "the same options and seed"),
        (["plain0", "plain1"], "differ in seed alone"),
        (["plain0", "half1"], "half1 has seed 1"),
        (["plain0", "fewer"], "60 and 50|50 and 60"),
        (["plain0", "grey"], "observations differ"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, names, message, tmp_path, capsys):
    assert run.main(["compare", *(str(runs / name) for name in names), f"run.dir={tmp_path / 'page'}"]) == 2
    told = capsys.readouterr().err
    assert any(words in told for words in message.split("|")), told
    assert told.count("\n") == 1
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(("content", "message"), [(None, "is missing"), ("row,log_p\n1,x\n", "is damaged")])
def test_a_run_without_its_evidence_is_told_how_to_get_it(runs, content, message, tmp_path, capsys):
    folder = tmp_path / "hurt"
    folder.mkdir()
    for name in ("config.yaml", "summary.json"):
        (folder / name).write_bytes((runs / "half0" / name).read_bytes())
    if content is not None:
        (folder / "evidence.csv").write_text(content)
    assert run.main(["compare", str(runs / "plain0"), str(folder)]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "run.py evaluate" in told


def test_options_are_refused(runs, capsys):
    assert run.main(["compare", str(runs / "plain0"), "seed=1"]) == 2
    assert "folders of runs" in capsys.readouterr().err
    assert run.main(["compare", str(runs / "plain0"), str(runs)]) == 2
    assert "is not a run" in capsys.readouterr().err


def test_a_run_without_a_bound_is_refused(runs, tmp_path, capsys):
    written(tmp_path / "points", runs / "half0", guide={"name": "deterministic"})
    summary = json.loads((runs / "half0" / "summary.json").read_text()) | {"test/nll": None}
    (tmp_path / "points" / "summary.json").write_text(json.dumps(summary))
    assert run.main(["compare", str(runs / "plain0"), str(tmp_path / "points")]) == 2
    assert "no log p(x) to be compared" in capsys.readouterr().err
