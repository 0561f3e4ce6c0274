# SPDX-License-Identifier: Apache-2.0
"""A toy run: three small novels, one of them held out by name."""

import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from training.presets import PRESETS  # noqa: E402
from training.train import prepare  # noqa: E402


@pytest.fixture(scope="session")
def novels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of invented words; the held-out novel has a word that no other one has."""
    folder = tmp_path_factory.mktemp("novels")
    rng = random.Random(5)
    words = ["".join(rng.choices("aeioulnrst", k=rng.randint(3, 7))) for _ in range(150)]
    for name, extra in (("A_One", ""), ("B_Two", ""), ("Doyle_Hound_1902", "xylophone")):
        text = " ".join(
            " ".join(rng.choices(words, k=8)).capitalize() + (f" {extra}." if extra else ".")
            for _ in range(1500)
        )
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def prepared(novels: Path, tmp_path_factory: pytest.TempPathFactory):
    """Folder of the run, tokenizer, corpus and names."""
    out = tmp_path_factory.mktemp("run")
    return out, *prepare(novels, out, PRESETS["toy"])
