# SPDX-License-Identifier: Apache-2.0
"""Pages of `/metrics` of real servers, in pages/: what of them the doctor reads.

`python tests/doctor/recorded.py NAME URL SECONDS` adds one: read at the start, in the middle and at
the end. All are of models/random-llama with --max-model-len 4096 on the CPU platform, vLLM 0.32.0;
SERVERS says with what pool and under which load, once it had run for a while.
"""

from __future__ import annotations

import gzip
import re
import sys
import time
import urllib.request
from pathlib import Path

from ems_vllm.doctor.live.page import Page
from ems_vllm.doctor.live.reading import Reading

PAGES = Path(__file__).parent / "pages"
# By name: arguments of the server, and clients at a time x prompt + answer, in tokens.
_DENSE = "--kv-cache-memory-bytes 134217728"
_EMS = (
    "--kv-cache-memory-bytes 240000000 --kv-compression ems "
    """--kv-compression-config '{"budget": 256}'"""
)
SERVERS = {
    "idle": (_DENSE, "after the others"),
    "long_prompts": (_DENSE, "16 x 3000 + 128"),
    "short_prompts": (_DENSE, "60 x 310 + 500"),
    "long_answers": (_DENSE, "14 x 200 + 1600"),
    "prefill_bound": (_DENSE, "4 x 3000 + 2"),
    "room": (_DENSE, "2 x 2000 + 400"),
    "compute_bound": (f"{_DENSE} --max-num-seqs 4", "12 x 1500 + 100"),
    "ems_fresh": (_EMS, "1 x 100 + 16"),
    "ems_room": (_EMS, "16 x 3000 + 128"),
    "ems_full": (_EMS, "48 x 3000 + 400"),
}
_READ = re.compile(
    r"(vllm:("
    r"num_requests_running|num_requests_waiting\w*|engine_sleep_state|kv_cache_usage_perc|"
    r"prefix_cache_(queries|hits)_total|num_preemptions_total|prompt_tokens_by_source_total|"
    r"prompt_tokens_total|generation_tokens_total|cache_config_info|"
    r"request_prompt_tokens_(bucket|sum|count)|"
    r"(request_generation_tokens|time_to_first_token_seconds|request_queue_time_seconds|"
    r"request_prefill_time_seconds|request_decode_time_seconds)_(sum|count)"
    r")|ems_vllm:\w+(?<!_created))\b"
)
_AT = re.compile(r"^# at ([\d.]+)$", re.MULTILINE)


def readings(name: str) -> list[Reading]:
    """What was read of a server."""
    _, *parts = _AT.split(_read(name))
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [Reading(float(at), Page.parse(text)) for at, text in pairs]


def last_page(name: str) -> str:
    """The text of the last page, as a server would answer it."""
    return _AT.split(_read(name))[-1]


def record(name: str, url: str, seconds: float) -> None:
    """Read a server three times."""
    began = time.monotonic()
    with gzip.open(PAGES / f"{name}.txt.gz", "wt", encoding="utf-8") as out:
        for pause in (0, seconds / 2, seconds / 2):
            time.sleep(pause)
            with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
                lines = response.read().decode().splitlines()
            out.write(f"# at {time.monotonic() - began:.3f}\n")
            out.writelines(f"{line}\n" for line in lines if _READ.match(line))


if __name__ == "__main__":
    record(sys.argv[1], sys.argv[2], float(sys.argv[3]))


def _read(name: str) -> str:
    with gzip.open(PAGES / f"{name}.txt.gz", "rt", encoding="utf-8") as recorded:
        return recorded.read()
