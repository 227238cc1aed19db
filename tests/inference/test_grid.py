import csv
import io
import json
import statistics

import pytest

from inference.config import ConfigError
from inference.console import Quiet
from inference.grid import expand, grid, run_grid
from inference.table import Table, mean_and_stderr, over_seeds

TINY = ["trainer.steps=4", "evaluation.particles=4", "evaluation.draws=2", "encoder.hidden=[4]", "decoder.hidden=[4]"]


def test_a_grid_is_every_combination():
    points = expand(["guide=diagonal,full", "seed=range(0,3)", "trainer.steps=7", "encoder.hidden=[4,4]"])
    assert len(points) == 6
    assert len({point.name for point in points}) == 6
    assert points[0].labels == {"guide": "diagonal", "seed": "0"}
    assert all("trainer.steps=7" in p.arguments and "encoder.hidden=[4,4]" in p.arguments for p in points)


def test_mean_and_standard_error_are_those_of_the_statistics_module():
    values = [3.0, 5.5, -1.25, 8.0]
    mean, stderr = mean_and_stderr(values)
    assert mean == pytest.approx(statistics.mean(values), abs=1e-14)
    assert stderr == pytest.approx(statistics.stdev(values) / 2, abs=1e-14)
    assert mean_and_stderr([2.0]) == (2.0, None)
    assert mean_and_stderr([]) == (None, None)


def test_seeds_are_averaged_and_failures_counted_apart():
    records = [
        {"guide": "a", "seed": "0", "test/elbo": 1.0},
        {"guide": "a", "seed": "1", "test/elbo": 3.0},
        {"guide": "b", "seed": "0", "test/elbo": 7.0},
        {"guide": "b", "seed": "1", "error": "it broke"},
    ]
    rows = over_seeds(records, ["guide", "seed"], ["test/elbo"]).records()
    assert rows[0] == {"guide": "a", "runs": 2, "test/elbo": 2.0, "test/elbo_stderr": 1.0, "failed": 0}
    assert rows[1] == {"guide": "b", "runs": 1, "test/elbo": 7.0, "test/elbo_stderr": None, "failed": 1}


def test_a_table_reads_back_from_csv_and_json():
    table = Table.from_records([{"a": "x,y", "b": 1.5}, {"a": None, "b": 2.5, "c": 3}])
    read = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert read == [{"a": "x,y", "b": "1.5", "c": ""}, {"a": "", "b": "2.5", "c": "3"}]
    assert json.loads(table.to_json()) == table.records()


@pytest.mark.row("5.9")
def test_a_grid_collects_what_its_runs_wrote_and_does_not_train_twice(tmp_path, capsys):
    arguments = ["guide=unconditional", "seed=0,1", *TINY, f"run.dir='{tmp_path}'", "grid.jobs=1"]
    page = grid(arguments, Quiet())
    rows = json.loads((tmp_path / "table.json").read_text())
    summaries = [json.loads((tmp_path / f"seed={seed}" / "summary.json").read_text()) for seed in (0, 1)]
    first, second = (summary["test/elbo"] for summary in summaries)
    assert first != second
    assert rows[0]["runs"] == 2
    assert rows[0]["test/elbo"] == pytest.approx((first + second) / 2, abs=1e-12)
    assert rows[0]["test/elbo_stderr"] == pytest.approx(abs(first - second) / 2, abs=1e-12)
    assert "2 runs over seed" in page.read_text()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoint/*")}
    grid(arguments, Quiet())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoint/*")} == written
    with pytest.raises(ConfigError, match="other options"):
        grid([a.replace("steps=4", "steps=5") for a in arguments], Quiet())


def test_one_bad_run_does_not_cost_the_others_theirs(tmp_path):
    # A learning rate that overflows at the first step, beside one that does not.
    points = expand([*TINY, "optimizer=sgd", "trainer.learning_rate=1e-5,1e38"])
    table, results = run_grid(points, tmp_path, Quiet(), jobs=1)
    good, bad = results
    assert "error" not in good
    assert "not finite" in bad["error"]
    assert [row["failed"] for row in table.records()] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=0"], "several values"),
        (["seed=0,1", "guide=nonsense"], "nonsense"),
        (["seed=0,1", "grid.jobs=many"], "grid.jobs"),
        (["seed"], "key=value"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_runs(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        grid([*arguments, f"run.dir={tmp_path / 'grid'}"], Quiet())
    assert not list((tmp_path / "grid").glob("*/config.yaml"))


def test_parts_that_do_not_fit_are_found_before_the_first_run(tmp_path):
    """A gradient that a bound has not, told by its name alone; and a pair that only a first batch tells apart."""
    for key, values, extra, named in (
        ("objective", "elbo,iwae", ["objective.gradient=stl", "objective.particles=2"], "objective=iwae: .*biased"),
        ("guide", "diagonal,semi_amortized", ["objective=piwae"], "guide=semi_amortized: .*the same parameters"),
    ):
        folder = tmp_path / key
        with pytest.raises(ConfigError, match=named):
            grid(["data=iris", f"{key}={values}", *extra, "trainer.steps=2", f"run.dir={folder}"], Quiet())
        assert not list(folder.glob("*/metrics.jsonl"))
