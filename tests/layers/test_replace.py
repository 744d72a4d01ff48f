# SPDX-License-Identifier: Apache-2.0
"""`replace_linears` and `lora_state_dict`: what is replaced, what trains, what is saved."""

import copy
from functools import partial
from unittest import mock

import peft
import peft_models
import pytest
import tiny_models as tiny
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from fastlora import LoRALinear, lora_state_dict, replace_linears

QKV = ("q_proj", "k_proj", "v_proj")
FALSE = {"r": 4, "init_lora_weights": False}
ignores_wrappers = pytest.mark.filterwarnings(
    "ignore:FSDP", "ignore:.*torch.distributed.algorithms"
)


def lora_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def replaced(make=tiny.llama, names=("q_proj", "v_proj"), **arguments):
    model = make()
    replace_linears(model, names, **FALSE, **arguments)
    return model


NAMES = [
    (tiny.llama, ["q_proj", "v_proj"]),
    (tiny.llama, r"model\.layers\.0\..*_proj"),
    (tiny.llama, ["0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"]),
    (tiny.gpt2, ["c_attn", "c_proj", "lm_head"]),  # whose weight is the embedding
    (tiny.bert, ["query", "dense"]),
]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("make", "names"), NAMES)
def test_the_same_layers_as_in_peft_and_the_same_numbers(make, names):
    config = peft.LoraConfig(r=3, target_modules=names, init_lora_weights=False)
    theirs, ours = peft.get_peft_model(make(), config).base_model.model, make()
    weights = {p.data_ptr() for p in ours.parameters()}
    report = replace_linears(ours, names, r=3)
    layers = {n: m for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert report.fused == lora_names(ours) == list(layers) and report.not_fused == []
    assert trainable(ours) == {f"{name}.lora_{f}" for name in layers for f in "AB"}
    assert {p.data_ptr() for p in ours.parameters() if not p.requires_grad} == weights
    pairs = [
        (ours.get_parameter(f"{name}.lora_{f}"), layer.get_parameter(f"lora_{f}.default.weight"))
        for name, layer in layers.items()
        for f in "AB"
    ]
    for mine, other in pairs:
        mine.data.copy_(other)
    labels = {"labels": torch.tensor([0, 2]) if make is tiny.bert else tiny.tokens()}
    losses = [model(tiny.tokens(), **labels).loss for model in (ours, theirs)]
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    for mine, other in pairs:
        assert_close(mine.grad, other.grad)


def test_a_function_selects_and_the_report_says_what_and_what_not():
    model = tiny.bert()
    model.bert.pooler.dense = parametrizations.weight_norm(model.bert.pooler.dense)
    last, ends = "bert.encoder.layer.1.output.dense", ("query", "dense", "word_embeddings")
    report = replace_linears(model, lambda name, _: name != last and name.endswith(ends), r=2)
    assert "query" in report.fused[0] and last not in report.fused
    assert str(report).splitlines() == [
        "7 of 9 LoRA layers fused",
        "  fused: dense x5, query x2",
        "  not fused, must be an nn.Linear or a transformers Conv1D, got Embedding: "
        "word_embeddings",
        "  not fused, computes its weight or bias (parametrized, pruned, weight-normalised): dense",
    ]
    assert {layer.r for layer in model.modules() if isinstance(layer, LoRALinear)} == {2}


def test_names_that_are_no_module_s_are_reported():
    report = replace_linears(tiny.llama(), ["q_proj", "_proj", "qproj", "self_attn.v_proj"])
    assert len(report.fused) == 4
    assert report.not_fused == [(n, "no module has this name") for n in ("_proj", "qproj")]


@pytest.mark.parametrize("names", [["0"], ["again"], r".*", lambda n, _: n == "1.again"])
def test_a_module_under_two_names_is_replaced_once(names):
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential())
    model[1].add_module("again", model[0])
    assert len(replace_linears(model, names).fused) == 1
    assert isinstance(model[0], LoRALinear) and model[1].again is model[0]
    assert list(lora_state_dict(model)) == ["0.lora_A", "0.lora_B"]


