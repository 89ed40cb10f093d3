"""All benchmarks, one after the other: python -m benchmarks (or make bench)."""

from benchmarks import input_pipeline, layout, peak_memory, prune_step, step_time, topology

for benchmark in (input_pipeline, layout, step_time, prune_step, topology, peak_memory):
    print(f"\n## {benchmark.__name__}: {benchmark.__doc__.splitlines()[0]}\n", flush=True)
    benchmark.main()
