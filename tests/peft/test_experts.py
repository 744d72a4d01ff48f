# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts under PEFT: the same function, without adding adapters to the weights."""

import copy
import pickle

import peft
import pytest
import tiny_models as tiny
import torch
from acceptance import accept
from expert_models import BOTH, IDS, config, counted, grads, loss_of, one_layer, pair, same, wrapped
from transformers import Trainer, TrainingArguments

import fastlora
from fastlora import patch_peft, unpatch_peft
from fastlora.operator.dropout import keep_mask, kept_scale

ALIKE = ("eager", "batched_mm")  # of transformers' implementations those that take float64


@pytest.fixture
def calls(monkeypatch):
    return counted(monkeypatch)


@pytest.mark.parametrize("implementation", ALIKE)
@pytest.mark.parametrize("name", tiny.EXPERTS)
def test_as_peft_computes(name, implementation, calls):
    plain, patched, report = pair(name, implementation)
    assert not report.not_fused
    layers = 1 if name == "DeepseekV3" else 2  # its first layer is dense
    names = [name.rpartition(".")[2] for name in report.fused if "experts" in name]
    assert names == ["down_proj", "gate_up_proj"] * layers
    same(plain, patched)
    assert calls.call_count == layers
    same(plain.eval(), patched.eval())


@pytest.mark.parametrize("name", tiny.EXPERTS)
def test_fifty_steps(name):
    losses = []
    for model in pair(name)[:2]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for step in range(50):
            loss = loss_of(model, IDS.roll(step, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)
    assert losses[0][-1] < losses[0][0] - 0.1


@pytest.mark.parametrize("implementation", ["grouped_mm", *ALIKE])
@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_float32_by_each_implementation(name, implementation, calls):
    plain, patched, _ = pair(name, implementation, torch.float32)
    same(plain, patched, 1e-4, 1e-6)
    assert calls.call_count == 2


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Llama4"])
@pytest.mark.parametrize("parameters", [BOTH[:1], BOTH[1:], BOTH[::-1]])
def test_one_of_the_weights_or_both(name, parameters, calls):
    plain, patched, _ = pair(name, parameters=parameters)
    same(plain, patched)
    assert calls.call_count == 2


PATTERNS = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 7}}


@pytest.mark.parametrize("changes", [PATTERNS, {"use_rslora": True}])
def test_ranks_and_scalings(changes):
    plain, patched, _ = pair("Qwen3Moe", **changes)
    same(plain, patched)


def test_several_adapters_stored_and_active(calls):
    plain, patched, _ = pair("Olmoe")
    for model in (plain, patched):
        torch.manual_seed(1)
        model.add_adapter("other", config(r=2), autocast_adapter_dtype=False)
    kinds = {type(m).__name__ for m in patched.modules() if hasattr(m, "parameter_name")}
    assert kinds == {"ParamWrapper"}  # PEFT has found them again, and wrapped none once more
    for active in ("other", ["default", "other"], "default"):
        for model in (plain, patched):
            model.base_model.set_adapter(active)
        same(plain, patched)
    assert calls.call_count == 6
    with plain.disable_adapter(), patched.disable_adapter():
        assert torch.equal(loss_of(patched), loss_of(plain))
    assert calls.call_count == 6


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_merging_is_peft_s(name, calls):
    plain, patched, _ = pair(name)
    before = loss_of(patched)
    counted = calls.call_count
    for model in (plain, patched):
        model.merge_adapter()
    assert all(map(torch.equal, plain.state_dict().values(), patched.state_dict().values()))
    torch.testing.assert_close(loss_of(patched), before)
    assert calls.call_count == counted
    patched.unmerge_adapter()
    same(plain.unmerge_adapter() or plain, patched)
    whole = patched.merge_and_unload()
    torch.testing.assert_close(loss_of(whole), before)
    assert not any("fastlora" in type(m).__module__ for m in whole.modules())


def test_given_back_copied_and_pickled():
    plain, patched, _ = pair()
    for other in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        same(patched, other, 0, 0)
    unpatch_peft(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in plain.modules()]
    assert [vars(m).keys() for m in patched.modules()] == [vars(m).keys() for m in plain.modules()]
    same(plain, patched, 0, 0)


def test_files_are_peft_s(tmp_path):
    _, patched, _ = pair("GptOss")
    patched.save_pretrained(tmp_path / "peft")
    fastlora.save_adapter(patched, tmp_path / "ours")
    expected = loss_of(patched)
    for folder in tmp_path.iterdir():
        base = tiny.experts("GptOss").double()
        how = {"autocast_adapter_dtype": False}
        found = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, **how)
        torch.testing.assert_close(loss_of(found), expected)
        loaded = fastlora.load_adapter(base, folder)
        assert "fastlora" in str(type(loaded.base_model.model.model.layers[0].mlp.experts))
        torch.testing.assert_close(loss_of(loaded), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, calls):
    plain, patched, _ = pair("Qwen3Moe")
    for model in (plain, patched):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    same(plain, patched)
    assert calls.call_count == 4
    patched.zero_grad()
    patch_peft(patched, expert_dropout=0.5)
    torch.manual_seed(0)
    found = grads(patched)
    patched.gradient_checkpointing_disable()
    torch.manual_seed(0)
    torch.testing.assert_close(found, grads(patched))


