# SPDX-License-Identifier: Apache-2.0
"""The figures that are kept of compiled kernels: how they are found, and that a loss is seen."""

from __future__ import annotations

import json

import figures
import pytest
from aot import CHIPS
from compiled_cases import CAPABILITIES, MORE_CAPABILITIES
from occupancy import blocks_per_processor
from sass import Code


def sass(*lines: str) -> Code:
    """Return code as nvdisasm prints it: a line that ends in a colon is a label."""
    text, address = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/  {line:>40} ;  /* 0x{address:016x} */")
            text.append(f"  /* 0x{address:016x} */")
            address += 16
    return Code("\n".join(text))


PIPELINED = (
    "LDGSTS.E.BYPASS.128 [R6], desc[UR16][R168.64], P0",
    "@!P0 BRA `(.L_x_1)",
    ".L_x_0:",
    "LDSM.16.M88.4 R4, [R190+0x2000]",
    "@!PT LDS RZ, [RZ]",
    "HMMA.16816.F32.BF16 R176, R4.reuse, R12, R176",
    "@P1 HMMA.16816.F32.BF16 R116, R4.reuse, R14, R116",
    "LDGSTS.E.BYPASS.128 [R6], desc[UR16][R168.64], P0",
    "@!P2 BRA `(.L_x_0)",
    ".L_x_1:",
    "EXIT",
    ".L_x_2:",
    "BRA `(.L_x_2)",
)


def test_a_loop_of_one_block():
    code = sass(*PIPELINED)
    loop = code.main_loop()
    assert (loop.kind, loop.matrix, loop.instructions) == ("HMMA", 2, 6)
    assert loop.opcodes == {"LDSM": 1, "NOP": 1, "HMMA": 2, "LDGSTS": 1, "BRA": 1} == loop.turn
    assert code.opcodes["LDGSTS"] == 2


def test_waiting_out_of_line_is_in_the_loop_but_not_in_its_turn():
    loop = sass(
        ".L_x_0:",
        "@P2 BRA `(.L_x_1)",
        "UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR8], tmem[UR34], idesc[UR35], UPT",
        ".L_x_1:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR16], R2",
        "@!P3 BRA `(.L_x_3)",
        ".L_x_2:",
        "UTMALDG.2D [UR4], [UR6]",
        "BRA.U UP0, `(.L_x_0)",
        "EXIT",
        ".L_x_3:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR16], R2",
        "@!P3 BRA `(.L_x_3)",
        "BRA `(.L_x_2)",
    ).main_loop()
    assert (loop.kind, loop.matrix, loop.instructions) == ("UTCHMMA", 1, 6)
    assert sum(loop.opcodes.values()) == 9
    assert loop.opcodes["UTMALDG"] == 1


def test_a_turn_issues_every_product():
    loop = sass(
        ".L_x_0:",
        "NOP",
        "@P2 BRA `(.L_x_1)",
        "UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR8], tmem[UR34], idesc[UR35], UPT",
        ".L_x_1:",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "@P2 BRA `(.L_x_2)",
        "UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR8], tmem[UR34], idesc[UR35], UPT",
        ".L_x_2:",
        "@P0 BRA `(.L_x_0)",
        "EXIT",
    ).main_loop()
    assert (loop.matrix, loop.instructions) == (2, 7)


def test_the_loop_over_tiles_is_not_the_main_loop():
    loop = sass(
        ".L_x_0:",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24",
        ".L_x_1:",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24",
        "@P0 BRA `(.L_x_1)",
        "STG.E desc[UR4][R2.64], R5",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
    ).main_loop()
    assert (loop.matrix, loop.instructions) == (1, 2)


def test_one_loop_over_tiles_and_steps_counts_a_step():
    loop = sass(
        ".L_x_0:",
        "UTMALDG.2D [UR4], [UR6]",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24",
        "@P0 BRA `(.L_x_1)",
        "STS.128 [R3], R4",
        "UTMASTG.2D [UR4], [UR6]",
        ".L_x_1:",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
    ).main_loop()
    assert (loop.matrix, loop.instructions) == (1, 4)
    assert loop.opcodes["UTMASTG"] == 1


