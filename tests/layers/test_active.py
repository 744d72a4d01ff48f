# SPDX-License-Identifier: Apache-2.0
"""Several adapters on one layer: their low-rank paths add up, each with its own dropout."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from fastlora.layers.active import ALL, lora_sum


def operands(*ranks, p=0.0, dtype=torch.float32):
    """Return weight, bias and an adapter of each rank, which is also its scaling's denominator."""
    adapters = [
        (
            torch.randn(r, 12).requires_grad_(),
            torch.randn(10, r).requires_grad_(),
            3 / r,
            p,
            ALL,
            None,
        )
        for r in ranks
    ]
    return torch.randn(10, 12, dtype=dtype), torch.randn(10, dtype=dtype), adapters


def formula(x, weight, bias, adapters):
    low_ranks = [scaling * F.linear(F.linear(x, a), b) for a, b, scaling, *_ in adapters]
    return F.linear(x, weight, bias) + sum(low_ranks)


def gradients(y, adapters):
    return torch.autograd.grad(y.square().sum(), [t for a, b, *_ in adapters for t in (a, b)])


def test_float32_adapters_under_a_sixteen_bit_base_keep_their_digits():
    weight, _, adapters = operands(4, 5, dtype=torch.bfloat16)
    weight.zero_()
    x = torch.ones(3, 12, dtype=torch.bfloat16)
    expected = formula(x.float(), weight.float(), None, adapters)
    y = lora_sum(x, weight, None, adapters)
    assert_close(y, expected.bfloat16(), rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("ps", [(0.5, 0.5), (0.5, 0.0), (0.0, 0.5), (0.0, 0.0)])
def test_each_drops_its_own_elements(ps):
    """Two adapters that cancel do not once one of them drops, or both: no mask is shared."""
    weight, _, [(a, b, scaling, *_), _] = operands(4, 4)
    x, pair = (
        torch.randn(64, 12),
        [(a, b, scaling, ps[0], ALL, None), (a, -b, scaling, ps[1], ALL, None)],
    )
    y = lora_sum(x, weight.zero_(), None, pair)
    assert (y.abs().mean() > 0.1) == any(ps)
    assert any(ps) != torch.allclose(y, lora_sum(x, weight, None, pair), atol=1e-5)


def test_dropped_inputs_are_not_kept_but_drawn_again():
    weight, bias, adapters = operands(4, 5, 6, p=0.5)
    x, kept = torch.randn(512, 12), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_sum(x, weight, bias, adapters)
    own = {t.data_ptr() for t in (x, weight, *(t for a, b, *_ in adapters for t in (a, b)))}
    assert not [t.shape for t in kept if t.numel() >= x.numel() and t.data_ptr() not in own]
    # What backward draws again is what forward drew: y is linear in B, and db its slope.
    b = adapters[2][1]
    torch.manual_seed(0)
    before = lora_sum(x, weight, bias, adapters).sum()
    (db,) = torch.autograd.grad(before, b)
    with torch.no_grad():
        b[0, 0] += 1.0
    torch.manual_seed(0)
    after = lora_sum(x, weight, bias, adapters).sum()
    assert_close(after - before, db[0, 0], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_compiles_in_one_graph(p):
    weight, bias, adapters = operands(4, 5, p=p)
    compiled, x = torch.compile(lora_sum, backend="aot_eager", fullgraph=True), torch.randn(6, 12)
    y = compiled(x, weight, bias, adapters)
    assert all(g.isfinite().all() and g.any() for g in gradients(y, adapters))
    assert p or torch.allclose(y, lora_sum(x, weight, bias, adapters), atol=1e-5)
