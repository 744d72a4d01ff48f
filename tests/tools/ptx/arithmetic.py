# SPDX-License-Identifier: Apache-2.0
"""What instructions make of registers: for each, a function of NumPy arrays and its types.

A register is bits: an array of unsigned integers with an element a thread, or one for all threads;
a predicate is an array of bool. Types are PTX's: "s32", "f32", "pred".
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ptx.program import UnknownError

BITS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
DTYPES = {f"{kind}{bits}": dtype for bits, dtype in BITS.items() for kind in "bu"}
DTYPES |= {f"s{bits}": np.dtype(f"i{bits // 8}").type for bits in BITS}
DTYPES |= {"pred": np.bool_, "f32": np.float32, "f16": np.float16, "bf16": np.uint16}
DTYPES |= {"f16x2": np.uint32, "bf16x2": np.uint32}


class Made(NamedTuple):
    """A function of operands of the types ``of`` that returns a ``to``."""

    function: Callable
    of: tuple[str, ...]
    to: str


def bits_of(kind: str) -> int:
    return 8 * np.dtype(DTYPES[kind]).itemsize


def widened(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(value: np.ndarray) -> np.ndarray:
    """Return the bits of float32 as bfloat16, to nearest even."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a · b + c of float32, rounded once.

    The product is exact in float64. The sum is rounded there, which matters where it then lies half
    way between two float32: there it is made odd first, towards what was cut off.
    """
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    half = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    half |= (np.abs(total) < 2.0**-125) & (total != 0)
    if half.any():
        back = total - product
        rest = (product - (total - back)) + (c - back)
        bits = total.view(np.int64)
        even = half & (rest != 0) & (bits & 1 == 0) & np.isfinite(total)
        away = np.where((rest > 0) == (total > 0), 1, -1)
        total = np.where(even, bits + away, bits).view(np.float64)
    return total.astype(np.float32)


def flushed(value: np.ndarray) -> np.ndarray:
    """Return ``value`` with a zero of its sign for each subnormal number."""
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)


def _product(part: str, kind: str, added: bool) -> Made:
    """Return ``mul`` or ``mad`` of integers: the low or the high half of the product, or all."""
    bits = bits_of(kind)
    wide = kind if part == "lo" else f"{kind[0]}{2 * bits}"
    if wide not in DTYPES or part not in ("lo", "hi", "wide"):
        raise UnknownError(f"mul.{part}.{kind}")
    to, of, shift = kind if part == "hi" else wide, DTYPES[wide], bits * (part == "hi")

    def function(a, b):
        return (a.astype(of) * b.astype(of) >> of(shift)).astype(DTYPES[to])

    if added:
        return Made(lambda a, b, c: function(a, b) + c, (kind, kind, to), to)
    return Made(function, (kind, kind), to)


def _shifted(left: bool, kind: str) -> Made:
    shift, bits = np.left_shift if left else np.right_shift, bits_of(kind)

    def function(a, amount):
        near = shift(a, np.minimum(amount, bits - 1).astype(a.dtype))
        if (kind[0] == "s" and not left) or (amount < bits).all():
            return near
        return np.where(amount < bits, near, a.dtype.type(0))

    return Made(function, (kind, "u32"), kind)


def _extracted(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Return ``bfe``: a field of a register of 32 bits, its sign repeated above it."""
    start, length = np.minimum(start, 32).astype(np.int64), np.minimum(length, 32).astype(np.int64)
    size = np.minimum(length, 32 - start)
    found = (a.astype(np.int64) << (64 - start - size)).view(f"{a.dtype.kind}8")
    return np.where(size == 0, 0, found >> (64 - size).astype(found.dtype)).astype(a.dtype)