def test_what_was_replaced_before_stays():
    model = replaced(tiny.mlp, ["0"])
    model[1].weight.requires_grad_(True)
    first, a = model[0], model[0].lora_A.detach().clone()
    report = replace_linears(model, ["0", "2"], r=2)
    assert report.fused == ["2"] and "LoRALinear" in dict(report.not_fused)["0"]
    assert model[0] is first and torch.equal(first.lora_A, a)
    assert trainable(model) == {f"{n}.lora_{f}" for n in "02" for f in "AB"}


@ignores_wrappers
def test_names_inside_wrappers_are_the_plain_ones():
    model, plain = tiny.llama(), replaced(names=r".*_proj")
    model.model.layers[0].self_attn = checkpoint_wrapper(model.model.layers[0].self_attn)
    model.model.layers[0].mlp.up_proj = checkpoint_wrapper(model.model.layers[0].mlp.up_proj)
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp, backend="eager")
    compiled = torch.compile(model, backend="eager")
    base = tiny.outputs(compiled)
    report = replace_linears(compiled, r".*_proj", **FALSE)
    assert sorted(report.fused) == sorted(lora_names(plain)) and report.not_fused == []
    y = tiny.outputs(compiled)
    assert not torch.allclose(y, base, atol=1e-3)
    assert_close(tiny.outputs(model), y)


@pytest.mark.parametrize("masked", [False, True])
def test_pytorch_s_fast_path_does_not_pass_an_adapter_by(masked):
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 4, 8)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[1, 3] = masked

    def seen(model):  # what comes out where the mask is set is not defined
        return model(x, src_key_padding_mask=mask)[~mask]

    base = seen(model)
    report = replace_linears(model, lambda _, m: isinstance(m, nn.Linear), lora_alpha=64, **FALSE)
    assert report.fused == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert [name for name, _ in report.not_fused] == [
        f"layers.{i}.self_attn.out_proj" for i in (0, 1)
    ]
    y = seen(model)
    assert not torch.allclose(y, base, atol=1e-3)
    with torch.no_grad():
        assert_close(seen(model), y)
        assert_close(seen(copy.deepcopy(model)), y)


@pytest.mark.parametrize("how", [True, [QKV, ("gate_proj", "up_proj")]])
def test_siblings(how, together):
    """The plain layers among them take part; numbers are those of layers alone."""
    names = ["q_proj", "gate_proj", "down_proj"]
    model, alone = tiny.llama(), replaced(names=names)
    report = replace_linears(model, names, fuse_siblings=how, **FALSE)
    model.load_state_dict(alone.state_dict())
    mlp = ("gate_proj", "up_proj", "down_proj")
    assert report.siblings == [(f"model.layers.{i}.self_attn", QKV) for i in (0, 1)]
    assert report.gated_mlps == [(f"model.layers.{i}.mlp", mlp) for i in (0, 1)]
    assert "siblings: q_proj, k_proj, v_proj x2" in str(report)
    assert_close(tiny.outputs(model), tiny.outputs(alone))
    assert together == [3, 3]
    assert trainable(model) == trainable(alone)


def compiled():
    return nn.Sequential(torch.compile(nn.Linear(6, 6), backend="eager"))


def within(kind):
    """A model in such a wrapper, without what its making needs."""
    wrapper = kind.__new__(kind)
    nn.Module.__init__(wrapper)
    wrapper.module = tiny.mlp()
    return wrapper


ddp = partial(within, DistributedDataParallel)


def fsdp():
    return nn.Sequential(within(FullyShardedDataParallel))


