# SPDX-License-Identifier: Apache-2.0
"""Writes deploy/kubernetes/*.yaml from the chart: `python deploy/helm/render_chart.py`.

For who has no Helm, and for tests. With Helm's own code, which
`pip install helm-python-sdk==0.2.2` brings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import helm_python
import yaml

HERE = Path(__file__).resolve().parent
CHART = HERE / "ems-vllm"
MANIFESTS = HERE.parent / "kubernetes"
WRITTEN = ("one-gpu", "tensor-parallel")

# They say that Helm has put it there.
_HELM_LABELS = re.compile(r"^ +(helm\.sh/chart|app\.kubernetes\.io/managed-by): .*\n", re.M)


def values(name: str) -> dict[str, Any]:
    """Of deploy/helm/values/NAME.yaml."""
    found: dict[str, Any] = yaml.safe_load((HERE / f"values/{name}.yaml").read_text())
    return found


def render(chosen: dict[str, Any]) -> dict[str, str]:
    """What `helm template ems-vllm` prints with these values, by template; NOTES.txt included.

    Raises:
        helm_python.HelmError: The chart refuses them.
    """
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(chosen)
        return chart.render(chosen, name="ems-vllm", namespace="default")


def manifest(name: str) -> str:
    """The file that is written for the values of that name."""
    parts = [
        text.strip() + "\n"
        for path, text in sorted(render(values(name)).items())
        if path.endswith(".yaml") and text.strip()
    ]
    head = f"# Written by deploy/helm/render_chart.py from deploy/helm/values/{name}.yaml.\n"
    return head + _HELM_LABELS.sub("", "---\n".join(parts))


if __name__ == "__main__":
    for name in WRITTEN:
        (MANIFESTS / f"{name}.yaml").write_text(manifest(name), encoding="utf-8")
