# SPDX-License-Identifier: Apache-2.0
"""These tests are for the null GPU's environment alone: `make test-nullgpu`."""

import os

collect_ignore_glob = [] if "NULLGPU_COUNT" in os.environ else ["test_*.py"]
