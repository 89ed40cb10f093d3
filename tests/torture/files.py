"""Files of a run."""

import contextlib

from hypothesis import strategies as st

from startsparse.atomic import replacing
from torture.promises import promise


@promise("A write that fails leaves the old file", st.binary(max_size=64), cases=100, sample=5)
def a_failed_write(content, folder):
    path = folder / "file"
    path.write_bytes(b"old")
    with contextlib.suppress(KeyError), replacing(path) as temporary:
        temporary.write_bytes(content)
        raise KeyError
    assert path.read_bytes() == b"old"
    assert [p.name for p in folder.iterdir()] == ["file"]
