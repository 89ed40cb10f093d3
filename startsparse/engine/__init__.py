"""Layers that compute only inside their mask, on CPUs: training that gets faster with sparsity.

`products.cpp` says how. `build` compiles the kernels, `maps` and `entries` lay out activations and
weights for them, `layers` are their autograd functions. `lowering` writes a network as a `program`
of them, `network` gives a trainer's model that form and takes it back, `choice` finds by trying
which layers gain by it, and `compute` is how a run uses all that.
"""
