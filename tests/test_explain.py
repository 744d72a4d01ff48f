# SPDX-License-Identifier: Apache-2.0
"""explain() says which implementation runs, and why."""

import pytest
import torch
from measuring import CPU, PROBLEM, timings
from peft import LoraConfig, get_peft_model
from tiny_models import llama, tokens

import fastlora
from fastlora.operator import measured, plans
from fastlora.operator.operands import Problem

pytestmark = pytest.mark.usefixtures("empty_cache")
FP32 = torch.float32, torch.float32


def test_explains_shapes():
    measured.add({PROBLEM: timings()}, CPU)
    times = "triton    measured on this machine: triton 1 ms, library 2 ms, blocks 3 ms"
    assert str(fastlora.explain((48, 32), tokens=(64, 65), device="cpu")) == (
        "M x N x K: tokens, outputs, inputs\n"
        "64 x 48 x 32, r = 16, bfloat16, float32 adapters, on cpu\n"
        f"  forward   {times}\n  backward  {times}\n"
        "65 x 48 x 32, r = 16, bfloat16, float32 adapters, on cpu\n"
        "  forward   blocks    made for CPUs\n  backward  blocks    made for CPUs"
    )
    several = fastlora.explain([(48, 32), [8, 8], PROBLEM], tokens=64, dropout=True, device="cpu")
    dropping = PROBLEM._replace(dropout=True)
    assert [p for _, p in several.plans] == [dropping, dropping._replace(N=8, K=8), PROBLEM]


def test_explains_a_layer_and_a_model():
    layer = fastlora.LoRALinear(32, 48, r=4, lora_dropout=0.1)
    found = fastlora.explain(layer, torch.randn(2, 5, 32)).plans
    assert list(found) == [(CPU, Problem(10, 48, 32, 4, *FP32, True))]
    found = fastlora.explain(layer.eval(), 7).plans
    assert list(found) == [(CPU, Problem(7, 48, 32, 4, *FP32))]
    layer.merge()
    with pytest.raises(ValueError, match="holds no LoRALinear that is not merged"):
        fastlora.explain(layer, 7)
    model = llama()
    fastlora.replace_linears(model, ".*_proj", r=4)
    shapes = {(p.N, p.K) for _, p in fastlora.explain(model, 7).plans}
    assert shapes == {(16, 16), (8, 16), (24, 16), (16, 24)}
    config = LoraConfig(r=4, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 48)), config)
    with pytest.raises(ValueError, match="no layer of PEFT's that patch_peft"):
        fastlora.explain(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    model.base_model.set_adapter(["default", "other"])
    fastlora.patch_peft(model)
    ((_, problem),) = fastlora.explain(model, 7).plans  # without dropout they are stacked
    assert problem == Problem(7, 48, 32, 6, *FP32)
    with model.disable_adapter(), pytest.raises(ValueError, match=r"patch_peft\(model\) has fused"):
        fastlora.explain(model, 7)


def test_explains_siblings_together(monkeypatch):
    model = llama()
    fastlora.replace_linears(model, ["q_proj", "v_proj", "o_proj"], r=4, fuse_siblings=True)
    explained = fastlora.explain(model, 7)
    alone, group = Problem(7, 16, 16, 4, *FP32), ((8, 4), (8, 0))
    assert [p for _, p in explained.plans] == [alone._replace(others=group), alone]
    said = "7 x 16 x 16, r = 4, float32, and of the same x: 8 (r = 4), 8 (frozen), on cpu"
    assert said in str(explained)
    choose, posed = plans.choose, []  # k, which is frozen, lies between q and v
    monkeypatch.setattr(
        plans, "choose", lambda op, impl, *of: posed.append(of[0]) or choose(op, impl, *of)
    )
    model(input_ids=tokens())
    assert {p._replace(M=7) for p in posed} == {p for _, p in explained.plans}
    monkeypatch.setattr(plans, "FEW", 1 << 17)  # of few tokens each runs alone
    few = fastlora.explain(model, 7).plans
    assert [p for _, p in few] == [alone, alone._replace(N=8)]
    assert {plan.impl for both in few.values() for plan in both.values()} == {"eager"}
    monkeypatch.undo()
    model.model.layers[0].self_attn.v_proj.merge()  # those of that block run alone
    assert len(fastlora.explain(model, 7).plans) == 2


@pytest.mark.parametrize("forced", ["blocks", "triton", "eager", "reference"])
def test_explains_what_is_forced(monkeypatch, forced):
    monkeypatch.setattr(plans, "FORCED", forced)
    assert f"{forced:9} FASTLORA_IMPL={forced}" in str(fastlora.explain((48, 32), 64, device="cpu"))


@pytest.mark.parametrize(
    ("what", "options", "said"),
    [
        (torch.nn.Linear(2, 2), {}, r"Linear holds no LoRALinear.*replace_linears\(model, names\)"),
        ((1, 2, 3), {}, r"a shape is \(N, K\), two positive integers, got \(1, 2, 3\)"),
        ([(4, 4), (0, 3)], {}, r"got \(0, 3\)"),
        ((4, 4), {"tokens": 0}, "tokens must be positive integers, got 0"),
        ((4, 4), {"device": "cuda"}, "device is 'cuda', but PyTorch can use no GPU"),
        ("llama", {}, "what must be .* got str"),
    ],
    ids=lambda value: "" if isinstance(value, torch.nn.Module) else None,
)
def test_explain_says_what_it_cannot_take(monkeypatch, what, options, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TypeError if what == "llama" else ValueError, match=said):
        fastlora.explain(what, **options)
