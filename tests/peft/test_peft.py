# SPDX-License-Identifier: Apache-2.0
"""Under PEFT, fused: one line, reversible, and every behaviour of PEFT's as it was."""

import copy
import pickle

import peft_models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import X, add, config, grads, layers, pair, same, same_kinds, wrapped
from tiny_models import VOCABULARY, bert, gpt2, llama, mlp, outputs, train_a_little
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize

from fastlora import patch_peft, unpatch_peft
from fastlora.peft import register
from fastlora.peft.linear import FusedLinear

# One line, reversible


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_a_model_is_patched_and_unpatched(make, fused):
    plain = wrapped(make(), target_modules="all-linear")
    model = copy.deepcopy(plain)
    before = outputs(model)
    report = patch_peft(model)
    assert report.not_fused == [] and len(report.fused) == len(layers(model)) > 7
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5)
    assert len(fused) == len(report.fused)
    assert all(type(layer) is FusedLinear for layer in layers(model))
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert patch_peft(model) == report
    for _ in range(2):
        unpatch_peft(model)
        same_kinds(model, plain)
    assert torch.equal(outputs(model), before) and len(fused) == len(report.fused)


def test_copies_and_pickles_are_patched_too(fused):
    _, model, _ = pair()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        fused.clear()
        torch.testing.assert_close(copied(X), model(X))
        assert len(fused) == 4
        add(copied, target_modules=["0", "2", "head"])
        assert type(copied.base_model.model.head) is FusedLinear
        unpatch_peft(copied)
        assert not any(type(layer) is FusedLinear for layer in layers(copied))


def test_unpatching_a_parametrized_layer():
    _, model, _ = pair()
    layer = layers(model)[0]
    layer.gain = nn.Parameter(torch.ones(2))
    parametrize.register_parametrization(layer, "gain", nn.Softplus())
    unpatch_peft(model)
    assert type(layer).__name__ == "ParametrizedLinear" and type(layer).__base__ is lora.Linear
    torch.testing.assert_close(layer.gain, nn.functional.softplus(torch.ones(2)))
    parametrize.remove_parametrizations(layer, "gain")
    assert type(layer) is lora.Linear


def test_registered_configs_build_fused_layers(fused):
    asked = config(target_modules=["0", "2"])
    assert register(asked) is asked
    model = train_a_little(get_peft_model(mlp(), asked))
    assert [type(layer) for layer in layers(model)] == [FusedLinear] * 2
    same(wrapped(), model)
    assert len(fused) == 4
    unpatch_peft(model)
    assert [type(layer) for layer in layers(model)] == [lora.Linear] * 2
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = get_peft_model(gpt2(), register(LoraConfig(target_modules=["c_fc"])))
    assert all(type(each) is FusedLinear for each in layers(model))
    assert all(each.is_target_conv_1d_layer for each in layers(model))


def test_registered_configs_leave_the_rest_to_peft():
    model = nn.Sequential(nn.Embedding(4, 6), peft_models.Subclass(6, 6), nn.Linear(6, 6))
    model[2].weight = peft_models.Quantised(model[2].weight.detach())
    asked = register(LoraConfig(target_modules=["0", "1", "2"]))
    kinds = [type(layer) for layer in layers(get_peft_model(model, asked))]
    assert kinds == [lora.Embedding, lora.Linear, lora.Linear]


def both_active(model):
    add(model, r=3, lora_alpha=5)
    model.base_model.set_adapter(["default", "other"])


def another_later(model):
    add(model, r=3, lora_alpha=5, target_modules=["2", "head"])
    model.delete_adapter("default")
    model.set_adapter("other")


def scaled(model):
    for layer in layers(model):
        layer.set_scale("default", 3.0)


def hot_swappable(model):
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    layer = layers(model)[0]
    assert isinstance(layer.scaling["default"], torch.Tensor)
    assert layer.r["default"] == 4 and layer.lora_A["default"].out_features == 8