def test_of_two_loops_alike_the_pipelined_one():
    loop = sass(
        ".L_x_0:",
        "FFMA2 R2, R4, R6, R8",
        "@P0 BRA `(.L_x_0)",
        ".L_x_1:",
        "FFMA2 R2, R4, R6, R8",
        "LDGSTS.E.BYPASS.128 [R6], desc[UR16][R168.64], P0",
        "@P1 BRA `(.L_x_1)",
        "EXIT",
    ).main_loop()
    assert (loop.matrix, loop.instructions) == (1, 3)


def test_specialised_warps_the_loop_that_multiplies_most():
    code = sass(
        "USETMAXREG.DEALLOC.CTAPOOL 0x18",
        "@P0 BRA `(.L_x_1)",
        ".L_x_0:",
        "UTMALDG.2D [UR4], [UR6]",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_1:",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24",
        "@P1 BRA `(.L_x_1)",
        ".L_x_2:",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24",
        "HMMA.16816.F32.BF16 R176, R4.reuse, R12, R176",
        "@P1 BRA `(.L_x_2)",
        "EXIT",
    )
    loop = code.main_loop()
    assert (loop.kind, loop.matrix, loop.instructions) == ("HGMMA+HMMA", 3, 4)
    assert (loop.opcodes["UTMALDG"], code.opcodes["UTMALDG"]) == (0, 1)


def test_tensor_cores_come_before_any_number_of_multiply_adds():
    loop = sass(
        ".L_x_0:",
        *["FFMA R1, R2, R3, R4"] * 9,
        "@P1 BRA `(.L_x_0)",
        ".L_x_1:",
        "HMMA.16816.F32.BF16 R176, R4.reuse, R12, R176",
        "FFMA R1, R2, R3, R4",
        "@P1 BRA `(.L_x_1)",
        "EXIT",
    ).main_loop()
    assert (loop.kind, loop.matrix, loop.instructions) == ("HMMA", 1, 3)


@pytest.mark.parametrize(
    ("first", "kind"), [("FFMA R1, R2, R3, R4", "FFMA"), ("FFMA2 R2, R4, R6, R8", "FFMA2")]
)
def test_without_tensor_cores(first, kind):
    loop = sass(".L_x_0:", first, "@!P0 BRA `(.L_x_0)", "EXIT").main_loop()
    assert (loop.kind, loop.matrix) == (kind, 1)


def test_a_sum_has_a_loop_of_loads_and_straight_code_has_none():
    load = "LDG.E R4, desc[UR4][R2.64]"
    loop = sass(".L_x_0:", load, "FADD R1, R1, R4", "@!P0 BRA `(.L_x_0)", "EXIT").main_loop()
    assert (loop.kind, loop.matrix, loop.instructions) == ("", 0, 3)
    assert sass(load, "FADD R1, R1, R4", "EXIT", ".L_x_0:", "BRA `(.L_x_0)").main_loop() is None


def test_where_diverging_threads_meet():
    loop = sass(
        ".L_x_0:",
        "BSSY.RECONVERGENT B0, `(.L_x_2)",
        "@P0 BRA `(.L_x_1)",
        "HMMA.16816.F32.BF16 R176, R4.reuse, R12, R176",
        ".L_x_1:",
        "BSYNC.RECONVERGENT B0",
        ".L_x_2:",
        "BRA.DIV UR4, `(.L_x_3)",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_3:",
        "EXIT",
    ).main_loop()
    assert (loop.matrix, loop.instructions) == (1, 6)


@pytest.mark.parametrize(
    ("capability", "warps", "registers", "shared", "columns", "blocks"),
    [
        (90, 8, 166, 150528, 0, 1),  # shared memory
        (90, 8, 168, 0, 0, 1),  # registers: 12 warps
        (90, 4, 128, 0, 0, 4),  # registers: 16 warps
        (80, 4, 32, 0, 0, 16),  # threads
        (80, 1, 16, 0, 0, 32),  # blocks
        (86, 1, 16, 0, 0, 16),
        (120, 1, 16, 0, 0, 24),
        (89, 4, 32, 50 * 1024 - 1024, 0, 2),
        (89, 4, 32, 50 * 1024 - 1023, 0, 1),  # with what the driver reserves
        (100, 4, 32, 1024, 256, 2),  # tensor memory
    ],
)
def test_blocks_a_processor_holds(capability, warps, registers, shared, columns, blocks):
    assert blocks_per_processor(capability, warps, registers, shared, columns) == blocks


