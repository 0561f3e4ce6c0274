# SPDX-License-Identifier: Apache-2.0
"""Runs a script in a process of its own, for what must be chosen before vLLM is imported."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent


def run_script(script: str, case: Any, environment: Mapping[str, str] | None = None) -> Any:
    """What `script` prints last, read as JSON.

    Args:
        script: Python source; the tests' helpers can be imported, `sys.argv[1]` is the case.
        case: Handed over as JSON.
        environment: Of the process; this one's by default.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A file, because worker processes that are spawned import it again.
        path = Path(folder) / "script.py"
        path.write_text(script)
        env = dict(os.environ if environment is None else environment)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS), env.get("PYTHONPATH"))))
        result = subprocess.run(
            [sys.executable, str(path), json.dumps(case)],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.strip().splitlines()[-1])
