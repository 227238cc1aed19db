"""docs/lectures.md says what the tests say: every row they settle, every file it names, every command it gives."""

import ast
import re
from pathlib import Path

import pytest

from inference.config import load
from inference.grid import expand
from inference.studies import STUDIES

ROOT = Path(__file__).parent.parent
DOC = (ROOT / "docs" / "lectures.md").read_text()
ROWS = {
    cells[0].strip(): cells[1:]
    for cells in (line.strip("|").split("|") for line in DOC.splitlines() if re.match(r"\| \d+\.\d+ \|", line))
}
COMMANDS = sorted(set(re.findall(r"`python run\.py([^`]*)`", DOC)))


def marked_rows():
    """Row to the test files that carry its mark, read from the sources."""
    found = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "row":
                for argument in node.args:
                    found.setdefault(argument.value, set()).add(str(path.relative_to(ROOT)))
    return found


def test_the_companion_and_the_tests_name_the_same_files():
    listed = {row: set(re.findall(r"tests/[\w/]+\.py", cells[2])) for row, cells in ROWS.items()}
    assert {row: files for row, files in listed.items() if files} == marked_rows()


def test_every_row_shows_something_that_exists():
    for row, (_, run, tests) in ROWS.items():
        assert run.strip() or tests.strip(), row
    for target in re.findall(r"\]\(([^)]+)\)", DOC):
        assert (ROOT / "docs" / target).is_file(), target


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_accepted(command):
    words = command.split()
    if words[:1] == ["study"]:
        assert words[1] in STUDIES
    elif words[:1] == ["sample"]:
        assert words[1] == "RUN"
    else:
        options = [word for word in words if word not in ("train", "-m")]
        for point in expand(options):
            load(point.arguments)
