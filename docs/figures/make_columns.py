# SPDX-License-Identifier: Apache-2.0
"""Draws docs/figures/columns.svg: the block table of one request before and after compaction."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

FREED, KEPT, TAIL, DENSE = "#eceff1", "#5e9bd6", "#f2b56b", "#b8c4cc"
NUM_COLUMNS, FIRST, TAIL_START = 14, 7, 11
HEADS = ("kv_head 0", "kv_head 1")
# Which old column the entries of each compressed slot came from, per kv_head: they differ.
ORIGINS = (
    ((0, 0, 2, 3), (3, 5, 5, 6), (6, 7, 8, 8), (9, 9, 10, 10)),
    ((0, 1, 1, 1), (2, 4, 4, 5), (7, 7, 7, 9), (9, 10, 10, 10)),
)


def draw_row(axes: plt.Axes, y: float, title: str, compacted: bool) -> None:
    axes.text(-0.2, y + 1.02, title, ha="right", va="center", fontsize=10)
    for head, name in enumerate(HEADS):
        base = y + (1 - head) * 0.95
        axes.text(NUM_COLUMNS + 0.15, base + 0.4, name, va="center", fontsize=8, color="#455a64")
        for column in range(NUM_COLUMNS):
            colour = TAIL if column >= TAIL_START else DENSE
            if compacted and column < TAIL_START:
                colour = KEPT if column >= FIRST else FREED
            edge = "#cfd8dc" if compacted and column < FIRST else "#455a64"
            axes.add_patch(Rectangle((column, base), 0.94, 0.8, facecolor=colour, edgecolor=edge))
            if compacted and FIRST <= column < TAIL_START:
                for slot, origin in enumerate(ORIGINS[head][column - FIRST]):
                    axes.text(
                        column + 0.13 + 0.225 * slot,
                        base + 0.4,
                        str(origin),
                        ha="center",
                        va="center",
                        fontsize=5.6,
                        color="white",
                    )
            elif not compacted:
                axes.text(
                    column + 0.47, base + 0.4, str(column), ha="center", va="center", fontsize=8
                )


def main() -> None:
    plt.rcParams |= {"svg.hashsalt": "columns", "svg.fonttype": "none"}
    figure, axes = plt.subplots(figsize=(10, 3.6))
    draw_row(axes, 3.0, "before", compacted=False)
    draw_row(axes, 0.0, "after", compacted=True)
    for start, stop, text in (
        (0, FIRST, "columns [0, first): back in the pool\n(and still in the prefix cache)"),
        (FIRST, TAIL_START, "[first, tail): the budget,\nother tokens per kv_head"),
        (TAIL_START, NUM_COLUMNS, "from tail on:\nuntouched"),
    ):
        axes.annotate(
            "",
            (start + 0.02, -0.18),
            (stop - 0.08, -0.18),
            arrowprops={"arrowstyle": "<->", "color": "#455a64"},
        )
        axes.text((start + stop) / 2, -0.35, text, ha="center", va="top", fontsize=8.5)
    axes.text(NUM_COLUMNS / 2, 5.2, "one request's block table", ha="center", fontsize=10)
    axes.set_xlim(-1.6, NUM_COLUMNS + 1.7)
    axes.set_ylim(-1.3, 5.5)
    axes.axis("off")
    path = Path(__file__).with_name("columns.svg")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
