# SPDX-License-Identifier: Apache-2.0
"""Times score_queries in several builds, one after the other: as shipped, and with each patch of
variants/.

Usage: python benchmarks/gpu/time_variants.py --out variants.json

`make gpu-pack` builds a library of operators for every patch, take_extension.py unpacks them. Each
is compared with the references and timed in a process of its own, so that one that hangs or crashes
costs its own limit. The processes are forks of one that has imported torch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from opbench import cases, verify
from opbench.shapes import LLAMA_8B, Model, Shape
from opbench.timing import Timer

from ems_vllm import ops
from ems_vllm.ops import library

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "gpu-extension" / "variants"
SHIPPED = "shipped"
# (global_queries, None for all; sample_stride; whether the log-sum-exps are given)
TIMED = ((None, 1, True), (None, 4, True), (256, 1, True), (None, 1, False), (256, 1, False))
SECONDS = 0.2
LIMIT_S = 25


def libraries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Builds by name, the shipped one first."""
    yield SHIPPED, library._LIBRARY
    for path in sorted(folder.glob("*.so")):
        yield path.stem, path


def measure(path: Path, device: torch.device, length: int) -> list[dict[str, Any]]:
    """Times of the operator in one build, once it is known to be right.

    Raises:
        AssertionError: it computes something else than the references.
    """
    library._LIBRARY = path
    torch.manual_seed(0)
    dtype = torch.bfloat16
    verify.check(Shape(Model("verified", 2, 8, 2, 128), 200, 2, 32, dtype, device))
    timer = Timer(device, SECONDS)
    shape = Shape(LLAMA_8B, length, 1, cases.budget_of(length), dtype, device)
    found = []
    for num_queries, stride, with_lse in TIMED:
        args = cases.score_queries_args(shape, stride, with_lse, num_queries)
        times = timer(lambda args=args: ops.score_queries(*args))
        of = {"global_queries": num_queries, "sample_stride": stride, "lse_given": with_lse}
        found.append({**of, **asdict(times)})
    return found


def _send(sender: Connection, *args: Any) -> None:
    sender.send(measure(*args))


def measure_apart(path: Path, device: torch.device, length: int) -> list[dict[str, Any]] | None:
    """What `measure` returns in a process of its own; None where it did not get that far."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, path, device, length))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(LIMIT_S) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--built", type=Path, default=BUILT, help="folder of the other builds")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--length", type=int, default=32 << 10)
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]] | None] = {}
    print(f"{'build':16} {'queries':>7} {'stride':>6} {'lse':8} {'p50 ms':>8}")
    for name, path in libraries(options.built):
        found[name] = measure_apart(path, torch.device(options.device), options.length)
        for line in found[name] or ():
            queries = line["global_queries"] or "all"
            lse = "given" if line["lse_given"] else "computed"
            print(
                f"{name:16} {queries!s:>7} {line['sample_stride']:6} {lse:8} {line['p50_ms']:8.3f}",
                flush=True,
            )
        if found[name] is None:
            print(f"{name:16} hung, crashed or computed something else", flush=True)
        # What is known is kept, whatever the next one does.
        options.out.write_text(json.dumps({"length": options.length, "builds": found}, indent=2))
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
