# SPDX-License-Identifier: Apache-2.0
"""The elementwise part of a gated MLP and its gradients against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from acceptance import accept, strided
from fastlora_kernels import gated, gated_backward

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def results(dh, gate, up, activation) -> dict[str, torch.Tensor]:
    dgate, dup, h = gated_backward(dh, gate, up, activation)
    torch.testing.assert_close(gated(gate, up, activation), h, rtol=0, atol=0, equal_nan=True)
    assert gated_backward(dh, gate, up, activation, need_h=False)[2] is None
    return {"h": h, "dgate": dgate, "dup": dup}


def plain(dh, gate, up, activation) -> dict[str, torch.Tensor]:
    gate, up = (t.detach().clone().requires_grad_() for t in (gate, up))
    h = ACTIVATIONS[activation](gate) * up
    dgate, dup = torch.autograd.grad(h, (gate, up), dh)
    return {"h": h.detach(), "dgate": dgate, "dup": dup}


@each_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 1100), (33, 45)])
def test_gated(activation, dtype, shape, device="cpu"):
    ts = [(torch.randn(shape, device=device) * scale).to(dtype) for scale in (1.0, 3.0, 1.0)]
    plains, exact = plain(*ts, activation), plain(*(t.double() for t in ts), activation)
    for name, value in results(*ts, activation).items():
        accept(f"{activation} {dtype} {name}", value, plains[name], exact[name])


@each_activation
def test_gated_strides(activation):
    """gate and up may be halves of one tensor, or lie any other way, in NaN or far apart."""
    ts = list(torch.randn(3, 4, 6).unbind())
    expected = results(*ts, activation)
    ways = [[ts[0], *torch.cat(ts[1:], 1).split(6, 1)]]
    for i, t in enumerate(ts):
        others = [other for _, other in strided(t)]
        # Offsets past two billion elements; few pages of the memory are touched.
        others += [torch.empty(3 * 2**30 + 6).as_strided((4, 6), (2**30, 1)).copy_(t)]
        ways += [[*ts[:i], other, *ts[i + 1 :]] for other in others]
    for way in ways:
        found = results(*way, activation)
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert all(t.is_contiguous() for t in found.values())


@each_activation
def test_gated_where_it_is_not_finite(activation):
    extreme = [0.0, -0.0, 1e-30, 11.0, -11.0, 1e4, -1e4, 1e20, -1e20]
    extreme = torch.tensor([*extreme, torch.inf, -torch.inf, torch.nan])
    ts = torch.meshgrid(torch.tensor([1.0, torch.inf, torch.nan]), extreme, extreme, indexing="ij")
    ts = [t.reshape(3, -1) for t in ts]
    # On a CPU PyTorch's float32 erf(inf) is not a number.
    plains = plain(*(t.double() if activation == "gelu" else t for t in ts), activation)
    for name, value in results(*ts, activation).items():
        of_eager = plains[name].float()
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(value), kind(of_eager)), name


@each_activation
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_gated_of_nothing(activation, shape):
    ts = [torch.randn(shape) for _ in range(3)]
    assert all(t.shape == shape for t in results(*ts, activation).values())


def test_an_unknown_activation_is_named():
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match="activation is 'relu'; one of silu, gelu, gelu_tanh"):
        gated(x, x, "relu")
