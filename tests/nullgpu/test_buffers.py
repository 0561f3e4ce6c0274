# SPDX-License-Identifier: Apache-2.0
"""What our kernels leave in memory while vLLM serves in CUDA graphs.

Everything else computes nothing, so queries and keys are whatever the memory holds; where they go
follows from the settings and what vLLM schedules. Model Runner V1, which makes its block tables on
the host.
"""

import json
import os

import pytest
from nullgpu.paths import environment as of_null_gpu
from nullgpu.serving import COMPRESSION, environment
from processes import run_script

# Two that are compressed, one in chunks of which two score, and one that is not: three rows,
# padded to four.
REQUESTS = ((220, 40), (300, 40), (10, 40))
# And one that finds the beginning of the second in the prefix cache: tokens of it, its own, new.
AGAIN = (200, 100, 20)
# 192 of these are found: so many whole blocks lie before the ones that a compaction writes.
CACHED_COLUMNS = 12
# Not all of the 16 tokens between two compactions are recorded.
OBS_WINDOW = 12
_SCRIPT = """
if __name__ == "__main__":
    import json, sys
    from nullgpu import buffers
    print(json.dumps(buffers.run_case(json.loads(sys.argv[1]))))
"""


@pytest.fixture(scope="module")
def found():
    compression = COMPRESSION | {"obs_window": OBS_WINDOW}
    case = {"compression": compression, "requests": REQUESTS, "again": AGAIN}
    return run_script(_SCRIPT, case, environment(1) | of_null_gpu(computes=True))


def test_graphs_are_replayed_on_padded_batches(found):
    assert found["mode"] == "FULL_AND_PIECEWISE"
    assert 4 in found["capture_sizes"]
    assert 3 not in found["capture_sizes"]
    assert found["steps of three"] > 10
    assert found["compactions"] > 4


def test_attention_reads_each_requests_live_blocks(found):
    """Block tables and lengths are the scheduler's, from the first live column on."""
    assert found["rows checked"] > 100
    assert found["rows of compressed requests"] > 50
    assert found["wrong tables"] == []


def test_a_compaction_reads_what_its_request_left_in_memory(found):
    """Its blocks, its score pages, and the row in which its last queries are."""
    assert found["compactions checked"] == found["compactions"]
    assert found["wrong compactions"] == []


def test_a_query_is_recorded_once_and_padding_never(found):
    """Of the ring, a step writes the slots of the last queries before a compaction alone."""
    assert found["slots checked"] > 100
    assert found["steps that record nothing"] > 10
    assert found["wrong slots"] == []


def test_scores_are_added_to_the_pages_of_the_prompt_alone(found):
    """Pages that begin anew are overwritten whole; those of shared blocks are left alone."""
    assert found["chunks checked"] > found["chunks that go on"] > 0
    assert found["private pages"] == CACHED_COLUMNS
    assert found["wrong scores"] == [], json.dumps(found["wrong scores"])


def test_library_is_the_computing_one(found):
    assert os.path.join("site-computing", "ems_vllm") in found["library"]
