"""Layers that compute only inside their mask, on CPUs: training that gets faster with sparsity.

`products.cpp` says how. `build` compiles the kernels, `maps` and `entries` lay out activations and
weights for them, `layers` are their autograd functions, `program` runs a whole network on them, and
`network` gives a trainer's model that form and takes it back.
"""