KEPT = {
    "registers": 168,
    "stack": 0,
    "shared": 147456,
    "blocks": 2,
    "ldgsts": 36,
    "tma": 6,
    "matrix": "HGMMA",
    "loop_matrix": 4,
    "loop_instructions": 100,
    "loop_ldgsts": 12,
    "loop_tma": 2,
    "loop_lds": 7,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"registers": 169}, "169 registers, 168 before"),
        ({"stack": 8}, "8 bytes of stack, 0 before"),
        ({"blocks": 1}, "1 blocks a processor, 2 before"),
        ({"ldgsts": 12}, "12 LDGSTS, 36 before: a pipeline is lost"),
        ({"loop_ldgsts": 0}, "0 LDGSTS in the main loop, 12 before: a pipeline is lost"),
        ({"tma": 2}, "2 TMA loads, 6 before: a pipeline is lost"),
        ({"loop_tma": 1}, "1 TMA loads in the main loop, 2 before: a pipeline is lost"),
        ({"shared": 98304}, "98304 bytes of shared memory, 147456 before: a pipeline is lost"),
        ({"loop_instructions": 103}, "25.75 instructions for each HGMMA of the main loop, 25.00"),
        ({"loop_matrix": 3}, "33.33 instructions for each HGMMA of the main loop, 25.00"),
        ({"matrix": "HMMA"}, "matrix instructions HMMA in the main loop, HGMMA before"),
        ({"matrix": ""}, "matrix instructions none in the main loop, HGMMA before"),
    ],
)
def test_a_worse_figure_is_named(change, words):
    (worse,) = figures.compare({"a program": KEPT}, {"a program": KEPT | change})
    assert worse.startswith(f"a program: {words}")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"registers": 128, "blocks": 3, "shared": 131072},
        {"ldgsts": 48, "loop_instructions": 102},
        {"loop_instructions": 202, "loop_matrix": 8, "loop_lds": 9},
    ],
)
def test_a_figure_as_good_or_better_is_not(change):
    assert figures.compare({"a program": KEPT}, {"a program": KEPT | change}) == []


def test_programs_come_and_go_with_make_figures():
    other = {f: KEPT[f] for f in ("registers", "stack", "shared", "blocks", "ldgsts", "tma")}
    assert figures.compare({"sum": other}, {"sum": other}) == []
    worse = figures.compare({"old": KEPT, "both": KEPT}, {"both": KEPT, "new": other})
    assert worse == [
        "new: compiled, but not kept; run `make figures`",
        "old: kept, but not compiled any more; run `make figures`",
    ]


def test_a_chip_s_file_reads_back():
    programs = {"b | bf16 | m=16 | ": KEPT, "a | bf16 | m=16 | EVEN_K": KEPT}
    written = figures.text("3.7.1", "f00d", programs)
    expected = {"triton": "3.7.1", "kernels": "f00d", "programs": programs}
    assert json.loads(written) == expected
    assert len(written.splitlines()) == 4
    assert "| 168 | 0 | 144 | 2 | 14 | HGMMA | 25.0 |" in figures.table(programs)


@pytest.mark.parametrize("capability", CAPABILITIES + MORE_CAPABILITIES)
def test_what_is_kept_is_as_it_was_written(capability):
    kept = figures.read(capability)
    file = figures.FOLDER / f"sm_{capability}.json"
    assert file.read_text(encoding="utf-8") == figures.text(*kept.values())
    table = figures.table(kept["programs"])
    assert table in (figures.FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("capability", CAPABILITIES + MORE_CAPABILITIES)
def test_every_program_that_is_kept_is_in_bounds(capability):
    """Also those of configs that only the tuner tries, which `test_compiled.py` leaves out."""
    for name, program in figures.read(capability)["programs"].items():
        assert program["stack"] == 0, f"sm_{capability} {name}: spills"
        assert program["registers"] <= 255, f"sm_{capability} {name}"
        assert program["shared"] <= CHIPS[capability].shared_memory, f"sm_{capability} {name}"
        assert program["blocks"] > 0, f"sm_{capability} {name}"
        if " even |" in name and not name.startswith(("sum_", "gated_")):
            loads = program["tma"] + program["ldgsts"]
            in_loop = program.get("loop_tma", 0) + program.get("loop_ldgsts", 0)
            assert loads > in_loop, f"sm_{capability} {name}: nothing is loaded ahead"
            assert program["matrix"], f"sm_{capability} {name}: no matrix instruction"
