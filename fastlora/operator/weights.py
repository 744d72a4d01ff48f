# SPDX-License-Identifier: Apache-2.0
"""Frozen weights that a library keeps quantised: dense for one product, and again for the next.

`quantised` finds out what a weight is by its class's name, so that no library is imported that has
not made one. Nothing as large as the dense weight outlives a product, also for backward: at the
sizes of training a product of a dense temporary is as fast as one that reads 4 bits. Layers whose
product is another than that of a dense weight are opaque: they are called.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROWS = 256  # of a weight, made dense at a time on a CPU


class Quantised:
    """A weight [N, K] in the place of a dense tensor, for which PyTorch's functions get that."""

    layout, requires_grad = torch.strided, False

    def __init__(self, source: Tensor, shape: Any, dtype: torch.dtype, make: Callable) -> None:
        self.source, self.shape, self.dtype, self.make = source, torch.Size(shape), dtype, make
        self.device = source.device

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func(*map(dense, args), **(kwargs or {}))

    def dense(self) -> Tensor:
        return self.make(self.source).to(self.dtype)

    def to(self, dtype: torch.dtype) -> "Quantised":
        return Quantised(self.source, self.shape, dtype, self.make)

    def t(self) -> Tensor:
        return self.dense().t()

    def size(self) -> torch.Size:
        return self.shape

    def dim(self) -> int:
        return len(self.shape)


class Opaque(NamedTuple):
    """A frozen layer that alone multiplies by its weight; to its output the rest is added."""

    layer: nn.Module
    dtype: torch.dtype
    device: torch.device


def dense(w: Any) -> Any:
    """Return a quantised weight as a tensor [N, K] in its dtype, and all else as it is."""
    return w.dense() if type(w) is Quantised else w


def quantised(weight: Any, dtype: torch.dtype, module: Any = None) -> "Quantised | Opaque | str":
    """Return a library's weight for products in ``dtype``, or why it is none that is known.

    ``module`` is the layer that holds it, where some keep what belongs to it.
    """
    make = _maker(type(weight), type(module))
    if make is None:
        found = f"{type(weight).__name__} of {getattr(weight, 'dtype', None)}"
        return f"is a {found}, not a dense float, nor quantised in a way that is known"
    return make(weight, dtype, module)


@functools.cache  # each layer call asks
def _maker(kind: type, holder: type) -> Callable | None:
    """Return the function below for a weight, by its layer's class first: it may lose its own."""
    known, holders = LINEARS | OPAQUE, map(_name, holder.__mro__)
    return next((known[n] for n in holders if n in known), KINDS.get(_name(kind)))


def _four_bits(weight: Any, dtype: torch.dtype, module: Any) -> "Quantised | str":
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        return "is of 4 bits, but its quant_state is missing: load it once more"

    def make(packed: Tensor) -> Tensor:
        # A call without gradients on a CPU packs it anew, for which the library has no inverse.
        if getattr(state, "packing_format_for_cpu", False):
            return _packed_for_cpu(packed.data, state)
        whole = packed.nbytes * 2 == state.shape.numel()
        return FOUR_BITS[fastest(packed.device) if whole else "library"](packed.data, state)

    return Quantised(weight, state.shape, dtype, make)


def _by_bitsandbytes(packed: Tensor, state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state)


def _by_kernel(packed: Tensor, state: Any) -> Tensor:
    from fastlora_kernels.four_bits import four_bits

    inner, how = state.state2, (state.code, state.absmax, state.blocksize)
    nested = (inner.code, inner.absmax, inner.blocksize, state.offset) if inner else None
    return four_bits(packed.view(torch.uint8), tuple(state.shape), state.dtype, *how, nested)


# What makes a weight of 4 bits dense, by the same bits.
FOUR_BITS = {"library": _by_bitsandbytes, "triton": _by_kernel}


@functools.cache
def fastest(device: torch.device) -> str:
    """Return which of them is taken: what was measured, or our kernel where that runs on a GPU."""
    from fastlora.operator import measured, plans

    if plans.triton_unusable(device):
        return "library"
    row = measured.find(measured.FourBits(), device)
    default = "triton" if device.type == "cuda" else "library"
    return min(row["forward"], key=row["forward"].get) if row else default


