# SPDX-License-Identifier: Apache-2.0
"""Weights of 4 bits made dense: bit for bit what bitsandbytes makes of them."""

import packed_weights
import pytest
import torch
from covering import covering
from fastlora_kernels.four_bits import four_bits

from fastlora.operator import measured, plans, tuning, weights

CPU = torch.device("cpu")
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
    found, right = (weights.FOUR_BITS[way](packed, state) for way in ("triton", "library"))
    assert found.dtype == dtype and torch.equal(found, right)


def test_a_gpu_takes_the_kernel(monkeypatch):
    """Where each byte holds two elements of the weight, whatever it is stored as."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    called, own = [], weights.FOUR_BITS["triton"]
    monkeypatch.setitem(weights.FOUR_BITS, "triton", lambda *of: called.append(of) or own(*of))
    monkeypatch.setattr(weights, "fastest", lambda device: "triton")
    for storage, nested in ((torch.uint8, True), (torch.bfloat16, False)):
        how = {"quant_storage": storage, "compress_statistics": nested, "quant_type": "nf4"}
        w = bnb.nn.Params4bit(torch.randn(32, 64), requires_grad=False, **how).to("cpu")
        right = bnb.functional.dequantize_4bit(w.data, w.quant_state)
        assert torch.equal(weights.dense(weights.quantised(w, torch.float32)), right)
    assert len(called) == 2


@pytest.mark.usefixtures("empty_cache")
def test_what_was_measured_is_taken(monkeypatch):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    gpu, fastest = torch.device("cuda"), weights.fastest.__wrapped__
    assert fastest(CPU) == fastest(gpu) == "library"  # in the interpreter there is no GPU
    with monkeypatch.context() as here:
        here.setattr(plans, "triton_unusable", lambda device: None)
        here.setattr(measured, "device_name", lambda device: "a GPU")
        assert fastest(gpu) == "triton"
    found = tuning.tune_four_bits(32, 64, torch.bfloat16, CPU, print, 0.0)
    assert found.keys() == weights.FOUR_BITS.keys() and min(found.values()) > 0
    assert weights.fastest(CPU) == fastest(CPU) == min(found, key=found.get)
    row = {"forward": {"triton": 1.0, "library": 2.0}, "backward": {}, "configs": {}}
    measured.add({measured.FourBits(): row}, CPU)
    assert fastest(CPU) == "triton"
    weights.fastest.cache_clear()
