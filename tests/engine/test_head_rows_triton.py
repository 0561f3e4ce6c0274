# SPDX-License-Identifier: Apache-2.0
"""vLLM's TRITON_ATTN computes attention of kv_heads that hold different numbers of entries."""

import interpreter
import pytest
from processes import fork_script

pytestmark = pytest.mark.interpreter

TOLERANCE = 1e-4
# As many decodes as the 3D kernel takes, by the largest graph in triton_rows.
MOST_3D = 4
NUM_HEADS = 3
# (columns that were dealt, entries behind them, query tokens) of each request, and the number of
# rows that pad the batch.
CASES = {
    "a chunk among decodes": ([(3, 5, 1), (4, 40, 23), (0, 33, 1), (0, 9, 9), (2, 16, 1)], 1),
    "few decodes": ([(5, 1, 1), (0, 20, 1)], 1),
    "as many as the 3D kernel takes": ([(3, 7, 1), (1, 16, 1), (6, 17, 1), (0, 40, 1)], 0),
    "more decodes": ([(3, 7, 1), (1, 16, 1), (6, 17, 1), (0, 40, 1)], 1),
}

_SCRIPT = """
import json, sys
from engine.triton_rows import run
print(json.dumps([run(*case) for case in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def found():
    """Layers of each case."""
    cases = list(CASES.values())
    found = fork_script(_SCRIPT, cases, interpreter.environment())
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_kv_head_attends_to_its_own_entries(found, name):
    requests, num_padding = CASES[name]
    is_3d = len(requests) + num_padding <= MOST_3D and max(n for *_, n in requests) == 1
    for difference, scratch_rows, num_scratch_rows in found[name]:
        assert difference < TOLERANCE
        assert num_scratch_rows == MOST_3D * NUM_HEADS
        assert scratch_rows == (len(requests) * NUM_HEADS if is_3d else 0)
