"""How the tests themselves are laid out."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("file", sorted(path.name for path in TESTS.glob("*.py")))
def test_helpers_come_from_helper_files(file):
    """A change to one test file concerns no other."""
    assert not re.findall(r"^ *(?:from|import) test_\w+", (TESTS / file).read_text(), re.M)
