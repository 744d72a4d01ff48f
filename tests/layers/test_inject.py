# SPDX-License-Identifier: Apache-2.0
"""`inject` and the model-level functions: what is replaced, what trains, what comes back."""

import copy
import pickle

import peft
import pytest
import tiny_models as tiny
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import fastlora
from fastlora import LoRAConfig, inject
from fastlora.injected import InjectedLinear as LoRALinear
from fastlora.model import walk
from fastlora.trainable import TrainableModule


def lora_names(model):
    return [name for name, module, _ in walk(model) if isinstance(module, LoRALinear)]


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def unlike(a, b):
    return not torch.allclose(a, b, atol=1e-3)


# What is replaced


SELECTIONS = [
    (tiny.llama, {"target_modules": ["q_proj", "v_proj"]}),
    (tiny.llama, {"target_modules": "all-linear"}),
    (tiny.llama, {"target_modules": "All-Linear", "exclude_modules": ["gate_proj"]}),
    (tiny.llama, {"target_modules": r"model\.layers\.0\..*_proj"}),
    (tiny.llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    (tiny.llama, {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"lm_head": 2}}),
    (tiny.gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    (tiny.gpt2, {"target_modules": "all-linear"}),
    (tiny.bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    (tiny.bert, {"target_modules": "all-linear"}),
    (tiny.bert, {"target_modules": ["query"], "modules_to_save": ["pooler", "classifier"]}),
    (tiny.bert, {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}),
    (tiny.bert, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
]


def said(value) -> str:
    """A parameter in a test's name, the same in every process."""
    return getattr(value, "__name__", str(value))[:50]


@pytest.mark.parametrize(("make", "values"), SELECTIONS, ids=said)
def test_the_layers_and_parameters_that_train_are_those_of_peft(make, values):
    ours, theirs = make(), make()
    report = inject(ours, LoRAConfig(r=3, **values))
    config = peft.LoraConfig(r=3, **{**values, "target_modules": values["target_modules"]})
    theirs = peft.get_peft_model(theirs, config)
    layers = {
        name.removeprefix("base_model.model."): (m.in_features, m.out_features, m.r["default"])
        for name, m in theirs.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    }
    assert {name: tuple(rest) for name, *rest in report.replaced} == layers
    assert lora_names(ours) == list(layers)
    names = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").removesuffix(".weight")
        for name in trainable(theirs)
    }
    assert {name.removesuffix(".weight") for name in trainable(ours)} == names
    assert (report.trainable, report.total) == theirs.get_nb_trainable_parameters()


def on_meta(in_features, out_features, r):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(in_features, out_features, bias=False))
    return inject(model, LoRAConfig(r=r, target_modules=["0"])).trainable


def test_the_published_counts():
    assert on_meta(1024, 1024, r=4) / 1024**2 == pytest.approx(1 - 0.9922, abs=5e-5)
    assert on_meta(500, 200, r=3) == 2100 == 0.021 * 500 * 200
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())  # two classes
    config = LoRAConfig(r=1, target_modules=["query", "value"], task_type="SEQ_CLS")
    report = inject(model, config)
    assert report.trainable == 38_402
    assert round(report.total / 1e6, 1) == 109.5
    assert round(report.percentage, 3) == 0.035


def test_the_report_reads_well():
    model = tiny.bert()
    model.bert.pooler.dense = nn.utils.parametrizations.weight_norm(model.bert.pooler.dense)
    config = LoRAConfig(
        r=2,
        target_modules="all-linear",
        exclude_modules=["key"],
        task_type="SEQ_CLS",
        rank_pattern={"layer.1.attention.self.query": 16},
    )
    report = inject(model, config)
    assert str(report).splitlines() == [
        f"adapter 'default': 10 layers, {report.trainable:,} of {report.total:,} parameters train "
        f"({report.percentage:.3g}%)",
        "  query  x1  16->16  r=2",
        "  value  x2  16->16  r=2",
        "  dense  x2  16->16  r=2",
        "  dense  x2  16->24  r=2",
        "  dense  x2  24->16  r=2",
        "  query  x1  16->16  r=16",
        "  trained in full: classifier (51)",
        "  left alone, computes its weight or bias (parametrized, pruned, weight-normalised): "
        "dense",
        "  left alone, excluded: key x2",
    ]