def merged_and_unmerged(model):
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        model.unmerge_adapter()


TRAINED = {"bias": "lora_only", "modules_to_save": ["head"], "use_rslora": True}
TYPES = [("bfloat16", True), ("bfloat16", False), ("float16", True), ("float16", False)]


@pytest.mark.parametrize(
    ("model", "changes", "act"),
    [
        (mlp, {**TRAINED, "rank_pattern": {"0": 2}, "alpha_pattern": {"2": 16}}, None),
        (mlp, {"lora_bias": True}, None),
        (lambda: mlp(bias=False), {"lora_bias": True}, None),
        (mlp, {}, scaled),
        (mlp, {}, hot_swappable),
        (mlp, {}, merged_and_unmerged),
        (mlp, {}, another_later),
        (mlp, {}, both_active),
        (lambda: mlp().bfloat16(), {}, both_active),
    ],
)
def test_outputs_and_gradients(model, changes, act, fused):
    plain, model, _ = pair(model(), **changes)
    for each in (plain, model):
        if act is not None:
            act(each)
    dtype = model.base_model.model.head.weight.dtype
    loose = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {}
    same(plain, model, X.to(dtype), **loose)
    assert len(fused) == 4
    trained = grads(model, X.to(dtype)).keys()
    for part in ("base_layer.bias", "modules_to_save"):
        assert any(part in name for name in trained) == ("bias" in changes)
    assert any("lora_B.default.bias" in name for name in trained) == ("lora_bias" in changes)


@pytest.mark.parametrize(("base", "upcast"), TYPES)
def test_sixteen_bits(base, upcast, fused):
    base = getattr(torch, base)
    plain = get_peft_model(mlp().to(base), config(), autocast_adapter_dtype=upcast)
    plain = train_a_little(plain)
    adapter = torch.float32 if upcast else base
    assert {layer.lora_A["default"].weight.dtype for layer in layers(plain)} == {adapter}
    model = copy.deepcopy(plain)
    patch_peft(model)
    assert model(X.to(base)).dtype == base
    same(plain, model, X.to(base), rtol=2e-2, atol=2e-2)
    assert len(fused) == 6


@pytest.mark.parametrize(("dtype", "narrow"), TYPES)
def test_autocast(dtype, narrow, fused):
    model = nn.Sequential(nn.Linear(6, 8)).to(torch.bfloat16 if narrow else torch.float32)
    plain, model, _ = pair(model, target_modules=["0"])
    with torch.autocast("cpu", getattr(torch, dtype)):
        same(plain, model, rtol=2e-2, atol=2e-2)
    assert len(fused) == 2


def test_disabled_and_merged(fused):
    plain, model, _ = pair()
    with plain.disable_adapter(), model.disable_adapter():
        assert torch.equal(plain(X), model(X)) and fused == []
    for each in (plain, model):
        each.merge_adapter()
    assert torch.equal(plain(X), model(X)) and fused == []
    assert patch_peft(model).not_fused == []
    unloaded = model.merge_and_unload()
    torch.testing.assert_close(unloaded(X), plain(X), rtol=1e-5, atol=1e-6)
    assert [type(module) for module in unloaded.modules()] == [type(m) for m in mlp().modules()]


def test_a_mixed_model(fused):
    """New layers are fused, and nothing of ours is left once it is unloaded."""
    asked = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    plain = get_peft_model(llama(), asked, mixed=True)
    model = copy.deepcopy(plain)
    assert patch_peft(model, fuse_siblings=[("q_proj", "k_proj", "v_proj")]).siblings
    for each in (plain, model):
        torch.manual_seed(4)
        each.add_adapter("other", LoraConfig(r=2, target_modules=["o_proj", "q_proj"]))
        each.set_adapter(["default", "other"])
    assert [type(layer) for layer in layers(model)] == [FusedLinear] * 4
    torch.testing.assert_close(outputs(model), outputs(plain), rtol=1e-4, atol=1e-5)
    assert len(fused) == 2  # the others with their siblings
    copied = copy.deepcopy(model)
    unpatch_peft(copied)
    same_kinds(copied, plain)
    same_kinds(model.unload(), plain.unload())


