"""Time of one linear layer: frozen alone, with LoRA as PEFT computes it, and ours.

``pytest benchmarks``. Rows of one group are the same problem; compare them within a run only, or
take ``make bench``, which lets the ways take turns.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastlora
from fastlora import plans

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
M, N, K, R = (8192, 4096, 4096, 16) if DEVICE.type == "cuda" else (1024, 1024, 1024, 16)


def frozen(x, w, a, b, p):
    return F.linear(x, w)


def peft(x, w, a, b, p):
    low_rank = F.linear(F.linear(F.dropout(x.to(a.dtype), p), a), b)
    return (F.linear(x, w) + low_rank * 2.0).to(x.dtype)


def ours(impl):
    def layer(x, w, a, b, p):
        return fastlora.lora_linear(x, w, a, b, scaling=2.0, dropout_p=p, training=True, impl=impl)

    return layer


LAYERS = {"frozen": frozen, "peft": peft, "fastlora torch": ours("torch")}
if DEVICE.type == "cuda" and plans.triton_unusable(DEVICE) is None:
    LAYERS["fastlora triton"] = ours("triton")


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_backward(benchmark, name, adapter, p):
    benchmark.group = f"{DEVICE.type} {M}x{N}x{K} r={R} bf16, {adapter} adapters, dropout {p}"
    x = torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(N, K, device=DEVICE, dtype=torch.bfloat16) / K**0.5
    a = torch.randn(R, K, device=DEVICE, dtype=adapter, requires_grad=True)
    b = torch.randn(N, R, device=DEVICE, dtype=adapter, requires_grad=True)
    dy = torch.randn(M, N, device=DEVICE, dtype=torch.bfloat16)

    def step():
        x.grad = a.grad = b.grad = None
        LAYERS[name](x, w, a, b, p).backward(dy)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, warmup_rounds=3, rounds=15)
