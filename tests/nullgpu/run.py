# SPDX-License-Identifier: Apache-2.0
"""Runs a command where the null GPU is found.

Usage: python tests/nullgpu/run.py [--computes] COMMAND...    --computes: this package's kernels do
"""

import os
import sys

from paths import environment

if __name__ == "__main__":
    command = sys.argv[1:]
    computes = command[0] == "--computes"
    os.execvpe(command[computes], command[computes:], environment(computes=computes))
