# SPDX-License-Identifier: Apache-2.0
"""csrc/tools/instruction_report.py, and what it counts in the kernels that were built."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILT = sorted(ROOT.glob("build/temp.*/cuda/score_queries.o"))
# A tile of score_queries for compute capability 9.0a, bfloat16 and head size 128: what a warp takes
# at most. Counted with nvcc 13.0: 280, 430, 118, 217, and 326, 489, 104, 156.
MOST = {
    "score_queries_sm90_kernel": {
        ("products", "fewest"): 300,
        ("products", "most"): 460,
        ("gather", "fewest"): 130,
        ("gather", "most"): 240,
    },
    "score_queries_lse_sm90_kernel": {
        ("products", "fewest"): 340,
        ("products", "most"): 520,
        ("gather", "fewest"): 120,
        ("gather", "most"): 170,
    },
}
sys.path.insert(0, str(ROOT / "csrc" / "tools"))

import instruction_report  # noqa: E402

# A loop of one group of warps that gathers, of one that multiplies and may mask, and what is
# before, between and behind them. Two instructions in a row are a wait that is tried again.
LISTING = """arch = sm_90a
\t\tFunction : {symbol}
        /*0000*/                   S2R R0, SR_TID.X ;        /* 0x0000000000007919 */
                                                             /* 0x000fc00000000000 */
        /*0010*/              @!P0 BRA 0x70 ;                /* 0x0000000000007947 */
        /*0020*/                   SYNCS P1, [R2] ;          /* 0x0000000000007947 */
        /*0030*/              @!P1 BRA 0x20 ;                /* 0x0000000000007947 */
        /*0040*/                   LDGSTS.E [R4], [R6.64] ;  /* 0x0000000000007947 */
        /*0050*/               @P2 BRA 0x20 ;                /* 0x0000000000007947 */
        /*0060*/                   EXIT ;                    /* 0x0000000000007947 */
        /*0070*/                   HGMMA.64x64x16 R8, R4 ;   /* 0x0000000000007947 */
        /*0080*/                   BRA P3, 0xb0 ;            /* 0x0000000000007947 */
        /*0090*/                   LDS R3, [R2] ;            /* 0x0000000000007947 */
        /*00a0*/                   FSEL R8, R8, RZ, P0 ;     /* 0x0000000000007947 */
        /*00b0*/                   MUFU.EX2 R8, R8 ;         /* 0x0000000000007947 */
        /*00c0*/               @P4 EXIT ;                    /* 0x0000000000007947 */
        /*00d0*/                   FADD.FTZ R9, R9, R8 ;     /* 0x0000000000007947 */
        /*00e0*/                   BRA 0x70 ;                /* 0x0000000000007947 */
        /*00f0*/                   NOP ;                     /* 0x0000000000007947 */
"""


@pytest.fixture
def disassembler(tmp_path, monkeypatch):
    """A stand-in for cuobjdump that prints LISTING."""
    tool = tmp_path / "cuobjdump"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING.format(symbol='f')}END\n")
    tool.chmod(0o755)
    monkeypatch.setattr(instruction_report, "TRITON_BIN", tmp_path)


def test_turns_of_loops(disassembler, tmp_path):
    ((symbol, arch, code),) = instruction_report.disassemble(tmp_path / "x.o", ["f"])
    assert (symbol, arch, len(code)) == ("f", "90a", 16)
    turns = instruction_report.turns(code)
    assert [(turn.loop, turn.path, turn.total) for turn in turns] == [
        ("products", "fewest", 6),
        ("products", "most", 8),
        ("gather", "fewest", 4),
        ("gather", "most", 4),
    ]
    assert turns[1].counts == {
        "products": 1,
        "MUFU": 1,
        "float": 1,
        "choice": 1,
        "shared": 1,
        "other": 3,
    }
    assert turns[2].counts == {"global": 1, "other": 3}


def test_kernels_without_products_are_left_out(disassembler, tmp_path):
    ((_, _, code),) = instruction_report.disassemble(tmp_path / "x.o", ["f"])
    others = [replace(i, operation="NOP") if i.operation == "HGMMA" else i for i in code]
    assert instruction_report.turns(others) == []


def test_no_disassembler(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(instruction_report, "TRITON_BIN", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(instruction_report.ReportError, match=r"no cuobjdump in .*make .triton"):
        instruction_report.find_disassembler()


@pytest.mark.skipif(not BUILT, reason="CUDA kernels have not been built here")
def test_turns_of_score_queries_stay_short():
    try:
        instruction_report.find_disassembler()
    except instruction_report.ReportError as error:
        pytest.skip(str(error))
    arguments = instruction_report.DEFAULT_ARGUMENTS
    rows = instruction_report.read(BUILT[-1].parent, arguments, sources="score_queries")
    found = {
        name.function: {(turn.loop, turn.path): turn for turn in turns}
        for name, kernel, turns in rows
        if kernel.arch == "90a" and name.function in MOST
    }
    if not found:
        pytest.skip("CUDA kernels have been built for other GPUs than 9.0a")
    assert found.keys() == MOST.keys()
    for function, turns in found.items():
        for way, most in MOST[function].items():
            assert turns[way].total <= most, (function, way)
        assert turns["products", "fewest"].counts["products"] == 8
        # All copies of a tile, so no loop within that would have to be counted more than once.
        assert turns["gather", "fewest"].counts["global"] == 16
    assert found["score_queries_sm90_kernel"]["products", "fewest"].counts["choice"] == 0
