# SPDX-License-Identifier: Apache-2.0
"""Fixtures of a test class that shares one engine; import them under their own names.

A module that uses them says which engine, in a class-scoped fixture `case`: its compression, and
further arguments.
"""

from __future__ import annotations

import pytest
from engine.harness import LLAMA, engine
from engine.unequal_budgets import OPTIONS, answers, identity_prompts


@pytest.fixture(scope="module")
def plain_answers():
    """Those of plain vLLM to identity_prompts."""
    with engine(None, LLAMA, **OPTIONS) as probe:
        return probe.generate(identity_prompts(), 20)


@pytest.fixture(scope="class")
def compression(case):
    return case[0]


@pytest.fixture(scope="class")
def probe(plain_answers, case):
    # After plain vLLM has ended, and only for the class: a process holds one engine at a time.
    compression, arguments = case
    with engine(compression, LLAMA, **OPTIONS, **arguments) as probe:
        yield probe


@pytest.fixture
def fresh(probe):
    """The engine with nothing in its prefix cache."""
    assert probe.llm.reset_prefix_cache()
    yield probe
    probe.assert_pool_is_empty()


@pytest.fixture(scope="class")
def cold(probe):
    """Answers to LONG and SHORT that found nothing in the cache and were never disturbed."""
    assert probe.llm.reset_prefix_cache()
    return answers(probe)
