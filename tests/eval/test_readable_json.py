# SPDX-License-Identifier: Apache-2.0
"""Results are kept as JSON that people can compare line by line."""

import json

from hypothesis import given
from hypothesis import strategies as st

from ems_vllm.eval.records.readable_json import readable

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(PLAIN, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=60)


@given(VALUES)
def test_what_is_written_is_read(value):
    assert json.loads(readable(value)) == value


def test_a_measurement_is_a_line():
    rows = [{"name": f"row {index}", "loss": 0.5, "interval": [0.25, 0.75]} for index in range(9)]
    lines = readable({"rows": rows}).splitlines()
    assert [json.loads(line.strip().rstrip(",")) for line in lines[2:-2]] == rows


def test_numbers_have_as_many_digits_as_asked():
    value = {"loss": [1 / 3, 12345.678], "count": 12345678, "right": True}
    assert json.loads(readable(value, 4)) == {**value, "loss": [0.3333, 12350.0]}
