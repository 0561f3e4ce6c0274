# SPDX-License-Identifier: Apache-2.0
"""What goes to a GPU machine in one transfer, and whether it fits.

Usage: python benchmarks/gpu/pack/transfer.py

A transfer holds the checkout's files, but those that git ignores, and one of the folders that
`make gpu-pack` writes. The exit code is 1 where one does not fit.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# In bytes, for checkout and folder together.
LIMIT = 64 << 20
# Most bytes that `make gpu-pack` may write into each: what is left is the checkout's to grow into.
PACKED = {".gpu": 55_900_000, ".gpu-model": 55_900_000}


def tree_bytes(root: Path = ROOT) -> int:
    """Size of a checkout's files, tracked or not, but those that git ignores."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        stdout=subprocess.PIPE,
    )
    paths = {root / name.decode() for name in listed.stdout.split(b"\0") if name}
    return sum(path.lstat().st_size for path in paths if path.is_symlink() or path.is_file())


def folder_bytes(folder: Path) -> int:
    """Size of a folder's files; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def problem(name: str, folder: int, tree: int) -> str | None:
    """Why a folder of this size cannot be transferred with a checkout of that; None if it can."""
    if folder > PACKED[name]:
        return (
            f"{name}/ holds {folder:,} bytes, more than the {PACKED[name]:,} that transfer.py "
            "allows it: pack less, or into another transfer"
        )
    if tree + folder > LIMIT:
        return (
            f"the checkout ({tree:,} bytes) and {name}/ ({folder:,}) are more than the "
            f"{LIMIT:,} bytes of a transfer: pack less, or take files out of the checkout"
        )
    return None


def main() -> int:
    tree, wrong = tree_bytes(), []
    for name in PACKED:
        folder = folder_bytes(ROOT / name)
        left = LIMIT - tree - folder
        print(f"{tree:,} (checkout) + {folder:,} ({name}/) = {tree + folder:,}; {left:,} left")
        sentence = problem(name, folder, tree)
        wrong += [sentence] if sentence else []
    for sentence in wrong:
        print(f"Too large: {sentence}.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