def test_dropout_keeps_what_it_should(fused):
    """Another mask than PEFT's, of the same odds and the same scale; none in evaluation."""
    plain, model, _ = pair(lora_dropout=0.5)
    same(plain.eval(), model.eval())
    layer, x = layers(model)[0], torch.randn(4, 6)
    base = layer.base_layer(x)
    expected = layer(x) - base
    layer.train()
    torch.manual_seed(0)
    drawn = torch.stack([layer(x) - base for _ in range(2000)])
    assert not torch.equal(drawn[0], drawn[1])
    error = (drawn.mean(0) - expected).abs() / (drawn.std(0) / 2000**0.5)
    assert error.max() < 5
    torch.manual_seed(0)
    assert torch.equal(layer(x) - base, drawn[0])
    layer.lora_dropout.eval()
    fused.clear()
    torch.testing.assert_close(layer(x) - base, expected, rtol=1e-4, atol=1e-5)
    assert len(fused) == 1


def test_arguments_reach_the_base_layer_and_peft(fused):
    class Scaled(nn.Linear):
        def forward(self, x, factor=1.0):
            return super().forward(x) * factor

    plain = get_peft_model(nn.Sequential(Scaled(6, 8)), config(target_modules=["0"]))
    model = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match="fused nothing"):
        patch_peft(model)
    (layer,), (own,) = layers(model), layers(plain)
    assert torch.equal(layer(X, factor=3.0), own(X, factor=3.0))
    assert not torch.equal(layer(X, factor=3.0), layer(X))
    plain, model, _ = pair()
    with pytest.raises(TypeError, match="factor"):
        layers(model)[0](X, factor=3.0)
    of_rows = {"adapter_names": ["default", "__base__", "default"]}
    torch.testing.assert_close(model.eval()(X, **of_rows), plain.eval()(X, **of_rows))
    assert len(fused) == 2


def llama_s_loss(model, length):
    ids = torch.randint(0, VOCABULARY, (2, length))
    return model(ids, labels=ids).loss


@pytest.mark.parametrize(
    ("make", "targets", "loss"),
    [
        (mlp, ["0", "2"], lambda model, rows: model(torch.randn(rows, 6)).sum()),
        (lambda: llama(num_hidden_layers=1), "all-linear", llama_s_loss),
    ],
)
def test_compiled_without_a_break_or_a_second_compilation(make, targets, loss):
    plain, model, _ = pair(make(), lora_dropout=0.5, target_modules=targets)
    torch._dynamo.reset()
    try:
        loss(torch.compile(plain, backend="eager", fullgraph=True), 2)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"this PyTorch compiles no such model: {error}")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    torch.testing.assert_close(
        outputs(compiled.eval()), outputs(plain.eval()), rtol=1e-5, atol=1e-6
    )
    for training in (False, True):
        compiled.train(training)
        counts = []
        for rows in (2, 3, 5, 11):
            loss(compiled, rows).backward()
            counts.append(counter.frame_count)
        assert len(set(counts)) == 1, f"training={training}"


def test_a_hot_swap_compiles_nothing_again(tmp_path):
    wrapped(r=7, lora_alpha=3).save_pretrained(tmp_path)
    plain, model, _ = pair()
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    for each in (plain, model):
        hot_swappable(each.eval())
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        before, count = compiled(X), counter.frame_count
        torch.testing.assert_close(before, plain(X), rtol=1e-4, atol=1e-5)
        for each in (plain, model):
            hotswap_adapter(each, str(tmp_path), adapter_name="default")
        after = compiled(X)
        torch.testing.assert_close(after, plain(X), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == count and not torch.allclose(after, before)
