# SPDX-License-Identifier: Apache-2.0
"""Runs the scheduling state machine for as many events as asked: `make soak EVENTS=1000000`.

An event is an arrival, a scheduling step, an abort or a preemption. Ends with an error on the
first violation, after Hypothesis has reduced it to a small example.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.simulator import Simulator
from engine.test_block_accounting import SchedulingMachine
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

_ROUND = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=100_000)
    events = parser.parse_args().events
    start = time.monotonic()
    while Simulator.num_events < events:
        run_state_machine_as_test(SchedulingMachine, settings=_ROUND)
        seconds = time.monotonic() - start
        print(
            f"{Simulator.num_events:,} events in {seconds:.0f} s "
            f"({Simulator.num_events / seconds:,.0f} per second), no violation",
            flush=True,
        )


if __name__ == "__main__":
    main()
