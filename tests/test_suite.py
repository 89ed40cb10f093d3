"""How the tests themselves are laid out."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
QUICK = (TESTS / "quick.txt").read_text().split()


@pytest.mark.parametrize("file", sorted(path.name for path in TESTS.glob("*.py")))
def test_helpers_come_from_helper_files(file):
    """A change to one test file concerns no other."""
    assert not re.findall(r"^ *(?:from|import) test_\w+", (TESTS / file).read_text(), re.M)


@pytest.mark.parametrize("name", QUICK)
def test_what_make_quick_runs_exists(name):
    file, _, test = name.partition("::")
    source = (TESTS.parent / file).read_text()
    assert not test or f"\ndef {test.partition('[')[0]}(" in source