def test_trainer(tmp_path):
    losses = []
    for model in pair("GraniteMoe", dtype=torch.float32)[:2]:
        data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
        given = {"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1, "seed": 0}
        given |= {"use_cpu": True, "report_to": [], "learning_rate": 1e-2, "save_strategy": "no"}
        trainer = Trainer(model, TrainingArguments(str(tmp_path), **given), train_dataset=data)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_compiled_whole(name):
    """Adapters that PEFT adds to weights break the graph of each layer."""
    plain, patched, _ = pair(name, dtype=torch.float32)
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    found = {n: p.grad for n, p in patched.named_parameters() if p.grad is not None}
    expected = grads(plain)
    expected.pop("loss")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Llama4"])
def test_acceptance_rule(name, adapter, monkeypatch):
    torch.manual_seed(0)
    model = wrapped(name, dtype=torch.bfloat16, target_modules=[])
    own = {path: p for path, p in model.named_parameters() if "lora_" in path}
    for parameter in own.values():
        parameter.data = parameter.data.to(adapter)
    block = model.base_model.model.model.layers[0]
    layer = (block.feed_forward if name == "Llama4" else block.mlp).experts
    x = torch.randn(64, 16).bfloat16().requires_grad_()
    index = torch.stack([torch.randperm(4)[:2] for _ in range(64)])
    routed = () if name == "Llama4" else (index, torch.rand(64, 2).bfloat16())
    exact, given = (
        copy.deepcopy(layer).double(),
        [t.double() if t.is_floating_point() else t for t in routed],
    )
    patch_peft(model)

    def results(layer, x, *routed):
        trained = [p for p in layer.parameters() if p.requires_grad]
        y = layer(x, *routed)
        dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
        return [y, *torch.autograd.grad(y, [x, *trained], dy)]

    found = results(layer, x, *routed)
    exact = results(exact, x.detach().double().requires_grad_(), *given)
    monkeypatch.setattr("fastlora.operator.plans.FORCED", "reference")
    for i, values in enumerate(zip(found, results(layer, x, *routed), exact, strict=True)):
        accept(str(i), *values)


@pytest.mark.parametrize("name", ["Qwen3Moe", "Llama4"])
def test_under_autocast(name):
    plain, patched, _ = pair(name, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = grads(patched), grads(plain)
    exact = grads(plain)
    assert all(found[name].dtype == expected[name].dtype for name in exact)
    for name in exact:
        near = (expected[name].float() - exact[name]).norm()
        assert (found[name].float() - exact[name]).norm() <= 2 * near + 1e-3 * exact[name].norm()


def test_no_tokens_and_one():
    model, layer, (x, index, weights) = one_layer()
    few = [[t[:n] for t in (x, index, weights)] for n in (0, 1)]
    expected = [layer(*given) for given in few]
    patch_peft(model)
    for given, right in zip(few, expected, strict=True):
        y = layer(given[0].requires_grad_(), *given[1:])
        torch.testing.assert_close(y, right)
        assert torch.autograd.grad(y.sum(), given[0])[0].shape == given[0].shape


def test_second_derivatives_and_transforms():
    model, layer, (x, index, weights) = one_layer()
    patch_peft(model)
    x = x[:3].requires_grad_()

    def of(x):
        return layer(x, index[:3], weights[:3]).square().sum()

    assert torch.autograd.gradgradcheck(of, x)
    (expected,) = torch.autograd.grad(of(x), x)
    torch.testing.assert_close(torch.func.grad(of)(x), expected)


def test_dropout_of_the_low_rank_path(monkeypatch):
    model, layer, (x, index, weights) = one_layer()
    expected = layer(x, index, weights)
    patch_peft(model, expert_dropout=0.4)
    monkeypatch.setattr("fastlora.functional.new_seed", lambda _: torch.tensor([5]))
    found = layer.train()(x, index, weights)
    torch.testing.assert_close(layer.eval()(x, index, weights), expected)
    order = index.flatten().sort(stable=True)[1]
    mask = keep_mask(torch.tensor([5]), range(20), 16, 0.4) * kept_scale(0.4)
    own = layer.get_base_layer()
    a, b, scaling, *_ = fastlora.peft.experts.operands(layer)[1][2][0]
    y = torch.zeros_like(x)
    for row, at in enumerate(order.tolist()):
        token, e = at // 2, index.flatten()[at]
        h = own.gate_up_proj[e] @ x[token] + scaling * (b[e] @ (a[e] @ (x[token] * mask[row])))
        gate, up = h.chunk(2)
        inner = own.down_proj[e] @ (own.act_fn(gate) * up)
        y[token] += weights.flatten()[at] * inner
    torch.testing.assert_close(found, y)
    assert not torch.allclose(found, expected)


def test_dropout_stays_until_another_is_given(tmp_path):
    model, layer, _ = one_layer()
    fastlora.save_adapter(model, tmp_path)
    patch_peft(model, expert_dropout=0.4)
    fastlora.load_adapter(model, tmp_path, "other")
    assert layer._expert_dropout == 0.4
    patch_peft(model, expert_dropout=0.0)
    assert layer._expert_dropout == 0.0


@pytest.mark.parametrize(
    ("p", "kind", "message"),
    [(1.5, ValueError, "between 0 and 1, got 1.5"), ("0.1", TypeError, "a number, got str")],
)
def test_wrong_dropout(p, kind, message):
    model = wrapped()
    with pytest.raises(kind, match=f"expert_dropout must be {message}"):
        patch_peft(model, expert_dropout=p)
    assert not any("fastlora" in type(m).__module__ for m in model.modules())
