"""The MLPs of tabular.ipynb trained as one batched model, against one after the other.

The notebook's networks: width 256, breast cancer, batch 64, Adam, a dense start and ER 0.5, with
and without reset, five seeds. A round trains all 20 for one epoch in each loop, in turns. The gain
is the median over rounds of loop / batched, for one thread and for all. Narrow networks gain more,
because the overhead of a call weighs more in them. Goal: above 1 everywhere.
"""

import time

import torch

from startsparse import tabular
from startsparse.tabular import batched, tables

EPOCHS, ROUNDS = 1, 5


def seconds(loop: str, members: list[tabular.Member]) -> float:
    """Time of one training of all networks."""
    models, parts = [m.model for m in members], [m.train for m in members]
    started = time.perf_counter()
    batched.LOOPS[loop](models, parts, batched.Recipe(), EPOCHS)
    return time.perf_counter() - started


def main() -> None:
    table, threads = tables.load("breast-cancer"), torch.get_num_threads()
    print(f"{'20 MLPs, CPU':<24} {'loop ms':>8} {'batched':>8} {'gain':>6}   per network and step")
    for number in dict.fromkeys((1, threads)):
        torch.set_num_threads(number)
        for width in (256, 64):
            members = tabular.make_members(table, tabular.TabularOptions(width=width))
            steps = EPOCHS * len(members[0].train) * len(members)
            times = torch.tensor(
                [
                    [seconds(loop, members) for loop in ("loop", "batched")]
                    for _ in range(1 + ROUNDS)
                ]
            )[1:]  # the first round warms up
            loop, together = 1e3 * times.median(0).values / steps
            gain = (times[:, 0] / times[:, 1]).median()
            name = f"width {width}, {number} thread{'s' * (number > 1)}"
            print(f"{name:<24} {loop:8.2f} {together:8.2f} {gain:6.2f}", flush=True)
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