def shared_model():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential())
    model[1].add_module("again", model[0])
    return model


@pytest.mark.parametrize("target", [["0"], ["again"], ["0", "again"], "all-linear"])
def test_a_shared_module_stays_shared(target):
    model = shared_model()
    report = inject(model, LoRAConfig(target_modules=target))
    assert isinstance(model[0], LoRALinear) and model[1].again is model[0]
    assert [name for name, *_ in report.replaced] == ["0"]
    assert report.trainable == 2 * 8 * 6
    with pytest.raises(ValueError, match="selects nothing"):
        inject(shared_model(), LoRAConfig(target_modules=target, exclude_modules=["again"]))


def test_tied_weights_stay_tied_and_merging_leaves_the_other_alone():
    model = tiny.gpt2()
    inject(model, LoRAConfig(target_modules=["lm_head"]))
    embedding = model.transformer.wte.weight
    assert model.lm_head.weight is embedding
    tiny.train_a_little(model)
    before, logits = embedding.clone(), tiny.outputs(model)
    fastlora.merge(model)
    assert torch.equal(embedding, before)
    torch.testing.assert_close(tiny.outputs(model), logits)
    fastlora.unmerge(model)
    assert model.lm_head.weight is embedding


def test_weights_are_shared_not_copied():
    model = tiny.llama()
    addresses = {p.data_ptr() for p in model.parameters()}
    inject(model, LoRAConfig(target_modules="all-linear"))
    now = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    assert now == addresses


def test_names_inside_wrappers_are_the_plain_ones():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = tiny.llama()
    model.model.layers[0].self_attn = checkpoint_wrapper(model.model.layers[0].self_attn)
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp, backend="eager")
    report = inject(torch.compile(model, backend="eager"), LoRAConfig(target_modules="all-linear"))
    assert [name for name, *_ in report.replaced] == lora_names(tiny_injected("all-linear"))
    tiny.train_a_little(model)
    assert unlike(tiny.outputs(model), tiny.outputs(tiny.llama()))


def tiny_injected(target):
    model = tiny.llama()
    inject(model, LoRAConfig(target_modules=target))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_dtype_of_an_adapter(dtype):
    model = tiny.mlp().to(dtype)
    inject(model, LoRAConfig(target_modules="all-linear"))
    expected = torch.float32 if dtype == torch.bfloat16 else dtype
    assert {model.head.lora_A["default"].dtype, model.head.lora_B["default"].dtype} == {expected}
    inject(model, LoRAConfig(target_modules=["head"]), "own", adapter_dtype=dtype)
    assert model.head.lora_A["own"].dtype == dtype


# What is refused, with the model as it was


class Stateful(nn.Linear):
    def get_extra_state(self):
        return torch.ones(1)


