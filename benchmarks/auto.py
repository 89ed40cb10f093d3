"""What ``--sparse-compute auto`` chooses, and what that costs, against the dense network.

The ratio is that of training steps: as a run takes them, with the upkeep of the masks and computing
as auto chose, over dense ones in the faster of PyTorch's two layouts. Both take turns in one run.
Two more times follow, in dense steps: that of the choice, which a run makes at the start and when
the density has changed by a fifth, and that of listing the entries after a change of masks. Goals:
ratio at most 1.02 at any density; lists at most 0.3.
"""

import time

import torch

from benchmarks.sparse_compute import NETWORKS, PAIRS, dense, network, sgd
from benchmarks.steps import OneBatch, interleaved, loop_step, random_images
from startsparse import flops
from startsparse.engine.compute import Compute
from startsparse.masks import masked_weights
from startsparse.training import Learner

DENSITIES = 0.9, 0.6, 0.4, 0.3, 0.2, 0.1, 0.02
CPU = torch.device("cpu")


def main() -> None:
    print(
        f"{'':<14} {'layers':>8} {'dense ms':>9} {'ms':>8} {'ratio':>6} {'choice':>7} {'lists':>6}"
    )
    for arch, (_, size, shape) in NETWORKS.items():
        images = random_images(size, CPU, torch.channels_last, shape)
        base, batch = dense(arch, images)
        base_step = loop_step(Learner(base, sgd(base)), OneBatch(batch))
        forward = flops.forward_flops(base, batch[:1])
        of_step = size * flops.training(forward, dict.fromkeys(forward, 1.0))
        for density in DENSITIES:
            model = network(arch, density).to(memory_format=torch.channels_last)
            compute, optimizer = Compute(model, model, mode="auto", shape=shape), sgd(model)

            started = time.perf_counter()
            compute.decide(lambda images=images: images, 10, of_step)
            choice = time.perf_counter() - started

            computes = compute.form.computes
            started = time.perf_counter()
            for name, _, mask in masked_weights(model):
                if name in computes:
                    compute.form.layers[name].set_mask(mask)
            lists = time.perf_counter() - started

            with compute.sparse(optimizer):
                learner = Learner(model, optimizer, forward=compute)
                mine = loop_step(learner, OneBatch(images))
                seconds, dense_seconds, ratio = interleaved(mine, base_step, *PAIRS[arch])
            print(
                f"{f'{arch} {density:g}':<14} {f'{len(computes)}/{len(compute.form.layers)}':>8} "
                f"{1e3 * dense_seconds:9.1f} {1e3 * seconds:8.1f} {ratio:6.3f} "
                f"{choice / dense_seconds:7.1f} {lists / dense_seconds:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
