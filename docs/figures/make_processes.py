# SPDX-License-Identifier: Apache-2.0
"""Draws docs/figures/processes.svg: vLLM's processes, and what of this package runs in each."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

EDGE, OURS, THEIRS, TEXT = "#455a64", "#5e9bd6", "#eceff1", "#263238"
WIDTH, GAP, HEIGHT = 4.1, 2.3, 4.0
# Title, what is vLLM's there, and rows of ours: folder, what it does, its steps on the page.
PROCESSES = (
    (
        "API server",
        "HTTP, tokenizer, chat template",
        (
            ("frontend/", "flags, refusals at start-up", "1"),
            ("frontend/", "checks of a request", "3"),
            ("frontend/", "usage and metrics", "9"),
        ),
    ),
    (
        "engine core",
        "scheduler, block pool, prefix cache",
        (
            ("scheduler/", "plan, hits, room", "4"),
            ("scheduler/", "orders of a step", "5"),
            ("scheduler/", "columns go back", "8"),
        ),
    ),
    (
        "worker, one a GPU",
        "model runner, weights, KV cache",
        (
            ("worker/", "sizes the cache, obeys orders", "2, 6"),
            ("attention/", "live columns, observed queries", "7"),
            ("group/", "scores, query ring, compaction", "7, 8"),
        ),
    ),
)
# Between two processes: to the right, and back.
MESSAGES = (
    ("request, with its\noptions and ranges", "tokens, and what\nis held"),
    ("SchedulerOutput,\nwith orders", "sampled tokens:\na step is over"),
)


def draw_process(axes: plt.Axes, left: float, process: tuple) -> None:
    title, of_vllm, rows = process
    axes.add_patch(
        FancyBboxPatch(
            (left, 0), WIDTH, HEIGHT, "round,pad=0,rounding_size=0.12",
            facecolor="white", edgecolor=EDGE,
        )
    )  # fmt: skip
    centre = left + WIDTH / 2
    axes.text(centre, HEIGHT - 0.28, title, ha="center", va="center", fontsize=10, color=TEXT)
    axes.add_patch(
        Rectangle((left + 0.15, HEIGHT - 1.1), WIDTH - 0.3, 0.5, facecolor=THEIRS, edgecolor="none")
    )
    axes.text(centre, HEIGHT - 0.85, of_vllm, ha="center", va="center", fontsize=7.5, color=TEXT)
    for number, (folder, says, steps) in enumerate(rows):
        base = HEIGHT - 1.95 - 0.9 * number
        axes.add_patch(
            Rectangle((left + 0.15, base), WIDTH - 0.3, 0.75, facecolor=OURS, edgecolor="none")
        )
        axes.text(left + 0.28, base + 0.5, folder, va="center", fontsize=8.5, color="white")
        axes.text(left + 0.28, base + 0.22, says, va="center", fontsize=7, color="white")
        axes.text(
            left + WIDTH - 0.28, base + 0.5, steps, ha="right", va="center", fontsize=9,
            fontweight="bold", color="white",
        )  # fmt: skip


def draw_messages(axes: plt.Axes, left: float, there: str, back: str) -> None:
    ends = (left + 0.1, left + GAP - 0.1)
    for (start, stop), height, text in ((ends, 2.6, there), (ends[::-1], 1.2, back)):
        axes.annotate(
            "", (stop, height), (start, height), arrowprops={"arrowstyle": "->", "color": EDGE}
        )
        axes.text(
            left + GAP / 2, height + 0.08, text, ha="center", va="bottom", fontsize=7, color=EDGE
        )


def main() -> None:
    plt.rcParams |= {"svg.hashsalt": "processes", "svg.fonttype": "none"}
    figure, axes = plt.subplots(figsize=(11, 3.1))
    for number, process in enumerate(PROCESSES):
        draw_process(axes, number * (WIDTH + GAP), process)
    for number, (there, back) in enumerate(MESSAGES):
        draw_messages(axes, number * (WIDTH + GAP) + WIDTH, there, back)
    axes.set_xlim(-0.1, 3 * WIDTH + 2 * GAP + 0.1)
    axes.set_ylim(-0.1, HEIGHT + 0.1)
    axes.axis("off")
    path = Path(__file__).with_name("processes.svg")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