class Frozen(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def hooked():
    layer = nn.Linear(6, 6)
    layer.forward = layer.forward
    return layer


def merged():
    model = tiny.mlp()
    inject(model, LoRAConfig(target_modules=["head"]), "first")
    fastlora.merge(model)
    return model


def with_peft():
    return peft.get_peft_model(tiny.mlp(), peft.LoraConfig(target_modules=["head"]))


def with_one(bias="none", saved=None):
    model = tiny.mlp()
    inject(model, LoRAConfig(target_modules=["2"], bias=bias, modules_to_save=saved), "first")
    return model


REFUSED = [
    (tiny.llama, {}, r"target_modules is None; .* are q_proj x2, k_proj x2,.* 'all-linear'"),
    (tiny.llama, {"target_modules": ["q_porj"]}, r"\['q_porj'\] selects nothing.*are .*q_proj"),
    (tiny.llama, {"target_modules": "q_proj"}, r"'q_proj' selects nothing; .*layers are q_proj"),
    (
        tiny.llama,
        {"target_modules": ["q_proj"], "layers_to_transform": 9},
        r"with .*=9 selects nothing",
    ),
    (
        tiny.llama,
        {"target_modules": ["q_proj"], "exclude_modules": ".*attn.*"},
        "exclude_modules and modules_to_save keep 10 modules out",
    ),
    (tiny.llama, {"target_modules": ["mlp"]}, r"'model.layers.0.mlp', which must be an nn.Linear"),
    (tiny.llama, {"target_modules": ["embed_tokens"]}, "an nn.Linear .* got Embedding"),
    (
        tiny.llama,
        {"target_modules": ["q_proj", "norm"]},
        "'model.norm', which must be an nn.Linear",
    ),
    (lambda: nn.Sequential(nn.ReLU()), {"target_modules": "all-linear"}, "linear layers are none"),
    (lambda: nn.Linear(3, 3), {"target_modules": "all-linear"}, "LoRALinear.from_linear"),
    (lambda: nn.Sequential(Frozen(6, 6)), {"target_modules": ["0"]}, "is a Frozen, whose forward"),
    (lambda: nn.Sequential(hooked()), {"target_modules": ["0"]}, "forward set on the object"),
    (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))),
        {"target_modules": ["0"]},
        "computes its weight",
    ),
    (
        lambda: nn.Sequential(torch.compile(nn.Linear(6, 6), backend="eager")),
        {"target_modules": ["0"]},
        "compiled by itself: inject first",
    ),
    (
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2)),
        {"target_modules": ["out_proj"]},
        "never calls it",
    ),
    (with_peft, {"target_modules": ["head"]}, "'base_model.model.head' is a layer of PEFT's"),
    (merged, {"target_modules": ["head"]}, "is merged: unmerge"),
    (with_one, {"target_modules": ["2"], "adapter": "first"}, "adapter 'first' exists already"),
    (
        lambda: with_one("all"),
        {"target_modules": ["2"], "bias": "all"},
        "'first' trains the model's",
    ),
    (
        lambda: with_one(saved=["head"]),
        {"target_modules": ["2", "head"]},
        "'head', which another adapter trains in full",
    ),
    (
        with_one,
        {"target_modules": ["head"], "modules_to_save": ["2"]},
        "'2', which has adapters already",
    ),
    (
        lambda: with_one(saved=["head"]),
        {"target_modules": ["0"], "modules_to_save": ["whole"]},
        "names no module; the model's modules are head, 2, 1, 0",
    ),
    (
        lambda: nn.ModuleDict({"part": with_one(saved=["head"]), "last": nn.Linear(5, 5)}),
        {"target_modules": ["last"], "modules_to_save": ["part"]},
        "'part', which has adapters already",
    ),
    (
        lambda: nn.Sequential(nn.Linear(6, 6), Stateful(6, 6)),
        {"target_modules": ["0"], "modules_to_save": ["1"]},
        "'1', which has extra state",
    ),
    (
        lambda: nn.Sequential(with_one("all"), nn.Linear(5, 5)),
        {"target_modules": ["1"], "bias": "all"},
        "'first' trains the model's",
    ),
    (
        tiny.bert,
        {"target_modules": ["query"], "modules_to_save": ["clasifier"]},
        "names no module; the model's modules are .*classifier",
    ),
    (
        tiny.bert,
        {"target_modules": ["query"], "modules_to_save": ["encoder.layer"]},
        "'bert.encoder.layer', which is a ModuleList",
    ),
    (
        tiny.bert,
        {"target_modules": ["query"], "modules_to_save": ["pooler", "pooler.dense"]},
        "'bert.pooler', which cannot be .* while 'bert.pooler.dense'",
    ),
    (tiny.mlp, {"target_modules": ["head"], "rank_pattern": {"h(": 2}}, "not a regular expression"),
    (tiny.mlp, {"target_modules": ["head"], "adapter": "a.b"}, "without '.'"),
    (tiny.mlp, {"target_modules": ["head"], "adapter": "keys"}, "adapter name must be"),
    (tiny.mlp, {"target_modules": ["head"], "adapter": "training"}, "adapter name must be"),
]