def _packed_for_cpu(packed: Tensor, state: Any) -> Tensor:
    """Return the weight that bitsandbytes multiplies by where it has packed it for AVX-512.

    A byte holds two rows of a block of 32, 16 bytes apart in a unit of 64 elements; scales are
    bfloat16 [K / blocksize, N].
    """
    (N, K), pairs = state.shape, packed.reshape(-1, 32)
    codes = torch.cat([pairs & 15, pairs >> 4], 1).reshape(N // 32, K // 2, 32, 2)
    codes = codes.transpose(1, 2).reshape(N, K)
    scales = state.absmax.t().repeat_interleave(state.blocksize, 1)
    return state.code.to(scales.dtype)[codes.int()].mul_(scales)


def _eight_bits(weight: Any, dtype: torch.dtype, module: Any) -> "Quantised | str":
    held = weight, getattr(module, "state", None)
    scales = next((s for of in held if (s := getattr(of, "SCB", None)) is not None), None)
    if weight.dtype != torch.int8:
        return "is of 8 bits, but not quantised yet: move the layer to its device"
    if scales is None:
        return "is of 8 bits, but its scales (SCB) are missing: load it once more"
    scale = scales.unsqueeze(1).mul(1.0 / 127.0)  # as the library does in backward
    return Quantised(weight, weight.shape, dtype, lambda codes: codes.data.to(dtype).mul_(scale))


def _torchao(weight: Any, dtype: torch.dtype, module: Any) -> "Quantised | str":
    if any(getattr(weight, name, None) for name in ("act_quant_kwargs", "activation_quantization")):
        return "quantises x as well, which has no gradient"
    by_rows = weight.scale.shape == (len(weight), 1)
    make = _by_rows if by_rows else lambda w: w.dequantize()
    return Quantised(weight, weight.shape, dtype, make)


def _by_rows(w: Tensor) -> Tensor:
    """Return what torchao's `dequantize` does where each row has a scale, in a quarter of its time.

    A block of rows at a time, which on a CPU stays in the cache while it is float32.
    """
    out, zeros = w.qdata.new_empty(w.shape, dtype=w.dtype), getattr(w, "zero_point", None)
    size = ROWS if w.qdata.is_cpu else len(out)
    for start in range(0, len(out), size):
        rows = slice(start, start + size)
        part = w.qdata[rows].float()
        if zeros is not None:
            part -= zeros[rows]
        out[rows] = part.mul_(w.scale[rows])
    return out


def _hqq(weight: Any, dtype: torch.dtype, module: Any) -> "Quantised | str":
    if not module.ready:
        return "is HQQ's, but not quantised yet"
    return Quantised(module.W_q, module.meta["shape"], dtype, lambda _: module.dequantize())


def _opaque(weight: Any, dtype: torch.dtype, module: Any) -> "Opaque | str":
    if getattr(module, "SUPPORTS_TRAINING", True):
        own = itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
        return Opaque(module, dtype, next(own).device)
    return f"is multiplied by a kernel without gradients, that of {type(module).__name__}"


KINDS = {
    "bitsandbytes.nn.modules.Params4bit": _four_bits,
    "bitsandbytes.nn.modules.Int8Params": _eight_bits,
    "torchao.quantization.Int8Tensor": _torchao,
    "torchao.quantization.Float8Tensor": _torchao,
    "torchao.quantization.IntxUnpackedToInt8Tensor": _torchao,
}
# Layers of theirs whose forward is the product and nothing else.
LINEARS = {
    "bitsandbytes.nn.modules.Linear4bit": _four_bits,
    "bitsandbytes.nn.modules.Linear8bitLt": _eight_bits,
    "hqq.core.quantize.HQQLinear": _hqq,
}
# The others, by a base class: they round x too, or multiply by what is packed for one kernel.
OPAQUE = {
    "gptqmodel.nn_modules.qlinear.BaseQuantLinear": _opaque,  # GPTQ and AWQ
    "transformers.integrations.finegrained_fp8.FP8Linear": _opaque,
}


def is_linear(module: nn.Module) -> bool:
    return _held(type(module))[0]


def is_opaque(module: nn.Module) -> bool:
    return _held(type(module))[1]


@functools.cache
def _held(kind: type) -> tuple[bool, bool]:
    """Return whether a layer's class is one of `LINEARS`, and whether it is of `OPAQUE`."""
    return _name(kind) in LINEARS, any(_name(of) in OPAQUE for of in kind.__mro__)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
