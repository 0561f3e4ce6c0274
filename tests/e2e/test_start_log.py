# SPDX-License-Identifier: Apache-2.0
"""The start-up log says what runs and what it is worth."""

import re

from ems_vllm.eval.server.process import Server


def test_log_names_the_recipe(server: Server) -> None:
    log = server.log()
    assert "KV-cache compression: recipe ems (scorer=ems x allocator=uniform" in log
    assert "budget 128 entries per kv_head" in log
    assert "KV-cache compression: 4 of 4 layers compressed." in log


def test_log_says_what_lies_beside_the_cache(server: Server) -> None:
    found = re.search(
        r"beside the cache ([\d.]+) MiB of scores, ([\d.]+) MiB of recorded queries and "
        r"([\d.]+) MiB of workspace",
        server.log(),
    )
    assert found is not None
    assert all(float(size) > 0 for size in found.groups())


def test_log_compares_capacity(server: Server) -> None:
    capacity = re.search(
        r"requests of (\d+) tokens that fit: ([\d.]+) dense \((\d+) blocks each\), "
        r"([\d.]+) compressed \((\d+) blocks each",
        server.log(),
    )
    assert capacity is not None
    length, dense, dense_blocks, compressed, compressed_blocks = map(float, capacity.groups())
    assert length == 8192
    assert dense_blocks == 8192 / 16
    # Budget, recent window, and what is generated until the next compaction; one column begun.
    assert compressed_blocks == (128 + 64 + 256) / 16 + 1
    assert compressed > 10 * dense
