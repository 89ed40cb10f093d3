"""Networks that compute only inside their masks, on CPUs: training that gets faster with sparsity.

Kernels in C++: `products.cpp` says how a sparse layer is computed, `layers.cpp` has what lies
between, `planes.cpp` both for single images. `build` compiles them on first use; `maps` and
`entries` lay out activations and weights for them (`whole` and `winograd`: weights of nearly dense
layers; `compaction`: effective weights, of which others are zero in each step); `memory` keeps what
a step needs for the next one.

`lowering` writes a network as a `program`: a list of `layers`, each with its forward and backward.
`network` gives a trainer's model that form and takes it back; `single` runs the same program for
inference of a few images.

`choice` finds by trying which layers gain by it, and `compute` is how a run uses all that.
"""
