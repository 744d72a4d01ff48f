# SPDX-License-Identifier: Apache-2.0
"""What the interpreter cannot show of a program: the order of float32 sums, overtaking copies."""

from __future__ import annotations

import pytest
from ptx import Ptx
from uninterpreted import lines_of


@pytest.fixture(scope="module")
def reports():
    """What another process compiles."""
    return lines_of("ptx.py")


def test_float32_sums_start_from_zero(reports):
    """One chain of FMAs is rounded at the size of what it starts from: the rule would be missed."""
    fp32 = [r for r in reports if r["kind"] == "fp32"]
    for kernel in ("outputs", "input_grad", "shrink", "ds_db", "da"):
        for chip in ("sm_80", "sm_90"):  # on sm_100 a product begins some
            of = [r for r in fp32 if r["name"].startswith(f"{kernel}_kernel of {chip}")]
            assert of and all("zero" in r["starts"] for r in of)
    wrong = {r["name"]: r["starts"] for r in fp32 if r["starts"] not in ([], ["zero"])}
    assert not wrong


def test_no_copy_overtakes_a_wgmma(reports):
    """While one may still read a tile, a ring is as long as the pipeline is deep."""
    columns = [r for r in reports if r["rings"] and r["kind"] != "fp32"]
    assert any(r["unfinished"] for r in columns)
    short = [r["name"] for r in columns if r["unfinished"] and min(r["rings"]) < r["stages"]]
    assert not short


# As Triton writes it: a loop in which a chain of two is begun with something.
LOOP = """
	mov.b32 	%r1, 0f00000000;
	mul.f32 	%r7, %r8, %r9;
	mov.b32 	%r2, {before};
$L__loop:                              // %loop
	{begin}
	fma.rn.f32 	%r4, %r8, %r9, %r3;
	@%p2 bra 	$L__end;
	add.f32 	%r2, %r2, %r4;
	@%p1 bra 	$L__loop;
$L__end:
	fma.rn.f32 	%r5, %r2, %r9, %r7;
	ret;
"""


@pytest.mark.parametrize(
    ("before", "begin", "starts"),
    [
        ("%r1", "fma.rn.f32 	%r3, %r8, %r9, 0f00000000;", {"zero"}),
        ("%r7", "fma.rn.f32 	%r3, %r8, %r9, %r1;", {"zero"}),
        ("%r7", "fma.rn.f32 	%r3, %r8, %r9, %r7;", {"mul.f32"}),
        ("%r1", "fma.rn.f32 	%r3, %r8, %r9, %r2;", {"zero", "add.f32"}),
        ("%r7", "fma.rn.f32 	%r3, %r8, %r9, %r2;", {"mul.f32", "add.f32"}),
        ("%r1", "fma.rn.f32 	%r3, %r8, %r9, %r4;", {"fma.rn.f32"}),
        ("%r1", "mov.b32 	%r3, %r2;", {"zero", "add.f32"}),
        ("%r1", "mul.f32 	%r3, %r8, %r9;", set()),  # a product begins it
    ],
)
def test_where_a_chain_starts(before, begin, starts):
    assert Ptx(LOOP.format(before=before, begin=begin)).sums_start_from() == starts


RING = """
$L__loop:
	add.s32 	%r2, %r1, 1;
	setp.{bound} 	%p1, %r2, {last};
	selp.b32 	%r1, 0, %r2, %p1;
	shl.b32 	%r3, %r1, 13;
	add.s32 	%r4, %r9, %r3;
	bfe.u32 	%r5, %r4, 4, 14;
	cvt.u64.u32 	%rd1, %r5;
	or.b64 	%rd2, %rd1, 4611686293305294848;
	// begin inline asm
	wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {{%r6,%r7}}, %rd2, %rd9, %p9, 1, 1, 0, 1;
	// end inline asm
	wgmma.wait_group.sync.aligned 1;
	@%p2 bra 	$L__loop;
	wgmma.wait_group.sync.aligned 0;
	ret;
"""


@pytest.mark.parametrize(
    ("bound", "last", "n"), [("gt.s32", 1, 2), ("gt.s32", 2, 3), ("ge.s32", 3, 3)]
)
def test_how_long_a_ring_is(bound, last, n):
    program = Ptx(RING.format(bound=bound, last=last))
    assert program.rings() == {n} and program.unfinished == 1