@pytest.mark.parametrize(("make", "values", "message"), REFUSED, ids=said)
def test_what_cannot_be_is_refused_and_nothing_changed(make, values, message):
    model, values = make(), dict(values)
    adapter = values.pop("adapter", "default")
    before = tiny.bits(model)
    with pytest.raises(ValueError, match=message):
        inject(model, LoRAConfig(**values), adapter)
    assert tiny.same(before, tiny.bits(model))


@pytest.mark.parametrize("first", [False, True])
def test_a_failure_half_way_changes_nothing(first, monkeypatch):
    model = tiny.bert()
    if first:
        config = LoRAConfig(target_modules=["query"], modules_to_save=["classifier"])
        inject(model, config, "first")
        fastlora.set_adapter(model, [])
    before, calls, add = tiny.bits(model), [], LoRALinear.add_adapter

    def fail(layer, name, **kwargs):
        calls.append(name)
        if len(calls) == 4:
            raise MemoryError("no more")
        add(layer, name, **kwargs)

    monkeypatch.setattr(LoRALinear, "add_adapter", fail)
    config = LoRAConfig(target_modules=["query", "value"], modules_to_save=["classifier"])
    with pytest.raises(MemoryError):
        inject(model, config, "second")
    assert tiny.same(before, tiny.bits(model))
    monkeypatch.undo()
    inject(model, config, "second")


def test_wrong_kinds_of_arguments():
    with pytest.raises(TypeError, match="config must be a LoRAConfig, got dict"):
        inject(tiny.mlp(), {"r": 8})
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        inject("model", LoRAConfig(target_modules=["head"]))


WRONG_DTYPES = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float64),
]


@pytest.mark.parametrize(("base", "dtype"), WRONG_DTYPES)
def test_a_dtype_that_no_forward_takes_is_refused(base, dtype, tmp_path):
    model = tiny.mlp()
    inject(model, LoRAConfig(target_modules=["0", "head"]))
    fastlora.save_adapter(model, tmp_path)
    model = tiny.mlp()
    model.head.to(base)
    model[0].to(dtype)  # the first of the layers takes it
    before = tiny.bits(model)
    with pytest.raises(TypeError, match="adapter_dtype must be"):
        inject(model, LoRAConfig(target_modules=["0", "head"]), adapter_dtype=dtype)
    with pytest.raises(TypeError, match="adapter_dtype must be"):
        fastlora.load_adapter(model, tmp_path, adapter_dtype=dtype)
    assert tiny.same(before, tiny.bits(model))


@pytest.mark.parametrize("masked", [False, True])
def test_pytorch_s_fast_path_does_not_pass_an_adapter_by(masked):
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(2, 4, 8), torch.zeros(2, 4, dtype=torch.bool)
    mask[1, 3] = masked
    seen = ~mask  # what comes out where the mask is set is not defined
    base = model(x, src_key_padding_mask=mask)[seen]
    config = LoRAConfig(target_modules="all-linear", lora_alpha=64, init_lora_weights=False)
    report = inject(model, config)
    assert [name for name, *_ in report.replaced] == [
        f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)
    ]
    y = model(x, src_key_padding_mask=mask)[seen]
    for one in (model, copy.deepcopy(model)):
        with torch.no_grad():
            torch.testing.assert_close(one(x, src_key_padding_mask=mask)[seen], y)
    assert unlike(y, base)


# Several adapters


