# SPDX-License-Identifier: Apache-2.0
"""DoRA's norms: those of float64, also where W and B A cancel, without either's product."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.layers import dora

N, K, R = 70, 300, 6


class Magnitude(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


def problem(dtype=torch.float32, adapter=None, cancelling=0.0):
    """Return W, A, B, scaling; the first ten rows of W + scaling · B A are all but zero."""
    torch.manual_seed(0)
    w, a, b = torch.randn(N, K), torch.randn(R, K) / 3, torch.randn(N, R) / 2
    scaling = 1.7
    if cancelling:
        w[:10] = -scaling * b[:10] @ a + cancelling * torch.randn(10, K)
    adapter = adapter or dtype
    return w.to(dtype), a.to(adapter), b.to(adapter), scaling


def truth(w, a, b, scaling):
    return torch.linalg.norm(w.double() + scaling * b.double() @ a.double(), dim=1)


def norms(w, a, b, scaling):
    own = torch.linalg.vector_norm(w, dim=1, dtype=torch.promote_types(a.dtype, torch.float32))
    return dora.norm(w, own, a, b, scaling)


@pytest.mark.parametrize("cancelling", [0.0, 0.3, 1e-2, 1e-5])
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [(torch.float32, None), (torch.bfloat16, torch.float32), (torch.bfloat16, None)],
)
def test_as_in_float64(dtype, adapter, cancelling):
    of = problem(dtype, adapter, cancelling)
    found, right = norms(*of), truth(*of)
    assert ((found.double() - right).abs() <= 1e-6 * right).all()


def test_where_nobody_may_wait_for_a_number(monkeypatch):
    """As on a GPU: the rows that cancel most are formed whatever is found."""
    of = problem(cancelling=1e-4)
    monkeypatch.setattr(dora, "is_compiling", lambda: True)
    monkeypatch.setattr(dora, "MOST_FORMED", 12)
    assert ((norms(*of).double() - truth(*of)).abs() <= 1e-6 * truth(*of)).all()


def test_float64():
    w, a, b, scaling = (t.double() if isinstance(t, torch.Tensor) else t for t in problem())
    torch.testing.assert_close(norms(w, a, b, scaling), truth(w, a, b, scaling), rtol=1e-13, atol=0)


def test_rows_of_zeros_and_what_is_no_number():
    """A row of zeros has a scale of no number, as 0 / 0 has in PEFT."""
    w, a, b, scaling = problem()
    w[1], b[1] = 0.0, 0.0
    w[2, 3], w[4, 5], b[6, 0] = float("nan"), float("inf"), float("nan")
    found = norms(w, a, b, scaling)
    assert found[1] == 0.0 and found[4].isinf() | found[4].isnan()
    assert found.isnan().nonzero().flatten().tolist() in ([2, 6], [2, 4, 6])
    scale = dora.scale_of(w, a, b, scaling, Magnitude(found.clone()))
    assert scale[1].isnan() and torch.equal(scale[7:], torch.ones(N - 7))


def test_that_of_the_weight_at_the_start():
    """To the bit: magnitudes are made so, and scale is 1 at the start."""
    for dtype in (torch.float32, torch.bfloat16):
        w, a, b, scaling = problem(dtype)
        m = Magnitude(torch.linalg.norm(w, dim=1))
        scale = dora.scale_of(w, a, torch.zeros_like(b), scaling, m)
        assert torch.equal(scale, torch.ones_like(scale)) and scale.dtype == dtype
        (grad,) = torch.autograd.grad(scale.sum(), m.weight)
        torch.testing.assert_close(grad, 1 / torch.linalg.norm(w, dim=1))


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and function._schema.name != "aten::split":
            self.elements = max(self.elements, made.untyped_storage().nbytes() // made.itemsize)
        return made


@pytest.mark.parametrize(("rank", "size"), [(6, 0.1), (6, 30.0), (256, 1.0)])
def test_nothing_as_large_as_the_weight_is_made(rank, size, monkeypatch):
    """Nor are rows formed of adapters that are large, or of a high rank."""
    monkeypatch.setattr(dora, "ELEMENTS", N * K // 7)
    torch.manual_seed(0)
    of = torch.randn(N, K).bfloat16(), torch.randn(rank, K) / 3, size * torch.randn(N, rank), 1.7
    with Largest() as largest:
        made = norms(*of)
    assert made.shape == (N,) and largest.elements <= max(N * K // 7 + K, rank * max(rank, K))
    torch.testing.assert_close(made.double(), truth(*of), rtol=1e-6, atol=0)


def test_factors_that_cancel_each_other():
    """Rows of B A that are small sums of large ones."""
    w, a, b, scaling = problem()
    a[1:] = a[:1] + 1e-3 * a[1:]
    b[:, 0] -= b.sum(1)
    b *= 300.0
    found, right = norms(w, a, b, scaling).double(), truth(w, a, b, scaling)
    assert ((found - right).abs() <= 1e-6 * right).all()
