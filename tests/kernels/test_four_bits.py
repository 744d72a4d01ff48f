# SPDX-License-Identifier: Apache-2.0
"""Weights of 4 bits made dense: bit for bit what bitsandbytes makes of them."""

import packed_weights
import pytest
import torch
from covering import covering
from fastlora_kernels.four_bits import four_bits

from fastlora.operator import weights

SHAPES = [(64, 128), (33, 62), (1, 4160)]  # also with scales that are not for 16 bytes of theirs
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = covering(["nf4", "fp4"], [False, True], DTYPES, SHAPES, [64, 128, 4096])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(32, 48), (31, 62)])
def test_the_formula(shape, nested, device="cpu"):
    given, right = packed_weights.drawn(shape, nested, torch.bfloat16, device)
    assert torch.equal(four_bits(*given), right)


@pytest.mark.parametrize(("kind", "nested", "dtype", "shape", "blocksize"), CASES)
def test_the_same_bits_as_the_librarys(kind, nested, dtype, shape, blocksize):
    library = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    w = (torch.randn(shape) * 3).to(dtype)
    how = {"blocksize": blocksize, "quant_type": kind, "compress_statistics": nested}
    packed, state = library.quantize_4bit(w, **how)
    inner = state.state2
    of = (inner.code, inner.absmax, inner.blocksize, state.offset) if state.nested else None
    how = tuple(state.shape), state.dtype, state.code, state.absmax, state.blocksize
    found = four_bits(packed, *how, of)
    assert found.dtype == dtype and torch.equal(found, library.dequantize_4bit(packed, state))


def test_a_gpu_takes_the_kernel(monkeypatch):
    """Where each byte holds two elements of the weight, whatever it is stored as."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    called = []
    monkeypatch.setattr(
        weights, "_kernel", lambda: lambda *given: called.append(given) or four_bits(*given)
    )
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for storage, nested in ((torch.uint8, True), (torch.bfloat16, False)):
        how = {"quant_storage": storage, "compress_statistics": nested, "quant_type": "nf4"}
        w = bnb.nn.Params4bit(torch.randn(32, 64), requires_grad=False, **how).to("cpu")
        right = bnb.functional.dequantize_4bit(w.data, w.quant_state)
        assert torch.equal(weights.dense(weights.quantised(w, torch.float32)), right)
    assert len(called) == 2