def two(a="foo", b="foobar", make=tiny.mlp, **values):
    model = make()
    inject(model, LoRAConfig(**{"target_modules": ["0", "2"], **values}), a)
    tiny.train_a_little(model)
    inject(model, LoRAConfig(**{"target_modules": ["2", "head"], **values}), b)
    return tiny.train_a_little(model)


def test_adapters_are_switched_and_only_active_ones_train():
    model = two()
    assert trainable(model) == {f"{n}.lora_{f}.foobar" for n in ("2", "head") for f in "AB"}
    y = {}
    for names in ("foo", "foobar", ["foo", "foobar"], ["foobar", "foo"], []):
        fastlora.set_adapter(model, names)
        y[str(names)] = tiny.outputs(model)
        wanted = [names] if isinstance(names, str) else names
        assert {name.rpartition(".")[2] for name in trainable(model)} == set(wanted)
    assert torch.equal(y["[]"], tiny.outputs(tiny.mlp()))
    assert unlike(y["foo"], y["[]"]) and unlike(y["foo"], y["foobar"])
    torch.testing.assert_close(y["['foo', 'foobar']"], y["['foobar', 'foo']"])
    lone = tiny.mlp()
    inject(lone, LoRAConfig(target_modules=["0", "2"]), "foo")
    lone.load_state_dict({k: v for k, v in model.state_dict().items() if "foobar" not in k})
    assert torch.equal(tiny.outputs(lone), y["foo"])


def test_deleting_foo_leaves_foobar():
    model = two()
    y = tiny.outputs(model)
    fastlora.delete_adapter(model, "foo")
    assert torch.equal(tiny.outputs(model), y)
    assert not any(".foo" in f"{key}." and key.endswith(".foo") for key in model.state_dict())
    fastlora.delete_adapter(model, "foobar")
    assert torch.equal(tiny.outputs(model), tiny.outputs(tiny.mlp()))
    assert lora_names(model) and not trainable(model)
    inject(model, LoRAConfig(target_modules=["head"]), "foobar")


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (fastlora.set_adapter, "fo"),
        (fastlora.set_adapter, ""),
        (fastlora.set_adapter, ["foo", "fooba"]),
        (fastlora.set_adapter, ["foo", "foo"]),
        (fastlora.delete_adapter, "fo"),
        (fastlora.delete_adapter, "default"),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_ones(function, names):
    model = two()
    before = tiny.bits(model)
    with pytest.raises(ValueError, match=r"of this model: 'foo', 'foobar'|must differ"):
        function(model, names)
    assert tiny.same(before, tiny.bits(model))


def test_a_later_adapter_leaves_what_was_unfrozen_by_hand():
    model = tiny.mlp()
    inject(model, LoRAConfig(target_modules=["0"]), "foo")
    model[1].weight.requires_grad_(True)
    inject(model, LoRAConfig(target_modules=["2"]), "bar")
    assert "1.weight" in trainable(model)


