# SPDX-License-Identifier: Apache-2.0
"""Runs a command where the null GPU is found: `python tests/nullgpu/run.py python -c "..."`."""

import os
import sys

from build import environment

if __name__ == "__main__":
    os.execvpe(sys.argv[1], sys.argv[1:], environment())
