# SPDX-License-Identifier: Apache-2.0
"""Makes Triton's interpreter compute bfloat16 as a GPU does.

The interpreter keeps bfloat16 as its 16-bit pattern. Up to Triton 3.9 its ``tl.dot`` multiplies
those patterns as integers and its cast from float32 truncates, both without a word: here products
are exact, sums float32, and casts round to nearest even. Element-wise arithmetic stays wrong.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widened(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _rounded(data: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(data), quiet_nan, nearest_even).astype(np.uint16)


def install() -> None:
    """Patch the interpreter, once."""
    if getattr(InterpreterBuilder, "_fastlora_bfloat16", False):
        return
    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    create_fp_to_fp = InterpreterBuilder.create_fp_to_fp

    def dot(self, a, b, *args):
        return create_dot(self, _widened(a), _widened(b), *args)

    def cast(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(_rounded(src.data), tl.bfloat16)
        return cast_impl(self, _widened(src), dst_type)

    def fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast(self, src, dst_type)
        return create_fp_to_fp(self, src, dst_type, rounding_mode)

    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = fp_to_fp
    InterpreterBuilder._fastlora_bfloat16 = True
