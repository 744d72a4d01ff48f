# SPDX-License-Identifier: Apache-2.0
"""h = act(gate) · up, the elementwise part of a gated MLP, and its gradients with h made again.

Everything is computed in float32 and rounded once. The activations and their derivatives are
PyTorch's formulas, so that NaN and infinities come out where it has them.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.configs import cdiv
from fastlora_kernels.launch import Launch, empty
from fastlora_kernels.replay import replayed
from fastlora_kernels.sums import BLOCK, CONFIG

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
# They stand behind the tensors that they multiply: the interpreter wants it so.
SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI: tl.constexpr = tl.constexpr(0.3989422804014327)
SQRT_2_BY_PI: tl.constexpr = tl.constexpr(0.7978845608028654)
CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def _logistic(x):
    """Return 1 / (1 + exp(-x)), and what it lacks to 1, which a difference would have rounded."""
    power = tl.exp(-x)
    part = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + power)
    return part, part * tl.minimum(power, 3e38)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """Return act(x) and its derivative."""
    if ACTIVATION == "silu":
        part, rest = _logistic(x)
        value = x * part
        slope = part * (1.0 + x * rest)
    elif ACTIVATION == "gelu":
        part = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
        value = x * part
        slope = part + x * (tl.exp(-0.5 * x * x) * INV_SQRT_2PI)
    else:
        # (1 + tanh(u)) / 2 is the logistic function of 2 u.
        part, rest = _logistic((x + x * x * x * CUBIC) * SQRT_2_BY_PI * 2.0)
        value = x * part
        inner = (x * x * CUBIC * 3.0 + 1.0) * SQRT_2_BY_PI
        slope = part + 2.0 * x * (part * rest) * inner
    return value, slope


@triton.jit(do_not_specialize=["blocks"])
def gated_kernel(
    gate_ptr, up_ptr, dh_ptr, dgate_ptr, dup_ptr, h_ptr,
    F, blocks,
    stride_gm, stride_gf,
    stride_um, stride_uf,
    stride_hm, stride_hf,
    ACTIVATION: tl.constexpr, HAS_DH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_f = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_f < F
    offs = row * F + offs_f
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * stride_gm + offs_f * stride_gf, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + row * stride_um + offs_f * stride_uf, mask=mask).to(tl.float32)
    value, slope = _activated(gate, ACTIVATION)
    if HAS_DH:
        dh = tl.load(dh_ptr + row * stride_hm + offs_f * stride_hf, mask=mask).to(tl.float32)
        tl.store(dgate_ptr + offs, (dh * up * slope).to(dtype), mask=mask)
        tl.store(dup_ptr + offs, (dh * value).to(dtype), mask=mask)
    if h_ptr is not None:
        tl.store(h_ptr + offs, (value * up).to(dtype), mask=mask)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return ``act(gate) · up`` [M, F] in their dtype, contiguous, rounded once.

    ``gate`` and ``up`` [M, F] of one dtype and any strides. ``activation`` is "silu", "gelu"
    (with erf) or "gelu_tanh"; ValueError for another.
    """
    return _gated(None, gate, up, activation, True)[2]


def gated_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, need_h: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return dgate, dup and h = ``act(gate) · up``, made again: [M, F] in one dtype, contiguous.

    ``dh``, ``gate`` and ``up`` [M, F] of one dtype and any strides; ``activation`` as in `gated`.
    Without ``need_h`` the third is None.
    """
    return _gated(dh, gate, up, activation, need_h)


@replayed
def _gated(dh, gate, up, activation: str, need_h: bool):
    """Return what is asked for, over one row if all tensors are contiguous."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; one of {', '.join(ACTIVATIONS)}")
    backward, shape = dh is not None, gate.shape
    tensors = gate, up, dh if backward else gate
    M, F = (1, gate.numel()) if all(t.is_contiguous() for t in tensors) else shape
    launch = Launch(
        *(gated_kernel, (M * cdiv(F, BLOCK),), CONFIG, F, cdiv(F, BLOCK)),
        *[stride for t in tensors for stride in t.stride()],
        *(activation, backward, BLOCK),
    )
    asked = backward, backward, need_h
    made = tuple(empty(gate, *shape) if wanted else None for wanted in asked)
    launch(gate, up, dh, *made)
    return made
