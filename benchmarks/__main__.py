"""All benchmarks, one after the other: python -m benchmarks (or make bench)."""

from benchmarks import (
    auto,
    batched,
    beside,
    distributed,
    edge_popup,
    graph_step,
    input_pipeline,
    layout,
    loop,
    peak_memory,
    prune_step,
    roofline,
    sparse_compute,
    sparse_reparameterised,
    start,
    step_time,
    topology,
)

# Memory first: a new process begins with the peak of the one that started it.
for benchmark in (
    peak_memory,
    topology,
    input_pipeline,
    layout,
    start,
    loop,
    step_time,
    prune_step,
    edge_popup,
    batched,
    graph_step,
    roofline,
    sparse_compute,
    sparse_reparameterised,
    auto,
    distributed,
    beside,
):
    print(f"\n## {benchmark.__name__}: {benchmark.__doc__.splitlines()[0]}\n", flush=True)
    benchmark.main()
