# SPDX-License-Identifier: Apache-2.0
"""Few tokens on a CPU: "auto" takes PyTorch's own operations, and nothing else changes."""

import peft
import pytest
import torch
from tiny_models import llama, tokens
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora.flops import FORMULAS
from fastlora.operator import plans

OWN, PYTORCH = "_DirectBackward", "AddmmBackward0"


def output(m=6, n=10, k=8, r=3, dtype=torch.float32, adapter=None, **options):
    x, w = torch.randn(m, k, dtype=dtype, requires_grad=True), torch.randn(n, k, dtype=dtype)
    a, b = (torch.randn(shape, dtype=adapter or dtype) for shape in ((r, k), (n, r)))
    return fastlora.lora_linear(x, w, a.requires_grad_(), b.requires_grad_(), **options)


def name_of(function) -> str:
    return type(function).__name__  # on PyTorch 2.8 its name() needs the output alive


def node(**options) -> str:
    return name_of(output(**options).grad_fn)


@pytest.mark.parametrize("m", [8, 9])
def test_few_is_counted_in_elements_of_x(m, monkeypatch):
    monkeypatch.setattr(plans, "FEW", 64)
    assert node(m=m, k=8) == (PYTORCH if 8 * m <= 64 else OWN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_kept_where_that_is_no_more(dtype):
    """x itself, the parameters and s, as the operator keeps them."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output(m=64, n=16, k=32, r=3, dtype=dtype, impl="eager")
    distinct = {t.data_ptr(): t.numel() for t in kept}
    assert sum(distinct.values()) == 64 * 32 + 64 * 3 + 16 * 32 + 3 * 32 + 3 * 16


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32], ids=str)
def test_transforms_draw_the_same_mask(adapter):
    """`torch.func` goes through it too, with dropout and adapters of either dtype."""
    x, w = torch.randn(9, 8, dtype=torch.bfloat16), torch.randn(10, 8, dtype=torch.bfloat16)
    a, b = (torch.randn(shape, dtype=adapter) for shape in ((3, 8), (10, 3)))
    results = []
    for impl, of in (("eager", torch.func.grad), ("auto", torch.func.grad), ("blocks", None)):

        def loss(a, impl=impl):
            options = {"scaling": 0.5, "dropout_p": 0.5, "training": True, "impl": impl}
            return fastlora.lora_linear(x, w, a, b, **options).float().square().sum()

        torch.manual_seed(3)
        leaf = a.clone().requires_grad_()
        results.append(of(loss)(a) if of else torch.autograd.grad(loss(leaf), leaf)[0])
    atol = 3e-2 * float(results[-1].abs().max())
    for result in results:
        assert result.dtype == adapter and result.abs().max() > 0.1
        torch.testing.assert_close(result, results[-1], rtol=3e-2, atol=atol)


@pytest.mark.usefixtures("few")
def test_where_the_operator_runs_all_the_same(monkeypatch):
    assert node() == node(impl="eager") == PYTORCH
    assert node(impl="blocks") == OWN
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(10, 8)
    a, b = torch.randn(3, 8), torch.randn(10, 3)
    for factors in ((a.t().contiguous().t(), b), (a, b.t().contiguous().t())):
        assert name_of(fastlora.lora_linear(x, w, *factors).grad_fn) == OWN
    with torch.autocast("cpu", torch.bfloat16):  # a backward in it would round float32 adapters
        assert node() == OWN
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:  # who looks on sees it
        output()
    assert set(counter.get_flop_counts()["Global"]) == {torch.ops.fastlora.lora_linears}
    monkeypatch.setattr(plans, "FORCED", "blocks")
    assert node() == OWN


def nodes(tensor: torch.Tensor) -> set[str]:
    """Return the names of everything in the graph that made ``tensor``."""
    found, left = set(), [tensor.grad_fn]
    while left:
        function = left.pop()
        if function is not None and function not in found:
            found.add(function)
            left += [other for other, _ in function.next_functions]
    return set(map(name_of, found))


def patched(dtype=torch.float32, **options):
    config = peft.LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear")
    model = peft.get_peft_model(llama(**options).to(dtype), config)
    fastlora.patch_peft(model, fuse_siblings=True)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_computes_the_same(dtype, monkeypatch):
    """The same losses, gradients and dropout: layers, siblings and gated MLPs."""
    model = patched(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    results = []
    for limit in (0, 1 << 17):
        monkeypatch.setattr(plans, "FEW", limit)
        torch.manual_seed(7)
        loss = model(input_ids=tokens(), labels=tokens()).loss
        assert bool({OWN, "_GatedMLPBackward"} & nodes(loss)) == (limit == 0)
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append([loss, *torch.autograd.grad(loss, trained)])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for many, few in zip(*results, strict=True):
        assert (many - few).norm() <= tolerance * many.norm()


def test_a_model_where_it_is_asked_for_by_the_environment(monkeypatch):
    """FASTLORA_IMPL=eager, whatever the size, second derivatives included."""
    monkeypatch.setattr(plans, "FORCED", "eager")
    model = patched(attn_implementation="eager")  # the other has no second derivative
    loss = model(input_ids=tokens(), labels=tokens()).loss
    assert not {OWN, "_GatedMLPBackward"} & nodes(loss)
    trained = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, trained, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), trained)
    assert any(g.abs().max() > 0 for g in second)


@pytest.mark.usefixtures("few")
def test_what_runs_is_explained():
    found = fastlora.explain((2048, 1024), tokens=(128, 129), device="cpu").plans.values()
    few, more = ({(plan.impl, plan.why) for plan in chosen.values()} for chosen in found)
    assert few == {("eager", "few tokens")} and more == {("blocks", "made for CPUs")}