REFUSED = [
    (tiny.llama, ["q_porj"], {}, ValueError, "no module has this name: q_porj"),
    (tiny.llama, "q_proj", {}, ValueError, r"'q_proj' replaces nothing.*\n.*: q_proj x2, k_proj"),
    (tiny.llama, [], {}, ValueError, "replaces nothing"),
    (tiny.llama, "h(", {}, ValueError, r"'h\(' is no regular expression"),
    (tiny.llama, 3, {}, TypeError, "names must be a list of names, .* or a function, got 3"),
    (tiny.llama, ["mlp"], {}, ValueError, "must be an nn.Linear .* got LlamaMLP: mlp"),
    (lambda: nn.Linear(3, 3), ".*", {}, ValueError, "is one linear layer: LoRALinear.from_linear"),
    (nn.Sequential, ".*", {}, ValueError, "could be replaced: nothing"),
    (lambda: "model", ["head"], {}, TypeError, r"model must be an nn\.Module, got str"),
    (compiled, ["0"], {}, ValueError, r"is compiled by itself: .*\n.*: nothing"),
    (peft_models.wrapped, ["head"], {}, ValueError, "model.0 is a BaseTunerLayer: patch_peft"),
    (ddp, ["head"], {}, ValueError, "model is a DistributedDataParallel: replace first, then"),
    (fsdp, ".*head", {}, ValueError, "0 is a FullyShardedDataParallel: replace first, then"),
    (tiny.mlp, ["0"], {"r": 0}, ValueError, "r must be an int, 1 or more, got 0"),
    (tiny.mlp, ["0"], {"rank": 4}, TypeError, "unexpected keyword argument 'rank'"),
    (tiny.mlp, ["0"], {"fuse_siblings": torch.ones(1, 3)}, ValueError, "raised RuntimeError"),
]


@pytest.mark.parametrize(("make", "names", "arguments", "error", "message"), REFUSED)
def test_what_cannot_be_is_refused_and_nothing_changed(make, names, arguments, error, message):
    model = make()
    before = isinstance(model, nn.Module) and tiny.bits(model)
    with pytest.raises(error, match=message):
        replace_linears(model, names, **arguments)
    assert not before or tiny.same(before, tiny.bits(model))


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_failure_half_way_changes_nothing(error):
    model = tiny.bert()
    model.bert.embeddings.requires_grad_(False)
    before = tiny.bits(model)
    failing = mock.patch.object(LoRALinear, "_draw_adapter", side_effect=[None, None, error])
    with pytest.raises(error), failing:
        replace_linears(model, ["query", "value"])
    assert tiny.same(before, tiny.bits(model))


@ignores_wrappers
@pytest.mark.parametrize("merged", [False, True])
def test_the_adapters_are_what_is_saved_and_loaded(merged):
    model, other = replaced(), replaced()
    y, names = tiny.outputs(model), lora_names(model)
    for name in names if merged else ():
        model.get_submodule(name).merge()
    model.model.layers[0].self_attn = checkpoint_wrapper(model.model.layers[0].self_attn)
    state = lora_state_dict(torch.compile(model, backend="eager"))
    assert list(state) == [f"{name}.lora_{f}" for name in names for f in "AB"]
    assert not any(tensor.requires_grad for tensor in state.values())
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected and not any("lora" in name for name in missing)
    assert_close(tiny.outputs(other), y)
    with pytest.raises(ValueError, match="Sequential has no LoRALinear; replace_linears"):
        lora_state_dict(tiny.mlp())


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("fused", [False, [QKV]])
def test_offloaded(fused, merged):
    """Accelerate's hooks: weights are on the meta device but for a forward."""
    model = replaced(names=[*QKV, "down_proj"], fuse_siblings=fused)
    layer = model.model.layers[0].self_attn.q_proj
    for name in lora_names(model) if merged else ():
        model.get_submodule(name).merge()
    y = tiny.outputs(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    for _ in range(2):
        assert layer.weight.is_meta and layer.lora_A.is_meta and layer.lora_B.is_meta
        assert_close(tiny.outputs(model), y)
    with pytest.raises(RuntimeError, match="offloading"):
        layer.unmerge() if merged else layer.merge()
    with pytest.raises(ValueError, match="lora_A is on the meta device: offloaded"):
        lora_state_dict(model)
    remove_hook_from_submodules(model)
    layer.unmerge()
    assert_close(tiny.outputs(model), y, rtol=1e-4, atol=1e-4)


def test_checkpointed_models_train_as_others():
    """Llama's own checkpointing, with dropout: the same elements are dropped again."""
    found, state = [], replaced().state_dict()
    for how in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        model = replaced(lora_dropout=0.3).train()
        model.load_state_dict(state)
        if how is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        torch.manual_seed(5)
        model(tiny.tokens(), labels=tiny.tokens()).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if "lora" in n})
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])
