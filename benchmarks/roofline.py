"""The kernels of sparse compute against what a core can do at most, and where they break even.

One thread, float32, CPU time, batches of 64. The roofs are measured here: multiply-adds of vectors
in registers, and reads of numbers from each level of memory. Of each kernel the first table has the
FLOPs that it does (none for weights outside the mask; Winograd's algorithm: its products, not those
that it saves), the bytes of maps and weights that it has to move, and what it reaches of both
roofs. The second has the density from which a training step of a layer on 16x16 pixels is faster
with all its weights, and the density from which `startsparse.engine` computes it so.
"""

import ctypes
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from startsparse.engine import build, whole, winograd
from startsparse.engine.choice import cpu_seconds
from startsparse.engine.compiler import find_compiler
from startsparse.engine.entries import Window
from startsparse.engine.layers import Affine, MaxPool, Product
from startsparse.engine.maps import Space, to_map
from startsparse.engine.network import SparseForm
from startsparse.masks import attach_masks, draw_masks, sparse_layers
from startsparse.models.mlp import MLP
from startsparse.seeding import generator

IMAGES, CHANNELS, SIZE = 64, 64, 32  # of the layers of the first table, as in ResNet18
LEVELS = {"L1": 1 << 14, "L2": 1 << 18, "L3": 1 << 23, "memory": 1 << 28}  # bytes that are read
THREE, ONE = Window((3, 3), padding=(1, 1)), Window()
Row = tuple[str, float, float, float]  # kernel, FLOPs, bytes, seconds


def seconds(run: Callable[[], object]) -> float:
    """CPU seconds of one run, the least of a few."""
    return min(cpu_seconds(run).fastest for _ in range(2))


