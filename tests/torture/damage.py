"""Damage to a file: what disks, networks and editors do to bytes."""

import dataclasses

from hypothesis import strategies as st

from startsparse.errors import UserError


@dataclasses.dataclass(frozen=True)
class Damage:
    """One change of a file; places are shares of its length."""

    kind: str
    place: float
    other: float
    value: int

    def of(self, data: bytes) -> bytes:
        """The damaged bytes."""
        at, to = int(self.place * len(data)), int(self.other * len(data))
        first, last = min(at, to), max(at, to)
        changed = bytearray(data)
        match self.kind:
            case "bit" if data:
                changed[at] ^= 1 << self.value % 8
            case "byte" if data:
                changed[at] = self.value
            case "head" if data:  # most of what decides lies at the beginning
                changed[at % min(400, len(data))] = self.value
            case "cut":
                del changed[at:]
            case "gap":
                del changed[first : min(last, first + 40)]
            case "more":
                changed[at:at] = bytes([self.value]) * (1 + self.value)
            case "zeros":
                changed[first:last] = bytes(last - first)
            case "twice":
                changed[at:at] = data[first : first + 64]
        return bytes(changed)


SHARES = st.floats(0, 1, exclude_max=True)
KINDS = ("bit", "byte", "head", "cut", "gap", "more", "zeros", "twice")

damages = st.builds(
    Damage, st.sampled_from(KINDS), SHARES, SHARES, st.integers(min_value=0, max_value=255)
)


def refused(function, *args, naming, **options):
    """What ``function`` returns, or None if it refuses by one line that names ``naming``."""
    try:
        return function(*args, **options)
    except UserError as error:
        line = str(error)
        assert "\n" not in line, line
        assert str(naming) in line, line
        return None
