"""Networks that compute only inside their masks, on CPUs: training that gets faster with sparsity.

`protocol` is what the engine asks of a device; `kernels` has it for CPUs, by functions in C++ that
`compiler` compiles on first use and `build` keeps: `products.h` says how a sparse layer is
computed, `affine.cpp` and `pooling.cpp` have what lies between, `planes.cpp` both for single
images; `structs.py` and `structs.h` are what Python passes to them. `maps` and `entries` lay out
activations and weights (`whole` and `winograd`: weights of nearly dense layers; `compaction`:
effective weights, of which others are zero in each step); `memory` keeps the buffers of a step for
the next one.

`lowering` writes a network as a `program`: a list of `layers`, each with its forward and backward.
`network` gives a trainer's model that form and takes it back; `single` runs the same program for
inference of a few images.

`choice` finds by trying which layers gain by it, and `compute` is how a run uses all that.
"""
