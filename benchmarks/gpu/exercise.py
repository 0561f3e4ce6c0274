# SPDX-License-Identifier: Apache-2.0
"""Runs every operator on small shapes and compares with the reference, for compute-sanitizer.

Usage: python benchmarks/gpu/exercise.py [--only memcheck|racecheck] [--device cuda|cpu]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opbench import cases, verify
from opbench.shapes import Model, Shape

# (dtype, query heads per kv_head, head size, tokens, requests)
SHAPES = {
    "racecheck": [
        (torch.bfloat16, 4, 128, 150, 1),
        (torch.float32, 1, 64, 150, 1),
    ],
    "memcheck": [
        (torch.bfloat16, 4, 128, 300, 2),
        (torch.float16, 1, 80, 17, 3),
        (torch.bfloat16, 8, 256, 129, 1),
        (torch.float16, 3, 96, 64, 1),
        (torch.float32, 2, 64, 150, 2),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(SHAPES), default="memcheck")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    for dtype, group, head_size, length, num_rows in SHAPES[options.only]:
        model = Model("small", 2, 2 * group, 2, head_size)
        device = torch.device(options.device)
        shape = Shape(model, length, num_rows, cases.budget_of(length), dtype, device)
        verify.check(shape)
        print(f"{dtype}, group {group}, head_size {head_size}, {num_rows} x {length}: correct")


if __name__ == "__main__":
    main()
