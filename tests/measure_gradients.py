"""The time of the gradient of a 1D convolution's weights: torch's own, and as a product (robot/packing.py).

    python tests/measure_gradients.py

Convolutions of the 65.8 M U-Net of dp_cnn.py (five taps, batch 64), whose sequence is halved twice.
"""
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from robot.packing import pack


def gradient_ms(layer, x, g, repeat=15):
    times = []
    for _ in range(repeat):
        y = layer(x)
        layer.zero_grad()
        began = time.perf_counter()
        y.backward(g)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[2:])


def main():
    torch.manual_seed(0)
    print("| channels, steps | type | torch, ms | product, ms |\n|---|---|---|---|")
    for channels, steps in ((256, 16), (512, 8), (1024, 4)):
        for dtype in (torch.float32, torch.bfloat16):
            layer = nn.Conv1d(channels, channels, 5, padding=2, dtype=dtype)
            x, g = (torch.randn(64, channels, steps, dtype=dtype) for _ in range(2))    # no gradient of x
            torchs = gradient_ms(layer, x, g)
            print(f"| {channels}, {steps} | {str(dtype)[6:]} | {torchs:.1f} | "
                  f"{gradient_ms(pack(layer), x, g):.1f} |", flush=True)


if __name__ == "__main__":
    main()