# Merging and disabling


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bert])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_gives_every_bit_back(make, dtype):
    model = make().to(dtype)
    inject(model, LoRAConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    tiny.train_a_little(model)
    before, y = tiny.bits(model), tiny.outputs(model)
    fastlora.merge(model, safe=True)
    assert unlike(y, tiny.outputs(make().to(dtype)))
    if dtype == torch.float32:
        torch.testing.assert_close(tiny.outputs(model), y)
    with pytest.raises(RuntimeError, match="merged already"):
        fastlora.merge(model)
    fastlora.unmerge(model)
    fastlora.unmerge(model)
    assert tiny.same(before, tiny.bits(model))
    assert torch.equal(tiny.outputs(model), y)


def test_a_safe_merge_that_fails_in_the_last_layer_changes_none():
    model = two()
    before = tiny.bits(model)
    good = model.head.lora_B["foobar"].detach().clone()
    with torch.no_grad():
        model.head.lora_B["foobar"][0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        fastlora.merge(model, safe=True)
    with torch.no_grad():
        model.head.lora_B["foobar"].copy_(good)
    assert tiny.same(before, tiny.bits(model))
    assert not model[2].merged


def test_switching_or_deleting_while_merged_unmerges_first():
    for change in (fastlora.set_adapter, fastlora.delete_adapter):
        model = two()
        weights = [layer.weight.clone() for layer in (model[0], model[2], model.head)]
        fastlora.merge(model)
        with pytest.warns(UserWarning, match="unmerged first"):
            change(model, "foobar")
        for layer, weight in zip((model[0], model[2], model.head), weights, strict=True):
            assert torch.equal(layer.weight, weight)
        assert not model.head.merged


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_disabled_is_the_base_model_bit_for_bit(is_merged, bias):
    model = tiny.bert()
    inject(model, LoRAConfig(target_modules=["query"], task_type="SEQ_CLS", bias=bias))
    tiny.train_a_little(model)
    y, base = tiny.outputs(model), tiny.outputs(tiny.bert())
    if is_merged:
        fastlora.merge(model)
        y = tiny.outputs(model)
    before = tiny.bits(model)
    with fastlora.disable_adapters(model):
        assert torch.equal(tiny.outputs(model), base)
        with fastlora.disable_adapters(model):
            assert torch.equal(tiny.outputs(model), base)
        assert torch.equal(tiny.outputs(model), base)
    assert torch.equal(tiny.outputs(model), y) and unlike(y, base)
    with pytest.raises(KeyError), fastlora.disable_adapters(model):
        raise KeyError
    assert torch.equal(tiny.outputs(model), y)
    assert tiny.same(before, tiny.bits(model))


def test_gradients_pass_a_disabled_forward():
    model = tiny.bert()
    inject(model, LoRAConfig(target_modules=["query"], task_type="SEQ_CLS", bias="all"))
    y = model(tiny.tokens()).logits
    with fastlora.disable_adapters(model), torch.no_grad():
        reference = model(tiny.tokens()).logits
    (y - reference).square().sum().backward()
    (y := model(tiny.tokens()).logits).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_one_layer_disabled_by_hand_stays_so():
    model = two()
    model.head.disable_adapters = True
    with fastlora.disable_adapters(model):
        pass
    assert model.head.disable_adapters and not model[2].disable_adapters


@pytest.mark.parametrize(
    "function", [fastlora.merge, lambda m: fastlora.disable_adapters(m).__enter__()]
)
def test_a_model_without_adapters_is_refused(function):
    with pytest.raises(ValueError, match="Sequential has no adapters to"):
        function(tiny.mlp())


# Biases and modules trained in full


def test_only_the_adapter_that_trains_biases_brings_them():
    model = tiny.mlp()
    inject(model, LoRAConfig(target_modules=["0"], bias="all"), "first")
    tiny.train_a_little(model)
    y = tiny.outputs(model)
    inject(model, LoRAConfig(target_modules=["0"]), "second")
    assert torch.equal(tiny.outputs(model), tiny.outputs(tiny.mlp()))
    assert not any(name.endswith("bias") for name in trainable(model))
    fastlora.set_adapter(model, "first")
    assert torch.equal(tiny.outputs(model), y)
    assert "1.bias" in trainable(model)
    fastlora.delete_adapter(model, "first")
    fastlora.set_adapter(model, [])
    assert torch.equal(tiny.outputs(model), tiny.outputs(tiny.mlp()))


CHANGES = {
    "none": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("changed", ["none", "deepcopy", "pickle"])
def test_trained_biases_follow_layers_that_another_adapter_replaces(changed, tmp_path):
    model = tiny.mlp()
    inject(model, LoRAConfig(r=4, target_modules=["0"], bias="all"), "one")
    base = tiny.outputs(tiny.mlp())
    tiny.train_a_little(model)
    one = tiny.outputs(model)
    fastlora.save_adapter(model, tmp_path / "before", "one")
    inject(model, LoRAConfig(target_modules=["2"], modules_to_save=["head"]), "two")
    model = CHANGES[changed](model)
    assert torch.equal(tiny.outputs(model), base)
    fastlora.save_adapter(model, tmp_path / "inactive", "one")
    tiny.train_a_little(model)
    assert not any("bias" in name for name in trainable(model) if "head" not in name)
    with fastlora.disable_adapters(model):
        assert torch.equal(tiny.outputs(model), base)
    fastlora.set_adapter(model, "one")
    assert torch.equal(tiny.outputs(model), one)
    biases = {"0.bias", "1.bias", "2.bias", "head.original_module.bias"}
    assert {name for name in trainable(model) if "bias" in name} == biases
    fastlora.save_adapter(model, tmp_path / "active", "one")
    saved = [folder / "adapter_model.safetensors" for folder in tmp_path.iterdir()]
    assert len(saved) == 3 and len({path.read_bytes() for path in saved}) == 1
    other = tiny.mlp()
    inject(other, LoRAConfig(target_modules=["2"], modules_to_save=["head"]), "two")
    fastlora.load_adapter(other, tmp_path / "active", "one")
    assert torch.equal(tiny.outputs(other), one)
    with fastlora.disable_adapters(other):
        assert torch.equal(tiny.outputs(other), base)
    fastlora.delete_adapter(model, "one")
    assert torch.equal(tiny.outputs(model), base)


def test_a_failure_puts_trained_biases_back(monkeypatch):
    model = tiny.mlp()
    inject(model, LoRAConfig(target_modules=["0"], bias="all"), "one")
    before = tiny.bits(tiny.train_a_little(model))
    monkeypatch.setattr(TrainableModule, "add_adapter", lambda *a: [][0])
    with pytest.raises(IndexError):
        inject(model, LoRAConfig(target_modules=["2"], modules_to_save=["head"]), "two")
    assert tiny.same(before, tiny.bits(model))


@pytest.mark.parametrize("nested", [False, True])
def test_switching_and_deleting_while_disabled_hold_afterwards(nested):
    base = tiny.outputs(tiny.mlp())

    def made():
        model = tiny.mlp()
        inject(model, LoRAConfig(target_modules=["0"], bias="lora_only"), "one")
        tiny.train_a_little(model)
        inject(model, LoRAConfig(target_modules=["2"], init_lora_weights=False), "two")
        fastlora.set_adapter(model, "one")
        return model

    def inside(model, change, *args):
        with fastlora.disable_adapters(model):
            if nested:
                return inside_once_more(model, change, *args)
            change(model, *args)
            assert torch.equal(tiny.outputs(model), base)

    def inside_once_more(model, change, *args):
        with fastlora.disable_adapters(model):
            change(model, *args)
        assert torch.equal(tiny.outputs(model), base)

    model = made()
    one = tiny.outputs(model)
    fastlora.set_adapter(model, "two")
    two = tiny.outputs(model)
    inside(model, fastlora.set_adapter, "one")
    assert torch.equal(tiny.outputs(model), one)
    inside(model, fastlora.set_adapter, "two")
    assert torch.equal(tiny.outputs(model), two)
    fastlora.set_adapter(model, "one")
    inside(model, fastlora.delete_adapter, "one")
    assert torch.equal(tiny.outputs(model), base) and not trainable(model)


def test_an_adapter_of_a_part_is_one_of_the_whole_too(tmp_path):
    part = tiny.mlp()
    whole = nn.Sequential(part)
    inject(part, LoRAConfig(r=4, target_modules=["0"], bias="all"), "one")
    y, base = tiny.outputs(tiny.train_a_little(part)), tiny.outputs(tiny.mlp())
    with fastlora.disable_adapters(whole):
        assert torch.equal(tiny.outputs(whole), base)
    with pytest.raises(ValueError, match="'one' was injected into the submodule '0': save that"):
        fastlora.save_adapter(whole, tmp_path, "one")
    inject(whole, LoRAConfig(target_modules=["2"], modules_to_save=["head"]), "two")
    assert torch.equal(tiny.outputs(whole), base)
    fastlora.set_adapter(whole, "one")
    assert torch.equal(tiny.outputs(whole), y)
    fastlora.save_adapter(part, tmp_path, "one")
    fastlora.load_adapter(other := tiny.mlp(), tmp_path)
    assert torch.equal(tiny.outputs(other), y)
    fastlora.delete_adapter(whole, "one")
    assert torch.equal(tiny.outputs(part), base)


def test_layers_placed_by_hand_cannot_be_saved(tmp_path):
    model = nn.Sequential(LoRALinear(6, 6))
    with pytest.raises(ValueError, match="'default' was not injected into this Sequential: layers"):
        fastlora.save_adapter(model, tmp_path)


def full(adapter="foo"):
    model = tiny.bert()
    inject(model, LoRAConfig(target_modules=["query"], modules_to_save=["classifier"]), adapter)
    return tiny.train_a_little(model)


def test_a_module_trained_in_full_has_a_copy_per_adapter():
    model = full()
    foo, base = tiny.outputs(model), tiny.outputs(tiny.bert())
    config = LoRAConfig(target_modules=["key"], modules_to_save=["classifier"])
    assert inject(model, config, "foobar").trained == [("classifier", 51)]
    assert torch.equal(tiny.outputs(model), base)
    tiny.train_a_little(model)
    inject(model, LoRAConfig(target_modules=["value"]), "third")  # has no classifier of its own
    assert torch.equal(tiny.outputs(model), base)
    fastlora.set_adapter(model, "foo")
    assert torch.equal(tiny.outputs(model), foo)
    assert {n for n in trainable(model) if "classifier" in n} == {
        "classifier.modules_to_save.foo.weight",
        "classifier.modules_to_save.foo.bias",
    }
    with pytest.raises(ValueError, match=r"\['foo', 'foobar'\] cannot be active together"):
        fastlora.set_adapter(model, ["foo", "foobar"])
    fastlora.set_adapter(model, ["foo", "third"])
    fastlora.delete_adapter(model, "foo")
    fastlora.set_adapter(model, [])
    assert torch.equal(tiny.outputs(model), base)


def test_attributes_are_those_of_the_module_that_runs():
    model = full()
    wrapper = model.classifier
    assert isinstance(wrapper, TrainableModule)
    assert wrapper.weight is wrapper.modules_to_save["foo"].weight
    assert wrapper.out_features == 3
    with fastlora.disable_adapters(model):
        assert wrapper.weight is wrapper.original_module.weight
    with pytest.raises(AttributeError, match="no attribute 'wieght'"):
        wrapper.wieght  # noqa: B018
    model.train()
    assert wrapper.modules_to_save["foo"].training


# Copies


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_copy_is_the_same_and_apart(copied, bias, tmp_path):
    model = tiny.bert()
    inject(model, LoRAConfig(target_modules=["query"], task_type="SEQ_CLS", bias=bias), "foo")
    tiny.train_a_little(model)
    y, other = tiny.outputs(model), copied(model)
    assert tiny.same(tiny.bits(model), tiny.bits(other))
    with fastlora.disable_adapters(other):
        assert torch.equal(tiny.outputs(other), tiny.outputs(tiny.bert()))
        assert torch.equal(tiny.outputs(model), y)
    fastlora.save_adapter(other, tmp_path, "foo")
    fastlora.delete_adapter(other, "foo")
    assert torch.equal(tiny.outputs(model), y)


def test_a_compiled_model_runs_its_adapters():
    model = tiny.mlp()
    compiled = torch.compile(model, backend="eager")
    x = torch.ones(2, 6)
    base = compiled(x)
    inject(compiled, LoRAConfig(target_modules=["head"], init_lora_weights=False))
    assert unlike(compiled(x), base)
    torch.testing.assert_close(compiled(x), model(x))
