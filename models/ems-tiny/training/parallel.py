# SPDX-License-Identifier: Apache-2.0
"""Several processes for one model: each takes a part of the rows, gradients are summed.

On a CPU this beats threads: a thread waits for the others at every operator, a process once per
step, which matters most on a machine that has other work.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_gradients(model: nn.Module, extra: Tensor) -> Tensor:
    """Sum all gradients over the processes, in place.

    Args:
        model: Whose gradients; a parameter without one counts as zeros.
        extra: float [N], numbers to be summed with them.

    Returns:
        The summed `extra`.
    """
    if world() == 1:
        return extra
    params = list(model.parameters())
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in params] + [extra.to(params[0].dtype)])
    dist.all_reduce(flat)
    offset = 0
    for p in params:
        p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
        offset += p.numel()
    return flat[offset:]


def agree(value: Any) -> Any:
    """The first process's value, in all of them."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def _entry(index: int, size: int, meeting: str, run: Callable[..., None], args: tuple) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=index, world_size=size)
    run(*args)
    dist.destroy_process_group()


def launch(workers: int, out: Path, run: Callable[..., None], args: tuple) -> None:
    """Call `run(*args)` in `workers` processes, or here where it is one."""
    if workers == 1:
        run(*args)
        return
    meeting = (out / "meeting").resolve()
    meeting.unlink(missing_ok=True)
    # Ended by a signal, this process must still take the others with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    mp.spawn(_entry, (workers, str(meeting), run, args), nprocs=workers, daemon=True)
