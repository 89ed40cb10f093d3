"""Try promises of docs/reliability.md with many inputs; prints a table, and exits with 1 on faults.

python -m torture [NAME ...] [--cases N] [--begin N], in tests/
"""

import argparse
import sys

import pytest

from torture.promises import all_promises, try_out


def main() -> int:
    """Try the promises that the command line names, or all."""
    promises = all_promises()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="module, or module.check (default: all)")
    parser.add_argument("--cases", type=int, help="inputs of each (default: its own number)")
    parser.add_argument("--begin", type=int, default=0, help="another number tries other inputs")
    given = parser.parse_args()
    for name in given.names:
        if not any(name in (p.name, p.name.partition(".")[0]) for p in promises):
            known = ", ".join(promise.name for promise in promises)
            parser.error(f"no promise is called {name}; there are {known}")
    broken = 0
    print("| promise | check | cases | faults | seconds |\n| --- | --- | --- | --- | --- |")
    for one in promises:
        if given.names and not {one.name, one.name.partition(".")[0]} & set(given.names):
            continue
        try:
            outcome = try_out(one, given.cases or one.cases, given.begin)
        except pytest.skip.Exception as why:
            print(f"| {one.text} | {one.name} | not tried here, {why} | | |", flush=True)
            continue
        broken += len(outcome.faults)
        numbers = f"{outcome.tried} | {len(outcome.faults)} | {outcome.seconds:.0f}"
        print(f"| {one.text} | {one.name} | {numbers} |", flush=True)
        for value, error in sorted(outcome.faults, key=lambda fault: len(repr(fault[0])))[:3]:
            print(f"{value!r}: {type(error).__name__}: {error}", file=sys.stderr)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
