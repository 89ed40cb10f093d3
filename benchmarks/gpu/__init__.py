"""What only a GPU can tell about the scripts: see `benchmarks.gpu.__main__`."""