def _permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Return ``prmt``: four of the eight bytes of b:a, or their signs."""
    both, found = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32)), np.uint32(0)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i) & np.uint32(15)).astype(np.uint64)
        byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        byte = np.where(nibble & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
        found = found | byte.astype(np.uint32) << np.uint32(8 * i)
    return found


COMPARED = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
COMPARED |= {"gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal}
COMPARED |= {"hi": np.greater, "hs": np.greater_equal}


def _compared(how: str, kind: str) -> Made:
    """Return ``setp``; beside NaN those of float32 that end in u are true, and all others false."""
    compare, of_nan = COMPARED.get(how.removesuffix("u")), how.endswith("u")
    if compare is None:
        raise UnknownError(f"setp.{how}.{kind}")
    function = compare
    if kind == "f32":
        function = lambda a, b: np.where(np.isnan(a) | np.isnan(b), of_nan, compare(a, b))  # noqa: E731
    return Made(function, (kind, kind), "pred")


def _converted(*mods: str) -> Made:
    """Return ``cvt``, in which an integer is cut and a float rounded to nearest even."""
    *how, to, kind = mods
    real = [t in ("f32", "f16", "bf16") for t in (to, kind)]
    narrower = real == [False, True] or (real[0] and (to != "f32" or not real[1]))
    if to.endswith("x2") and how == ["rn"] and kind == "f32":
        one = _converted("rn", to[:-2], kind).function

        def function(high, low):
            high, low = (one(v).view(np.uint16).astype(np.uint32) for v in (high, low))
            return high << np.uint32(16) | low

        return Made(function, (kind, kind), to)
    if (how, to, kind) == (["rzi"], "s32", "f32"):
        ends = np.iinfo(np.int32)  # beyond which it stays, and what is not a number is zero

        def cut(v):
            return np.nan_to_num(v.astype(np.float64)).clip(ends.min, ends.max).astype(np.int32)

        return Made(cut, (kind,), to)
    if (how != ["rn"] if narrower else how) or (real[1] and not real[0]):
        raise UnknownError(f"cvt.{'.'.join(mods)}")
    if to == "bf16":
        return Made(lambda v: to_bf16(v.astype(np.float32)), (kind,), to)
    read = widened if kind == "bf16" else np.asarray
    return Made(lambda v: read(v).astype(DTYPES[to]), (kind,), to)


def _sum_of_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return ``add.bf16x2``."""
    halves = ((a.astype(np.uint16), b.astype(np.uint16)), (a >> np.uint32(16), b >> np.uint32(16)))
    low, high = (to_bf16(widened(x) + widened(y)).astype(np.uint32) for x, y in halves)
    return high << np.uint32(16) | low


# Functions of operands of one type: of integers, of float32, of bits and predicates.
INTEGER = {"add": np.add, "sub": np.subtract, "rem": np.fmod, "neg": np.negative, "abs": np.abs}
INTEGER |= {"min": np.minimum, "max": np.maximum, "div": lambda a, b: (a - np.fmod(a, b)) // b}
FLOAT = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma, "div": np.divide}
FLOAT |= {"neg": np.negative, "abs": np.abs, "min": np.fmin, "max": np.fmax}
FLOAT["ex2"] = lambda v: np.exp2(v.astype(np.float64)).astype(np.float32)
LOGICAL = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
COPIED = ("cvta.global.u64", "cvta.to.global.u64")
COUNTS = {"neg": 1, "abs": 1, "ex2": 1, "not": 1, "fma": 3}


def made(op: str) -> Made | None:
    """Return what ``op`` computes of its operands; None if that is no matter of registers alone."""
    family, *mods = op.split(".")
    kind, count = mods[-1] if mods else "", COUNTS.get(family, 2)
    integer, one = kind[:1] in ("s", "u", "b") and kind.lstrip("sub").isdigit(), len(mods) == 1
    if family == "cvt":
        return _converted(*mods)
    if family == "setp" and len(mods) == 2:
        return _compared(*mods)
    if family in ("mul", "mad") and integer and len(mods) == 2:
        return _product(*mods, family == "mad")
    if family in ("shl", "shr") and integer and one:
        return _shifted(family == "shl", kind)
    if op in ("bfe.u32", "bfe.s32"):
        return Made(_extracted, (kind, "u32", "u32"), kind)
    if op == "prmt.b32":
        return Made(_permuted, (kind,) * 3, kind)
    if op == "add.bf16x2":
        return Made(_sum_of_pairs, ("b32", "b32"), "b32")
    if (family == "mov" and one and kind in DTYPES) or op in COPIED:
        return Made(lambda v: v, (kind,), kind)
    if family == "selp" and one:
        return Made(lambda a, b, p: np.where(p, a, b), (kind, kind, "pred"), kind)
    if family in LOGICAL and (integer or kind == "pred") and one:
        return Made(LOGICAL[family], (kind,) * count, kind)
    if family in INTEGER and integer and one:
        return Made(INTEGER[family], (kind,) * count, kind)
    if family in FLOAT and kind == "f32" and not {*mods} - {"rn", "ftz", "approx", "full", kind}:
        function = FLOAT[family]
        if "ftz" in mods:
            return Made(lambda *v: flushed(function(*map(flushed, v))), (kind,) * count, kind)
        return Made(function, (kind,) * count, kind)
    return None
