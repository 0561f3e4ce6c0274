# SPDX-License-Identifier: Apache-2.0
"""Arguments of `vllm serve` as they stand in files for deployment."""

from typing import Any

import pytest


def accepted_by_vllm(arguments: list[str]) -> Any:
    """What `vllm serve` makes of them, this package's flags included; it exits on unknown ones."""
    pytest.importorskip("vllm")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:  # until 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    return make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
