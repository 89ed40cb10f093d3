"""Training step of each kind of layer, divided by the same network's dense step.

ResNet18 for 32x32 images, batch 128, masks at density 0.2, optimizer included. Pairs of steps run
back to back; the figure is the median of their ratios. Goals: at most 1.03 for fixed masks, 1.05
for soft thresholds.
"""

from benchmarks.steps import CONV_TYPES, devices, interleaved, make_step


def main() -> None:
    for device in devices():
        pairs = 9 if device.type == "cpu" else 200
        dense = make_step("DenseConv", device)
        print(f"{'ResNet18, ' + device.type:<20} {'ms':>8} {'dense ms':>9} {'ratio':>6}")
        for kind in CONV_TYPES:
            mine, base, ratio = interleaved(make_step(kind, device), dense, pairs)
            print(f"{kind:<20} {1e3 * mine:8.1f} {1e3 * base:9.1f} {ratio:6.3f}", flush=True)


if __name__ == "__main__":
    main()