def roofs() -> tuple[float, dict[str, float]]:
    """FLOP/s of a core, and bytes/s from each level of memory."""
    with tempfile.TemporaryDirectory() as folder:
        sources = [Path(__file__).with_name("roofs.cpp")]
        path = build.compiled(find_compiler(), torch.float32, sources, Path(folder))
        library = ctypes.CDLL(str(path))
    count, pointer = ctypes.c_int64, ctypes.c_void_p
    library.multiply_add.restype = ctypes.c_double
    library.multiply_add.argtypes = [count, pointer]
    library.read_numbers.argtypes = [pointer, count, count, pointer]
    out, rounds = torch.zeros(4), 1 << 18
    flops = library.multiply_add(rounds, out.data_ptr())
    peak = flops / seconds(lambda: library.multiply_add(rounds, out.data_ptr()))
    speeds = {}
    for level, size in LEVELS.items():
        data, times = torch.ones(size // 4), (1 << 28) // size
        how = data.data_ptr(), len(data), times, out.data_ptr()
        speeds[level] = size * times / seconds(lambda how=how: library.read_numbers(*how))
    return peak, speeds


def product(channels: int, size: int, window: Window, density: float, form: str) -> Product:
    """A layer with a random mask that computes by its "entries", "whole", or by "winograd"."""
    space = Space(channels, size, size, window.padding[0])
    layer = Product(window, space, space)
    mask = torch.rand(channels, channels, *window.kernel, generator=generator(0, "mask")) < density
    with (
        patch.object(winograd, "break_even", lambda *_: 0 if form == "winograd" else 2),
        patch.object(whole, "break_even", lambda *_: 0 if form == "whole" else 2),
    ):
        layer.set_mask(mask)
    layer.values = nn.Parameter(torch.randn(len(layer.flat)))
    return layer


def noise(space: Space) -> Tensor:
    """The map of a batch."""
    return to_map(torch.randn(IMAGES, space.channels, space.height, space.width), space)


def products(form: str, density: float) -> Iterator[Row]:
    """The product and the gradient of its weights."""
    layer = product(CHANNELS, SIZE, THREE, density, form)
    x, y = noise(layer.input), noise(layer.output)
    part = layer.whole.forward if layer.whole else layer.entries
    values, positions = layer.values.detach(), layer.positions(x.shape[1])[0]
    flops = 2.0 * IMAGES * SIZE**2 * len(values)
    if form == "winograd":  # 36 products for a tile of 16 pixels, not 9 for each pixel
        flops *= 36 / 16 / 9
    moved = 4.0 * (x.numel() + y.numel() + len(values))
    prefix = "" if form == "entries" else f"{form}_"
    suffix = f", density {density}" if form == "entries" else ""
    run = seconds(lambda: part.gather(x, y, values, positions, add=False))
    yield f"{prefix}gather{suffix}", flops, moved, run
    run = seconds(lambda: part.weight_gradient(x, y, positions))
    yield f"{prefix}weight_gradient{suffix}", flops, moved, run


def between() -> Iterator[Row]:
    """BatchNorm with ReLU, and max-pool; FLOPs and maps that are moved are per number."""
    space, half = (Space(CHANNELS, size, size) for size in (SIZE, SIZE // 2))
    x, pool = noise(space), MaxPool(Window((2, 2), (2, 2)), space, half)
    for name, layer, flops, maps in (
        ("affine", Affine(nn.BatchNorm2d(CHANNELS), None, True, space), (6, 12), (2, 3)),
        ("max_pool", pool, (1, 3), (1.25, 2.5)),
    ):
        z, saved = layer.forward(x, IMAGES)
        d_z = torch.randn_like(z)
        runs = (
            lambda layer=layer: layer.forward(x, IMAGES),
            lambda layer=layer, saved=saved, d_z=d_z: layer.backward(saved, d_z, [None]),
        )
        for i, kernel in enumerate((name, f"{name}_backward")):
            yield kernel, flops[i] * x.numel(), 4 * maps[i] * x.numel(), seconds(runs[i])


def single() -> Iterator[Row]:
    """Inference of one image, by a network that is little more than the kernel."""
    convolution = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
    pooled = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    wide = MLP(784, 10, width=1024, hidden=2)
    image, features = torch.randn(1, CHANNELS, SIZE, SIZE), torch.randn(1, 1, 28, 28)
    for kernel, model, x, pixels in (
        ("plane_gather", pooled, image, SIZE**2),
        ("dot", wide, features, 1),
    ):
        shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
        attach_masks(model, draw_masks(shapes, [0.1] * len(shapes), 0, "bernoulli"))
        form = SparseForm(model.eval(), x.shape[1:])
        form.compute_sparsely(form.layers)
        with form.within(), torch.inference_mode():
            entries = sum(len(layer.values) for layer in form.layers.values())
            run = seconds(lambda form=form, x=x: form(x))
        moved = 8.0 * entries + 4 * x.numel() * (2 if pixels > 1 else 1)  # value and offset
        yield f"{kernel}, density 0.1", 2.0 * entries * pixels, moved, run


def break_even(channels: int, window: Window, form: str) -> float:
    """Density from which ``form`` is faster; a step by entries takes longer in proportion."""

    def step(density: float, form: str) -> float:
        layer = product(channels, 16, window, density, form)
        x, d_y = noise(layer.input), noise(layer.output)

        def run() -> None:
            _, saved = layer.forward(x, IMAGES)
            layer.backward(saved, d_y, [None])

        return seconds(run)

    low, high = step(0.2, "entries"), step(0.6, "entries")
    return 0.2 + 0.4 * (step(1.0, form) - low) / (high - low)


def main() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    peak, speeds = roofs()
    print(f"multiply-adds: {peak / 1e9:.0f} GFLOP/s; reads, GB/s:", end=" ")
    print(", ".join(f"{level} {speed / 1e9:.0f}" for level, speed in speeds.items()), flush=True)
    titles = "MFLOP", "FLOP/byte", "GFLOP/s", "of peak", "GB/s", "of memory"
    print(f"{'kernel':<30}" + "".join(f"{title:>10}" for title in titles))
    forms = ("entries", 0.02), ("entries", 0.1), ("entries", 0.5), ("whole", 1.0), ("winograd", 1.0)
    for rows in (*(products(*each) for each in forms), between(), single()):
        for kernel, flops, moved, run in rows:
            print(f"{kernel:<30}{flops / 1e6:10.1f}{flops / moved:10.2f}", end="")
            print(f"{flops / run / 1e9:10.1f}{flops / run / peak:10.2f}", end="")
            print(f"{moved / run / 1e9:10.1f}{moved / run / speeds['memory']:10.2f}", flush=True)
    print(f"\n{'breaks even':<14}{'channels':>10}{'measured':>10}{'engine':>10}")
    for channels, window, form in (
        *((channels, THREE, "winograd") for channels in (32, 64, 128, 256)),
        *((channels, ONE, "whole") for channels in (64, 256)),
        *((channels, THREE, "whole") for channels in (16, 64)),
    ):
        space = Space(channels, 16, 16)
        both = {"winograd": winograd.break_even(window, space, space)}
        both["whole"] = whole.break_even(space)
        label = f"{form} {'x'.join(map(str, window.kernel))}"
        found = break_even(channels, window, form)
        print(f"{label:<14}{channels:>10}{found:10.2f}{both[form]:10.2f}", flush=True)
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
