# SPDX-License-Identifier: Apache-2.0
"""A weight of 4 bits (NF4 or FP4 of QLoRA, Dettmers et al., arXiv:2305.14314) made dense.

One launch, with nested scales: bit for bit what bitsandbytes makes of it in two or three.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.configs import cdiv
from fastlora_kernels.launch import Launch, empty
from fastlora_kernels.replay import replayed
from fastlora_kernels.sums import BLOCK, CONFIG


@triton.jit
def four_bits_kernel(
    packed_ptr, code_ptr, absmax_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr, out_ptr,
    size, shift, nested_shift, one,
    NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # a byte holds two
    mask = offs < size
    byte = tl.load(packed_ptr + offs, mask=mask, other=0).to(tl.int32)
    block = offs >> shift
    scale = tl.load(absmax_ptr + block, mask=mask, other=0)
    if NESTED:
        outer = tl.load(nested_absmax_ptr + (block >> nested_shift), mask=mask, other=0.0)
        inner = tl.load(nested_code_ptr + scale.to(tl.int32)) * outer
        # Rounded before the offset is added: the compiler can't know that this is one product.
        scale = tl.fma(inner, one, tl.load(offset_ptr))
    first = tl.load(code_ptr + (byte >> 4)) * scale
    second = tl.load(code_ptr + (byte & 15)) * scale
    both = tl.interleave(first, second).to(out_ptr.dtype.element_ty)
    offs = tl.program_id(0).to(tl.int64) * BLOCK * 2 + tl.arange(0, 2 * BLOCK)
    tl.store(out_ptr + offs, both, mask=offs < size * 2)


@replayed
def four_bits(
    packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, code: Tensor, absmax: Tensor,
    blocksize: int, nested: tuple[Tensor, Tensor, int, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return the weight [N, K] in ``dtype`` of ``packed``: contiguous bytes, of two elements each.

    ``code`` [16] and the scales ``absmax`` [N K / blocksize] are float32. ``nested``: their own
    code [256] and scales, float32, blocksize and offset (0-d), where ``absmax`` is uint8. Both
    blocksizes are powers of two, as all of bitsandbytes are.
    """
    out, size = empty(packed, *shape, dtype=dtype), packed.numel()
    code2, absmax2, blocksize2, offset = nested or (None, None, 1, None)
    shifts = blocksize.bit_length() - 2, blocksize2.bit_length() - 1  # of bytes, of blocks
    Launch(
        *(four_bits_kernel, (cdiv(size, BLOCK),), CONFIG),
        *(size, *shifts, 1.0, nested is not None, BLOCK),
    )(packed, code, absmax, code2, absmax2, offset, out)
    return out
