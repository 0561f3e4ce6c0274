# SPDX-License-Identifier: Apache-2.0
"""The state of a server's block pool and queues, read from its `/metrics`."""

import re
import urllib.request
from dataclasses import dataclass

_SAMPLE = re.compile(r"^vllm:(\w+)(\{.*\})? (\S+)$", re.MULTILINE)
_NUM_BLOCKS = re.compile(r'\bnum_gpu_blocks="(\d+)"')


@dataclass(frozen=True)
class PoolState:
    """vLLM's own figures after its latest step.

    Attributes:
        num_blocks: Blocks that requests can hold.
        num_used_blocks: Blocks that requests hold; cached blocks nobody holds are free.
        num_running, num_waiting: Requests.
        num_preemptions: Since the server started.
        num_generated: Tokens, since the server started.
    """

    num_blocks: int
    num_used_blocks: int
    num_running: int
    num_waiting: int
    num_preemptions: int
    num_generated: int


def parse(text: str) -> PoolState:
    """The pool's state from the text of `/metrics`."""
    values: dict[str, float] = {}
    labels: dict[str, str] = {}
    for name, label, value in _SAMPLE.findall(text):
        values[name] = float(value)
        labels[name] = label
    num_blocks = _NUM_BLOCKS.search(labels["cache_config_info"])
    assert num_blocks is not None
    # Block 0 is vLLM's null block, which no request can hold.
    usable = int(num_blocks[1]) - 1
    return PoolState(
        num_blocks=usable,
        num_used_blocks=round(values["kv_cache_usage_perc"] * usable),
        num_running=int(values["num_requests_running"]),
        num_waiting=int(values["num_requests_waiting"]),
        num_preemptions=int(values["num_preemptions_total"]),
        num_generated=int(values["generation_tokens_total"]),
    )


def read(url: str) -> PoolState:
    """The pool's state of the server at `url`."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        return parse(response.read().decode())
