# SPDX-License-Identifier: Apache-2.0
"""How figures are read from machine code, how many blocks fit, and the files that keep them."""

import json
import re

import figures
import pytest
from aot import blocks_per_processor
from compiled_cases import CAPABILITIES, MORE_CAPABILITIES
from sass import Code


def code(text: str) -> Code:
    """Return code as nvdisasm prints it, of lines that a semicolon ends: "0:" is a label."""
    lines, address = [], 0
    for part in text.split("; "):
        if part.endswith(":"):
            lines.append(f".L_x_{part}")
        else:
            line = re.sub(r"to (\d)", r"`(.L_x_\1)", part)
            lines.append(f"        /*{address:04x}*/  {line:>40} ;  /* 0x{address:016x} */")
            address += 16
    return Code("\n".join(lines))


# What is read: the code, its main loop's matrix instructions, and how many of them and of all
# instructions there are in a turn.
LOOPS = {
    "one block": (
        "LDGSTS; @!P0 BRA to 1; 0:; LDSM.16; @!PT LDS RZ; HMMA.16816.F32; @P1 HMMA; LDGSTS; "
        "@!P2 BRA to 0; 1:; EXIT; 2:; BRA to 2",
        ("HMMA", 2, 6),
    ),
    "waiting out of line is no part of a turn": (
        "0:; @P2 BRA to 1; UTCHMMA; 1:; SYNCS; @!P3 BRA to 3; 2:; UTMALDG.2D; BRA.U UP0, to 0; "
        "EXIT; 3:; SYNCS; @!P3 BRA to 3; BRA to 2",
        ("UTCHMMA", 1, 6),
    ),
    "a turn issues every product": (
        "0:; NOP; @P2 BRA to 1; UTCHMMA; 1:; BAR.SYNC 0x0; @P2 BRA to 2; UTCHMMA; 2:; "
        "@P0 BRA to 0; EXIT",
        ("UTCHMMA", 2, 7),
    ),
    "the loop over tiles is around the main loop": (
        "0:; HGMMA; HGMMA; HGMMA; 1:; HGMMA; @P0 BRA to 1; STG.E; @P1 BRA to 0; EXIT",
        ("HGMMA", 1, 2),
    ),
    "the end of a tile is no part of a turn": (
        "0:; UTMALDG; HGMMA; @P0 BRA to 1; STS.128; UTMASTG; 1:; @P1 BRA to 0; EXIT",
        ("HGMMA", 1, 4),
    ),
    "of two alike the pipelined one": (
        "0:; FFMA2; @P0 BRA to 0; 1:; FFMA2; LDGSTS; @P1 BRA to 1; EXIT",
        ("FFMA2", 1, 3),
    ),
    "warps that load have a loop of their own": (
        "@P0 BRA to 1; 0:; UTMALDG; @P1 BRA to 0; EXIT; 1:; HGMMA; @P1 BRA to 1; 2:; HGMMA; HGMMA; "
        "HMMA; @P1 BRA to 2; EXIT",
        ("HGMMA+HMMA", 3, 4),
    ),
    "tensor cores come before any number of multiply-adds": (
        "0:; FFMA; FFMA; FFMA; FFMA; @P1 BRA to 0; 1:; HMMA; FFMA; @P1 BRA to 1; EXIT",
        ("HMMA", 1, 3),
    ),
    "no tensor core": ("0:; FFMA; @!P0 BRA to 0; EXIT", ("FFMA", 1, 2)),
    "a sum": ("0:; LDG.E; FADD; @!P0 BRA to 0; EXIT", ("", 0, 3)),
    "straight code": ("LDG.E; FADD; EXIT; 0:; BRA to 0", None),
    "where diverging threads meet": (
        "0:; BSSY.RECONVERGENT B0, to 2; @P0 BRA to 1; HMMA; 1:; BSYNC; 2:; BRA.DIV UR4, to 3; "
        "@P1 BRA to 0; EXIT; 3:; EXIT",
        ("HMMA", 1, 6),
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_main_loops(name):
    text, expected = LOOPS[name]
    loop = code(text).main_loop()
    assert (loop and (loop.kind, loop.matrix, loop.instructions)) == expected


@pytest.mark.parametrize(
    ("capability", "warps", "registers", "shared", "columns", "blocks"),
    [
        (90, 8, 166, 150528, 0, 1),  # shared memory
        (90, 8, 168, 0, 0, 1),  # registers: 12 warps
        (90, 4, 128, 0, 0, 4),  # registers: 16 warps
        (80, 4, 32, 0, 0, 16),  # threads
        (120, 1, 16, 0, 0, 24),  # blocks
        (89, 4, 32, 50 * 1024 - 1024, 0, 2),
        (89, 4, 32, 50 * 1024 - 1023, 0, 1),  # with what the driver reserves
        (100, 4, 32, 1024, 256, 2),  # tensor memory
    ],
)
def test_blocks_a_processor_holds(capability, warps, registers, shared, columns, blocks):
    assert blocks_per_processor(capability, warps, registers, shared, columns) == blocks


def test_a_chip_s_file_reads_back():
    numbers = "registers stack shared blocks ldgsts tma loop_matrix loop_instructions loop_ldgsts"
    program = dict(zip(numbers.split(), (168, 0, 147456, 2, 36, 6, 4, 100, 12), strict=True))
    program |= {"matrix": "HGMMA", "loop_tma": 2}
    programs = {"b | bf16 | m=16 | ": program, "a | bf16 | m=16 | EVEN_K": program}
    written = figures.text("3.7.1", "f00d", programs)
    assert json.loads(written) == {"triton": "3.7.1", "kernels": "f00d", "programs": programs}
    assert len(written.splitlines()) == 4
    assert "| 168 | 0 | 144 | 2 | 14 | HGMMA | 25.0 |" in figures.table(programs)


@pytest.mark.parametrize("capability", CAPABILITIES + MORE_CAPABILITIES)
def test_what_is_kept_is_as_it_was_written(capability):
    kept = figures.read(capability)
    file = figures.FOLDER / f"sm_{capability}.json"
    assert file.read_text(encoding="utf-8") == figures.text(*kept.values())
    table = figures.table(kept["programs"])
    assert table in (figures.FOLDER / "README.md").read_text(encoding="utf-8")
