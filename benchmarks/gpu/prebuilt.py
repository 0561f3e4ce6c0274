# SPDX-License-Identifier: Apache-2.0
"""An extension that was built elsewhere: what it holds, and whether it fits.

On a machine that is lent by the minute, compiling it would take one of them.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

DESCRIPTION = "built.json"
# What decides what is built.
_SOURCES = ("setup.py", "pyproject.toml", "ems_vllm/_version.py", "csrc/**/*")


@dataclass(frozen=True)
class Built:
    """What an extension was built from and for.

    Attributes:
        sources: digest() of the checkout.
        archs: Architectures of its kernels, as TORCH_CUDA_ARCH_LIST has them.
        suffix: File name ending of modules of the Python that it is for.
    """

    sources: str
    archs: str
    suffix: str

    def write(self, folder: Path) -> None:
        (folder / DESCRIPTION).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Built | None:
        """None where nothing was built, or what is there cannot be read."""
        try:
            return cls(**json.loads((folder / DESCRIPTION).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def reason_against(self, root: Path, archs: str | None) -> str | None:
        """Why it cannot be used here, in a few words; None where it can.

        Args:
            root: The checkout.
            archs: What would be built instead; None where that is not known.
        """
        if self.sources != digest(root):
            return "it is of other sources"
        if archs != self.archs:
            return f"it is for {self.archs}, not for {archs}"
        if self.suffix != (suffix := sysconfig.get_config_var("EXT_SUFFIX")):
            return f"it is for {self.suffix}, not for {suffix}"
        return None


def digest(root: Path) -> str:
    """Of everything in a checkout that the extension is built from; 16 hexadecimal digits."""
    found = hashlib.sha256()
    paths = {path for pattern in _SOURCES for path in root.glob(pattern) if path.is_file()}
    for path in sorted(path for path in paths if "__pycache__" not in path.parts):
        found.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
