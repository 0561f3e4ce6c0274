# SPDX-License-Identifier: Apache-2.0
"""One call of everything compiled: the first minute's answer to what of it works on this GPU.

Usage: python benchmarks/gpu/smoke.py

Each check runs in a process of its own, all at a time: what hangs or crashes says nothing about
the others. Prints a line for each; the exit code says whether all worked.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import limited

LIMIT_S = 30
# Characters of what a check said.
TAIL = 2000
WORKS = "works"


def triton() -> None:
    """A kernel that Triton compiles here."""
    import triton
    import triton.language as tl

    @triton.jit
    def double(source, target, SIZE: tl.constexpr):
        index = tl.arange(0, SIZE)
        tl.store(target + index, 2 * tl.load(source + index))

    source = torch.randn(64, device="cuda")
    target = torch.empty_like(source)
    double[(1,)](source, target, 64)
    torch.testing.assert_close(target, 2 * source)


def operators() -> None:
    """The simplest of this package's operators."""
    from ems_vllm import ops

    # Made and compared on the CPU, so that nothing else has to work for it.
    query = torch.randn(3, 4, 128).bfloat16()
    ring = torch.zeros(2, 8, 4, 128).bfloat16().cuda()
    ops.record_queries(query.cuda(), torch.tensor([0, 9, -1]).cuda(), ring)
    recorded = ring.cpu()
    assert torch.equal(recorded.view(-1, 4, 128)[[0, 9]], query[:2])
    assert recorded.count_nonzero() == query[:2].count_nonzero()


def vllm_operators() -> None:
    """One of vLLM's, from a library that was thinned."""
    import vllm._C_stable_libtorch  # noqa: F401

    hidden = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(256, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(hidden)
    torch.ops._C.rms_norm(out, hidden, weight, 1e-6)
    expected = torch.nn.functional.rms_norm(hidden.float(), (256,), eps=1e-6)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def flash_attention() -> None:
    """FlashAttention 3 at both head sizes that are packed."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    length = 100
    starts = torch.tensor([0, length], device="cuda", dtype=torch.int32)
    for head_size in (64, 128):
        query, key, value = (
            torch.randn(length, heads, head_size, device="cuda", dtype=torch.bfloat16)
            for heads in (8, 2, 2)
        )
        out = flash_attn_varlen_func(
            query,
            key,
            value,
            max_seqlen_q=length,
            cu_seqlens_q=starts,
            max_seqlen_k=length,
            cu_seqlens_k=starts,
            causal=True,
            fa_version=3,
        )
        by_head = [tensor.transpose(0, 1)[None].float() for tensor in (query, key, value)]
        expected = torch.nn.functional.scaled_dot_product_attention(
            *by_head, is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check for check in (triton, operators, vllm_operators, flash_attention)
}


def run(name: str) -> tuple[str, str]:
    """Run a check in a process of its own: its result in a word, and what it said last."""
    command = [sys.executable, str(Path(__file__).resolve()), "--only", name]
    with tempfile.TemporaryFile() as file:
        code = limited.run(command, LIMIT_S, stdout=file, stderr=subprocess.STDOUT)
        file.seek(0)
        said = file.read().decode(errors="replace")[-TAIL:].strip()
    if code == 0:
        return WORKS, ""
    return ("HANGS" if code == limited.TIMED_OUT else "FAILED"), said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(CHECKS), help="in this process")
    options = parser.parse_args()
    if options.only:
        CHECKS[options.only]()
        torch.cuda.synchronize()
        return 0
    with ThreadPoolExecutor(len(CHECKS)) as pool:
        results = dict(zip(CHECKS, pool.map(run, CHECKS), strict=True))
    for name, (_, said) in results.items():
        if said:
            print(f"{name} says:\n{said}\n")
    # The end of the output is what is read first.
    for name, (result, said) in results.items():
        print(f"{name}: {result} {said.rpartition(chr(10))[2][:200]}".strip())
    return 0 if all(result == WORKS for result, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
