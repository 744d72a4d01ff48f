# SPDX-License-Identifier: Apache-2.0
"""What of a mixture's experts is left to PEFT's own code, and what the report says of it."""

import re

import pytest
import torch
from expert_models import BOTH, config, counted, one_layer, pair, same
from peft import get_peft_model
from torch import nn

import fastlora
from fastlora import patch_peft


class Unknown(nn.Module):
    """Experts of one's own."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 48, 16))

    def forward(self, x, *_):
        return torch.einsum("mk,enk->mn", x, self.gate_up_proj)


WHY = {
    "hooks": "its experts have hooks, or a forward of their own, and would not be called",
    "trained": "its down_proj is trained",
    "parallel": r"its experts are on several devices \(expert parallelism\)",
    "implementation": "its experts run by 'sonicmoe'",
    "float8": "its down_proj is a Parameter of torch.float8_e4m3fn, not a dense float",
    "adapter": "adapter 'default' is torch.float16 and .* on cpu, its experts torch.float64 on cpu",
    "scaling": "adapter 'default' is scaled by nan, no finite number",
    "one": "it has one expert",
    "forward": "it has a forward set on the object, as accelerate's hooks and X-LoRA do",
    "part": "adapter 'default' has hooks on its own parts, which would not be called",
}


@pytest.mark.parametrize("how", WHY)
def test_what_is_left_to_peft_is_said(how, monkeypatch):
    model, layer, given = one_layer()
    calls, own, a = counted(monkeypatch), layer.get_base_layer(), layer.lora_A["default"]
    {
        "hooks": lambda: own.register_forward_hook(lambda *_: None),
        "trained": own.down_proj.requires_grad_,
        "parallel": lambda: setattr(own, "_is_expert_parallel", True),
        "implementation": lambda: setattr(own.config, "_experts_implementation", "sonicmoe"),
        "float8": lambda: setattr(own.down_proj, "data", own.down_proj.to(torch.float8_e4m3fn)),
        "adapter": a.half,
        "scaling": lambda: layer.scaling.update(default=float("nan")),
        "one": lambda: [setattr(p, "data", p[:1]) for p in (own.gate_up_proj, own.down_proj)],
        "forward": lambda: setattr(layer, "forward", layer.forward),
        "part": lambda: a.register_forward_hook(lambda *_: None),
    }[how]()
    name, why = min(patch_peft(model).not_fused)
    assert name.endswith("layers.0.mlp.experts.gate_up_proj")
    assert re.fullmatch(WHY[how], why)
    if how in ("hooks", "trained", "part"):
        layer(*given)
    assert not calls.called


def test_what_keeps_one_weight_from_being_fused_keeps_the_other(monkeypatch):
    calls = counted(monkeypatch)
    plain, patched, _ = pair()
    for model in (plain, patched):
        layer = model.base_model.model.model.layers[0].mlp.experts
        layer.lora_A["default"].register_forward_hook(lambda *_: None)
    report = patch_peft(patched)
    names = {name.partition("model.layers.")[2] for name, _ in report.not_fused}
    assert names == {"0.mlp.experts.gate_up_proj", "0.mlp.experts.down_proj"}
    same(plain, patched)
    assert calls.call_count == 1


def test_unknown_experts_run_as_they_are():
    model = nn.ModuleDict({"experts": Unknown()})
    model = get_peft_model(model, config(BOTH[:1], target_modules=[]))
    layer = model.base_model.model["experts"]
    x = torch.randn(5, 16)
    expected = layer(x)
    with pytest.warns(
        UserWarning, match="its experts are a test_expert_reasons.Unknown, which is not known"
    ):
        patch_peft(model)
    assert torch.equal(layer(x), expected)


def test_mixed_adapters_leave_experts_out():
    _, patched, _ = pair()
    block = fastlora.adapters_by_sample(patched, ["default", "default"])
    with (
        pytest.raises(
            ValueError, match="experts adapts down_proj of experts, whose rows are no samples"
        ),
        block,
    ):
        pass
