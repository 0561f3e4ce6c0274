# SPDX-License-Identifier: Apache-2.0
"""What tests of the evaluation share."""

import pytest
from eval.toy_tokenizer import ToyTokenizer


@pytest.fixture(scope="session")
def tokenizer() -> ToyTokenizer:
    return ToyTokenizer()
