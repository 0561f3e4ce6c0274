# SPDX-License-Identifier: Apache-2.0
"""By which a budget is suggested; docs/advise.md says why they are what they are."""

MAX_KL = 0.1
"""Nats per token. Of the answers that SmolLM2's full cache has right, EMS kept 207 of 213 where the
mean KL of such prompts was at most that, and 131 of 161 up to 0.5 (docs/advise.md)."""
TOLERATED = 0.1
"""Share of requests that may be above it (ours)."""
WORTH = 0.1
"""Share of the blocks that must come free for compression to be worth its while (ours, and the
doctor's)."""
KNEE = 0.1
"""A larger budget is taken where it gains at most this share less than the smallest (ours)."""
QUARTER = 0.25
"""Of a prompt: what is suggested where nothing was measured (docs/choosing-a-budget.md)."""
NEVER_FULL = 0.01
"""Share of the time in which requests wait for blocks, below which a pool is never full (ours)."""
LONG_WAIT = 2.0
"""Seconds in the queue, of 95 % of the requests, from which on something else limits (ours)."""

THRESHOLDS = {
    "tolerated": TOLERATED,
    "worth": WORTH,
    "knee": KNEE,
    "quarter": QUARTER,
    "never_full": NEVER_FULL,
    "long_wait": LONG_WAIT,
}
