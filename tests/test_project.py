"""Promises that the project makes about itself."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [path for room in ("models", "guides", "inference") for path in sorted((ROOT / room).rglob("*.py"))]


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)


def test_no_arrow_points_back():
    """Models know neither guides nor inference, guides know models alone."""
    forbidden = {
        "models": {"guides", "inference", "run"},
        "guides": {"inference", "run"},
        "inference": {"run", "tests"},
    }
    for path in SOURCES:
        room = path.relative_to(ROOT).parts[0]
        assert not forbidden[room] & set(imports_of(path)), path


def test_only_particles_reads_traces():
    reading = [path.name for path in SOURCES if re.search(r"poutine\.trace\(|\.get_trace\(", path.read_text())]
    assert reading == ["particles.py"]


@pytest.mark.parametrize("room", ["models", "guides", "inference", "benchmarks"])
def test_every_file_has_its_place_in_the_architecture(room):
    written = (ROOT / "ARCHITECTURE.md").read_text().partition(f"\n### `{room}/`\n")[2].partition("\n### ")[0]
    files = {str(path.relative_to(ROOT / room)) for path in (ROOT / room).rglob("*.py") if "__" not in path.name}
    named = re.findall(r"`([a-z_/0-9]+\.py)`", written)
    assert sorted(named) == sorted(files)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 350


def test_continuous_integration_runs_the_test_command_of_the_readme():
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^python3 -m venv.*$", readme, re.MULTILINE)
    assert len(commands) == 2
    assert commands[1] in script.replace(" -q ", " ")


def test_constraints_are_names_and_versions():
    for line in (ROOT / "constraints.txt").read_text().split():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._]+", line), line
