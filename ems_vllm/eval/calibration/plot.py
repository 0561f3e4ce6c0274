# SPDX-License-Identifier: Apache-2.0
"""A picture of what was found in the heads of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def draw_heads(shown: torch.Tensor, what: str, model: str, out: Path) -> None:
    """Heads as cells, a row for each layer.

    Args:
        shown: [num_layers, heads].
        what: It is.
        model: Whose, for the title.
        out: An image file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    num_layers, num_heads = shown.shape
    size = (2.5 + 0.3 * num_heads, 1.5 + 0.2 * num_layers)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(shown.float().numpy(), aspect="auto", cmap="viridis", vmin=0)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(model)
    figure.colorbar(image, label=what)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)
