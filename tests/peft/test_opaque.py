# SPDX-License-Identifier: Apache-2.0
"""Bases that alone multiply by their weight: the low-rank part is added to what they make."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from results import X, apart, results
from torch import nn
from transformers.integrations import finegrained_fp8

from fastlora import explain, patch_peft
from fastlora.operator import plans


class Packed(nn.Module):
    """As gptqmodel's layers are, to which that class's name is given."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        for name in ("weight", "bias"):
            self.register_buffer(name, getattr(layer, name).detach())

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


Packed.__module__, Packed.__qualname__ = "gptqmodel.nn_modules.qlinear", "BaseQuantLinear"


def opaque(kind: str, dtype: torch.dtype, **changes) -> lora.LoraLayer:
    layer, config = nn.Linear(64, 48, dtype=dtype), LoraConfig(init_lora_weights=False, **changes)
    kinds = {"gptq": GPTQLoraLinear, "awq": AwqLoraLinear, "fp8": lora.Linear}
    if kind == "fp8":
        base = finegrained_fp8.FP8Linear(64, 48, (16, 32), has_bias=True)
        base.weight.data = layer.weight.detach().to(base.weight.dtype)
        base.weight_scale_inv.data = torch.rand(3, 2) + 0.5
        base.bias.data = layer.bias.detach()
    else:
        base = Packed(layer)
    base.requires_grad_(False)
    made = kinds[kind](base, "default", config, r=4, lora_alpha=8)
    made.lora_A.float(), made.lora_B.float()  # as `get_peft_model` does
    return made


@pytest.fixture
def fp8_products(monkeypatch):
    """Where FP8's kernel is not: x is rounded as it would round it."""

    def product(x, w, scales, size, bias, *rest):
        wide = finegrained_fp8._dequantize_fp8_weight(w, scales, size, x.dtype)
        return F.linear(x.to(w.dtype).to(x.dtype), wide, bias)

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", product)


@pytest.mark.usefixtures("fp8_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fp8", "gptq", "awq"])
def test_the_rest_is_added_to_what_an_opaque_layer_makes(kind, dtype, fused):
    layer, x = opaque(kind, dtype), X.to(dtype)
    right, alone = results(layer, x), layer.base_layer(x)
    assert patch_peft(layer).not_fused == []
    assert [problem[:4] for _, problem in explain(layer, 7).plans] == [(7, 48, 64, 4)]
    found = results(layer, x)
    assert max(apart(found, right)) < (1e-6 if dtype == torch.float32 else 0.01) and len(fused) == 1
    with torch.no_grad():  # here it is fused too
        assert apart([layer(x)], right[:1]) < [0.01] and len(fused) == 2
    layer.enable_adapters(False)
    assert torch.equal(layer(x), alone)


@pytest.mark.usefixtures("fp8_products")
@pytest.mark.parametrize("impl", ["auto", "library"])
@pytest.mark.parametrize("several", [False, True])
def test_an_opaque_layer_keeps_no_dropped_input(impl, several, monkeypatch):
    """Its adapters' gradients are those of what was dropped: y is linear in B, and db its slope."""
    monkeypatch.setattr(plans, "FORCED", impl)
    layer, x = opaque("gptq", torch.float32, lora_dropout=0.5), X.clone().requires_grad_()
    if several:
        config = LoraConfig(init_lora_weights=False, lora_dropout=0.5)
        layer.update_layer("more", 3, 8, config)
        layer.set_adapter(["default", "more"])
    patch_peft(layer)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    given = {x.data_ptr(), layer.base_layer.weight.data_ptr()}
    wide = [t for t in kept if t.numel() >= x.numel() and t.data_ptr() not in given]
    assert not wide and len(kept) > 3
    b = layer.lora_B["default"].weight
    torch.manual_seed(3)
    before = layer(x)
    (db,) = torch.autograd.grad(before.sum(), b)
    with torch.no_grad():
        b[0, 0] += 1.0
    torch.manual_seed(3)
    torch.testing.assert_close((layer(x) - before).sum(), db[0, 0], rtol=1e-3, atol=1e-2)


def test_an_opaque_layer_that_does_not_differentiate_is_left_to_peft():
    layer = opaque("gptq", torch.float32)
    layer.base_layer.SUPPORTS_TRAINING = False
    assert "multiplied by a kernel without gradients" in patch_peft(layer).not_fused[0][1]


def test_gradients_of_an_opaque_layer_are_differentiable():
    layer, x = opaque("awq", torch.float64), X.double()[:, :3].clone().requires_grad_()
    layer.double()
    patch_peft(layer)
    assert torch.autograd.gradgradcheck(layer, x)
    tangents = torch.func.jvp(layer, (x,), (x,))[1]
    torch.testing.assert_close(tangents, layer(x) - layer(torch.zeros_like(x)))
    y = torch.compile(layer, backend="aot_eager")(x)
    torch.testing.assert_close(y, layer(x))


def test_dora_is_left_to_peft():
    """Its norm is that of a weight which only the layer knows."""
    layer = opaque("gptq", torch.float32)
    layer.lora_variant["default"] = DoraLinearVariant()  # which PEFT makes for FP8 on a GPU alone
    with pytest.warns(UserWarning, match=r"\(DoraLinearVariant\) on a layer that alone knows its"):
        patch_peft(nn.Sequential(layer))
