# SPDX-License-Identifier: Apache-2.0
"""What our kernels leave in memory while vLLM serves in CUDA graphs.

Everything else computes nothing, so queries and keys are whatever the memory holds; where they go
is what the scheduler knows. Model Runner V1, which makes its block tables on the host.
"""

import json
import os

import pytest
from nullgpu.paths import environment as of_null_gpu
from nullgpu.serving import COMPRESSION, environment
from processes import run_script

# Two that are compressed, one of them in chunks, and one that is not: three rows, padded to four.
REQUESTS = ((150, 40), (300, 40), (10, 40))
_SCRIPT = """
if __name__ == "__main__":
    import json, sys
    from nullgpu import buffers
    print(json.dumps(buffers.run_case(json.loads(sys.argv[1]))))
"""


@pytest.fixture(scope="module")
def found():
    case = {"compression": COMPRESSION, "requests": REQUESTS}
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


def test_a_query_is_recorded_once_and_padding_never(found):
    """Of the ring, a step writes the slots of its requests' last queries and no others."""
    assert found["slots checked"] > 100
    assert found["wrong slots"] == []


def test_scores_are_added_to_the_pages_of_the_prompt_alone(found):
    assert found["prompts checked"] >= len(REQUESTS)
    assert found["wrong scores"] == [], json.dumps(found["wrong scores"])


def test_library_is_the_computing_one(found):
    assert os.path.join("site-computing", "ems_vllm") in found["library"]
