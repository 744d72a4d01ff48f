# SPDX-License-Identifier: Apache-2.0
"""The PTX executor: single instructions against known values, and programs with one fault each."""

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from aot import CHIPS
from ptx import running
from ptx.arithmetic import fma
from ptx.machine import Code, launch
from ptx.memory import FaultError, Global
from ptx.program import Program, UnknownError

HEAD = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k({params}
)
.reqntid {threads}
{{
    .reg .pred %p<9>; .reg .b16 %rs<99>; .reg .b32 %r<99>; .reg .b64 %rd<99>;
    mov.u32 %r0, %tid.x;
    shl.b32 %r1, %r0, 2;
    mov.b32 %r2, global_smem;
    add.s32 %r3, %r2, %r1;
"""
# Of each tensor %rd0, %rd1, ... its address, and %rd10, %rd11, ... that of a thread's four bytes.
OF_TENSOR = """
    ld.param.b64 %rd{i}, [k_param_{i}];
    mad.wide.u32 %rd1{i}, %r0, 4, %rd{i};
"""


def run(body: str, *tensors: torch.Tensor, threads=32, shared=2048, fresh=()) -> None:
    """Run a program on tensors, of which those numbered ``fresh`` hold nothing yet."""
    params = ",".join(
        f"\n.param .u64 .ptr .global .align 1 k_param_{i}" for i in range(len(tensors))
    )
    text = HEAD.format(params=params, threads=threads)
    text += "".join(OF_TENSOR.format(i=i) for i in range(len(tensors))) + body + "\nret;\n}\n"
    memory = Global()
    for i, t in enumerate(tensors):
        memory.add(t, fresh=i in fresh)
    addresses = np.array([t.data_ptr() for t in tensors] or [0], np.uint64)
    launch(Code(Program(text)), memory, addresses, (1,), shared)


def numbers(n: int = 32) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32)


HALF = "cvt.u32.u16 %r9, %rs9;"
BOOL = "selp.b32 %r9, 1, 0, %p1;"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # To nearest, half way to even; NaN; beyond the largest.
        (f"cvt.rn.bf16.f32 %rs9, 0f3F808000; {HALF}", 0x3F80),
        (f"cvt.rn.bf16.f32 %rs9, 0f3F818000; {HALF}", 0x3F82),
        (f"cvt.rn.bf16.f32 %rs9, 0f7F800001; {HALF}", 0x7FFF),
        (f"cvt.rn.bf16.f32 %rs9, 0f7F7FFFFF; {HALF}", 0x7F80),
        ("cvt.rzi.s32.f32 %r9, 0fC02CCCCD;", 0xFFFFFFFE),  # -2.7
        ("cvt.rzi.s32.f32 %r9, 0f4F800000;", 0x7FFFFFFF),  # 2^32
        ("cvt.rzi.s32.f32 %r9, 0f7FC00000;", 0),
        (f"cvt.rn.f16.f32 %rs9, 0f477FF000; {HALF}", 0x7C00),
        (f"cvt.rn.f16.f32 %rs9, 0f477FEFFF; {HALF}", 0x7BFF),
        (f"cvt.rn.f16.f32 %rs9, 0f33000000; {HALF}", 0),
        (f"cvt.rn.f16.f32 %rs9, 0f33000001; {HALF}", 1),
        ("cvt.rn.bf16x2.f32 %r9, 0f3F800000, 0fC0000000;", 0x3F80C000),
        ("cvt.rn.f16x2.f32 %r9, 0f3F800000, 0fC0000000;", 0x3C00C000),
        ("mov.b16 %rs1, 0xC000; cvt.f32.bf16 %r9, %rs1;", 0xC0000000),
        ("mov.b16 %rs1, 0xC000; cvt.f32.f16 %r9, %rs1;", 0xC0000000),
        ("cvt.rn.f32.u32 %r9, 16777217;", 0x4B800000),
        ("mov.b16 %rs1, 0x8000; cvt.s32.s16 %r9, %rs1;", 0xFFFF8000),
        ("cvt.s64.s32 %rd9, -2; mov.b64 {%r8, %r9}, %rd9;", 0xFFFFFFFF),
        ("mov.b64 %rd9, 0x500000007; cvt.u32.u64 %r9, %rd9;", 7),
        # 1 + 2⁻²³ + (2⁻²⁴ - 2⁻⁷⁰): float64 would make a half of it, and round that up.
        ("fma.rn.f32 %r9, 0f39800001, 0f397FFFFE, 0f3F800001;", 0x3F800001),
        ("fma.rn.f32 %r9, 0f3F800001, 0f3F800001, 0fBF800002;", 0x28800000),
        ("fma.rn.ftz.f32 %r9, 0f00400000, 0f3F800000, 0f00000000;", 0),
        ("mul.f32 %r9, 0f00400000, 0f3F000000;", 0x00200000),
        ("min.f32 %r9, 0f7FC00000, 0f3F800000;", 0x3F800000),
        ("ex2.approx.f32 %r9, 0f40400000;", 0x41000000),
        ("add.bf16x2 %r9, 0x3F803F80, 0x3F804000;", 0x40004040),
        ("mul.hi.u32 %r9, 0xFFFFFFFF, 0xFFFFFFFF;", 0xFFFFFFFE),
        ("mul.hi.s32 %r9, -2, 3;", 0xFFFFFFFF),
        ("mul.lo.s32 %r9, 0x10001, 0x10001;", 0x20001),
        ("mul.wide.s32 %rd9, -2, 3; mov.b64 {%r9, %r8}, %rd9;", 0xFFFFFFFA),
        ("mad.lo.s32 %r9, 3, 5, -16;", 0xFFFFFFFF),
        ("div.s32 %r9, -7, 2;", 0xFFFFFFFD),
        ("rem.s32 %r9, -7, 2;", 0xFFFFFFFF),
        ("shl.b32 %r9, 1, 32;", 0),
        ("shr.s32 %r9, -2, 40;", 0xFFFFFFFF),
        ("shr.u32 %r9, 0x80000000, 31;", 1),
        ("bfe.u32 %r9, 0xABCD, 4, 8;", 0xBC),
        ("bfe.s32 %r9, 0xABCD, 4, 8;", 0xFFFFFFBC),
        ("prmt.b32 %r9, 0x44332211, 0x88776655, 0x7632U;", 0x88774433),
        ("prmt.b32 %r9, 0x44332211, 0x88776655, 0xF0F0U;", 0xFF11FF11),
        ("mov.b32 {%rs1, %rs2}, 0x12345678; mov.b32 %r9, {%rs2, %rs1};", 0x56781234),
        (f"setp.lt.s32 %p1, -1, 0; {BOOL}", 1),
        (f"setp.lt.u32 %p1, -1, 0; {BOOL}", 0),
        (f"setp.ltu.f32 %p1, 0f7FC00000, 0f3F800000; {BOOL}", 1),
        (f"setp.ne.f32 %p1, 0f7FC00000, 0f3F800000; {BOOL}", 0),
        (f"setp.neu.f32 %p1, 0f7FC00000, 0f3F800000; {BOOL}", 1),
    ],
    ids=lambda value: value.partition(" ")[0] if isinstance(value, str) else "",
)
def test_an_instruction(body, expected):
    out = numbers()
    run(body + "st.global.b32 [ %rd10 + 0 ], %r9;", out)
    assert set(out.tolist()) == {np.uint32(expected).view(np.int32)}


def test_a_fused_multiply_add_is_rounded_once():
    draw = random.Random(0)
    sides = [[draw.gauss(0, 1) for _ in range(2000)] for _ in range(2)]
    a, b = (np.array(side, np.float32) for side in sides)
    # Sums near a half of the last place, near zero, and beyond normal numbers.
    times = np.array([1, 1 + 2**-22, 2**24, 2**25], np.float32)[np.arange(2000) % 4]
    c = np.float32(-1) * a * b * times
    for scale in (1.0, 2.0**-126):
        scaled = [v * np.float32(s) for v, s in ((a, scale), (b, 1.0), (c, scale))]
        for found, *of in zip(fma(*scaled), *scaled, strict=True):
            x, y, z = map(Fraction, map(float, of))
            exact = x * y + z
            error = abs(Fraction(float(found)) - exact)
            others = (np.nextafter(found, np.float32(s * np.inf)) for s in (-1, 1))
            assert all(error <= abs(Fraction(float(o)) - exact) for o in others)


def test_a_warp_hands_values_on():
    out = numbers()
    run(
        "xor.b32 %r5, %r0, 5; shfl.sync.idx.b32 %r9, %r1, %r5, 31, -1; st.global.b32 [%rd10], %r9;",
        out,
    )
    assert out.tolist() == [4 * (i ^ 5) for i in range(32)]
    run("shfl.sync.bfly.b32 %r9, %r1, 16, 31, -1; st.global.b32 [%rd10], %r9;", out)
    assert out.tolist() == [4 * (i ^ 16) for i in range(32)]
    run("elect.sync %r5|%p1, -1; selp.b32 %r9, 1, 0, %p1; st.global.b32 [%rd10], %r9;", out)
    assert out.tolist() == [1] + [0] * 31


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("how", ["ld", "st"])
def test_matrices(how, trans):
    """A thread has row lane / 4, columns 2 (lane % 4) and the next; transposed the other way."""
    halves = torch.arange(64, dtype=torch.int16)
    given, out = halves.view(torch.int32), numbers()
    mods = f"m8n8.x1{'.trans' * trans}.shared.b16"
    rows = "shl.b32 %r5, %r0, 4; and.b32 %r5, %r5, 112; add.s32 %r5, %r5, %r2;"
    rows += "ld.global.b32 %r8, [%rd10];"
    if how == "ld":
        body = f"st.shared.b32 [%r3], %r8; bar.sync 0; ldmatrix.sync.aligned.{mods} {{%r9}}, [%r5];"
    else:
        body = f"stmatrix.sync.aligned.{mods} [%r5], {{%r8}}; bar.sync 0; ld.shared.b32 %r9, [%r3];"
    run(rows + body + "st.global.b32 [%rd11], %r9;", given, out)
    expected = halves.view(8, 8).t() if trans else halves.view(8, 8)
    assert torch.equal(out.view(torch.int16).view(8, 8), expected)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_a_product_of_tensor_cores(kind):
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    left, right, acc = torch.randn(16, 16), torch.randn(16, 8), torch.randn(16, 8)
    left, right, out = left.to(dtype), right.to(dtype), torch.zeros(32, 4)

    def places(lane: int) -> tuple:
        g, t = lane // 4, 2 * (lane % 4)
        a = [(g + i, t + j + e) for j in (0, 8) for i in (0, 8) for e in (0, 1)]
        b = [(t + j + e, g) for j in (0, 8) for e in (0, 1)]
        return a, b, [(g + i, t + e) for i in (0, 8) for e in (0, 1)]

    a, b, c = (
        torch.stack([torch.stack([t[at] for at in places(lane)[i]]) for lane in range(32)])
        for i, t in enumerate((left, right, acc))
    )
    run(
        """mul.wide.u32 %rd20, %r0, 16; mul.wide.u32 %rd21, %r0, 8;
        add.s64 %rd22, %rd0, %rd20; ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd22];
        add.s64 %rd23, %rd1, %rd21; ld.global.v2.b32 {%r14, %r15}, [%rd23];
        add.s64 %rd24, %rd2, %rd20; ld.global.v4.b32 {%r16, %r17, %r18, %r19}, [%rd24];
        mma.sync.aligned.m16n8k16.row.col.f32.KIND.KIND.f32
        {%r16, %r17, %r18, %r19}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r16, %r17, %r18, %r19};
        add.s64 %rd25, %rd3, %rd20; st.global.v4.b32 [%rd25], {%r16, %r17, %r18, %r19};
        """.replace("KIND", kind),
        *(a, b, c, out),
    )
    exact = (left.double() @ right.double() + acc.double()).float()
    assert torch.equal(
        out, torch.stack([torch.stack([exact[at] for at in places(i)[2]]) for i in range(32)])
    )


NEIGHBOUR = "xor.b32 %r5, %r3, 4;"
COPY = "cp.async.ca.shared.global [%r3], [%rd10], 4; cp.async.commit_group;"


@pytest.mark.parametrize(
    ("kind", "said", "body"),
    [
        ("outside", "4 bytes past the end", "ld.global.b32 %r9, [%rd10 + 4];"),
        ("outside", "at 0x40", "mov.b64 %rd9, 64; st.global.b32 [%rd9], %r0;"),
        ("outside", "4 bytes at 2048 of 2048", "st.shared.b32 [%r2 + 2048], %r0;"),
        ("misaligned", "8 bytes of global", "ld.global.v2.b32 {%r8, %r9}, [%rd0 + 4];"),
        ("misaligned", "16 bytes at 4 of", "st.shared.v4.b32 [%r2 + 4], {%r0, %r0, %r0, %r0};"),
        ("uninitialised", "global", "ld.global.b32 %r9, [%rd11];"),
        ("uninitialised", "at 0 of block 0", "ld.shared.b32 %r9, [%r3];"),
        (
            "race",
            "without a barrier",
            f"st.shared.b32 [%r3], %r0; {NEIGHBOUR} ld.shared.b32 %r9, [%r5];",
        ),
        ("race", "by two threads at once", "st.shared.b32 [%r2], %r0;"),
        (
            "race",
            "after others have read it",
            "st.shared.b32 [%r3], %r0; bar.sync 0; xor.b32 %r5, %r3, 128;"
            "ld.shared.b32 %r9, [%r5]; st.shared.b32 [%r3], %r9;",
        ),
        ("too early", "cp.async", f"{COPY} ld.shared.b32 %r9, [%r3];"),
        ("too early", "cp.async", f"{COPY} cp.async.wait_group 1; ld.shared.b32 %r9, [%r3];"),
        (
            "race",
            "by thread 0 after 1",
            f"{COPY} cp.async.wait_group 0; {NEIGHBOUR} ld.shared.b32 %r9, [%r5];",
        ),
        ("undefined", "%r77", "add.s32 %r9, %r77, 1;"),
        ("diverged", "32 threads", "setp.lt.u32 %p1, %r0, 7; @%p1 bar.warp.sync -1;"),
        ("uninitialised", "no mbarrier", "ZERO mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 8;"),
        (
            "deadlock",
            "never",
            "ZERO @%p1 mbarrier.init.shared.b64 [%r2], 1; bar.sync 0;\nWAIT:\n"
            "mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra WAIT;",
        ),
    ],
)
def test_a_fault_is_reported(kind, said, body):
    zero = "st.shared.b64 [%r2], 0; bar.sync 0; setp.eq.u32 %p1, %r0, 0;"
    with pytest.raises(FaultError, match=said) as found:
        run(body.replace("ZERO", zero), numbers(64), numbers(64), threads=64, fresh=(1,))
    assert found.value.kind == kind


@pytest.mark.parametrize(
    "body",
    [
        f"st.shared.b32 [%r3], %r0; bar.sync 0; {NEIGHBOUR} ld.shared.b32 %r9, [%r5];",
        f"st.shared.b32 [%r3], %r0; bar.warp.sync -1; {NEIGHBOUR} ld.shared.b32 %r9, [%r5];",
        f"{COPY} cp.async.wait_group 0; ld.shared.b32 %r9, [%r3];",
        f"{COPY} cp.async.wait_group 0; bar.sync 0; {NEIGHBOUR} ld.shared.b32 %r9, [%r5];",
        "st.shared.b32 [%r2], %r2; ld.global.b32 %r9, [%rd10];",  # all write the same
        "setp.lt.u32 %p1, %r0, 7; @%p1 bra OUT; ld.global.b32 %r9, [%rd10 + 4];\nOUT:\nbar.sync 0;",
    ],
)
def test_what_is_no_fault(body):
    run(body, numbers(65), threads=64)


def test_columns_beside_a_tensor_are_not_its_own():
    wide = torch.zeros(8, 8, dtype=torch.int32)
    run("ld.global.b32 %r9, [%rd0 + 64];", wide[::2, :4].t())
    with pytest.raises(FaultError, match="uninitialised"):
        run("ld.global.b32 %r9, [%rd0 + 16];", wide[:, :4])


@pytest.mark.parametrize(
    "instruction", ["atom.global.add.u32 %r9, [%rd10], 1", "cvt.rz.f16.f32 %rs9, %r0", "bar.sync 1"]
)
def test_what_is_unknown_is_refused_by_name(instruction):
    with pytest.raises(UnknownError, match=instruction.split()[0]):
        run(f"{instruction};", numbers())


def test_versions_that_were_not_tried_are_named(monkeypatch):
    with pytest.raises(running.UntriedError, match=r"PTX 9\.9"):
        running.code_of(".version 9.9\n.target sm_90\n.visible .entry k()\n.reqntid 32\n{\n}")
    monkeypatch.setattr(running.triton, "__version__", "4.0.0")
    with pytest.raises(running.UntriedError, match=r"Triton 4\.0\.0"), running.executing(CHIPS[80]):
        pass
