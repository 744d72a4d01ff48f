# SPDX-License-Identifier: Apache-2.0
"""Adapter files: PEFT's, both ways; and a save that fails leaves what was there."""

import copy
import errno
import json
import os
import re

import peft
import pytest
import tiny_models as tiny
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastlora
from fastlora import load_adapter, save_adapter
from fastlora.peft import files as checks
from fastlora.peft.linear import FusedLinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LLAMA = ["q_proj", "down_proj"]


def lora(*targets, **values):
    return LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": list(targets) or LLAMA} | values
    )


def mixtral():
    return tiny.decoder("Mixtral", num_local_experts=4)


CASES = {
    "linear": (tiny.llama, lora()),
    "all-linear": (tiny.llama, lora(target_modules="all-linear")),
    "regex": (tiny.llama, lora(target_modules=r".*\.(q|v)_proj")),
    "head": (tiny.llama, lora("lm_head")),
    "rslora and dropout": (tiny.llama, lora(use_rslora=True, lora_dropout=0.5)),
    "patterns": (
        tiny.llama,
        lora(
            rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 5},
            alpha_pattern={r"layers\.0\..*": 2.5},
        ),
    ),
    "layers": (tiny.llama, lora(layers_to_transform=[1])),
    "conv1d": (tiny.gpt2, lora("c_attn", "c_proj", "c_fc", fan_in_fan_out=True)),
    "biased": (tiny.bert, lora("query", "dense")),
    "saved": (tiny.bert, lora("query", modules_to_save=["pooler", "classifier"])),
    "task": (tiny.bert, lora(target_modules="all-linear", task_type="SEQ_CLS")),
    "lora_only": (tiny.bert, lora("query", bias="lora_only")),
    "all biases": (tiny.bert, lora("query", bias="all", modules_to_save=["pooler", "classifier"])),
    "lora_bias": (tiny.bert, lora("query", lora_bias=True)),
    "dora": (tiny.llama, lora(use_dora=True)),
    "embedding": (tiny.llama, lora("embed_tokens", "q_proj")),
    "tied embedding": (tiny.gpt2, lora("wte", "c_attn", fan_in_fan_out=True)),
    "saved embeddings": (tiny.llama, lora(modules_to_save=["embed_tokens", "lm_head"])),
    "tokens": (tiny.llama, lora(trainable_token_indices={"embed_tokens": [1, 9], "lm_head": [3]})),
    "tied tokens": (tiny.gpt2, lora("c_fc", fan_in_fan_out=True, trainable_token_indices=[1, 9])),
    "experts": (mixtral, lora("q_proj", target_parameters=["experts.gate_up_proj"])),
    "starts": (tiny.llama, lora(r=4, init_lora_weights="orthogonal")),
    "ia3": (tiny.llama, IA3Config(target_modules=LLAMA, feedforward_modules=["down_proj"])),
    "loha": (tiny.llama, LoHaConfig(r=3, target_modules=LLAMA)),
    "lokr": (tiny.llama, LoKrConfig(r=3, target_modules=LLAMA, init_weights=False)),
    "hra": (tiny.llama, peft.HRAConfig(r=2, target_modules=LLAMA)),
    "norms": (tiny.llama, peft.LNTuningConfig(target_modules=["input_layernorm"])),
}
RELEASE = tuple(map(int, peft.__version__.split(".")[:2]))
if RELEASE < (0, 21):  # it does not save what "lora_only" trains
    del CASES["lora_only"]
if RELEASE < (0, 20):  # it fails on experts with the transformers of today
    del CASES["experts"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(tied|embedding layers found|fused nothing)"),
    pytest.mark.filterwarnings("ignore:.*Setting `save_embedding_layers`"),
]
cases = pytest.mark.parametrize(("make", "config"), CASES.values(), ids=CASES)


def wrapped(make=tiny.llama, config=None, adapter="default", **values):
    given = copy.deepcopy(config) or lora(**values)
    return tiny.train_a_little(get_peft_model(make(), given, adapter)).eval()


def close(one, other, **tolerance):
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(tiny.outputs(one), tiny.outputs(other), **tolerance)


def equal_files(one, other):
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (one, other))
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours
    )


def settings(folder):
    values = json.loads((folder / CONFIG).read_text())
    values = {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in values.items()}
    return {**values, "base_model_name_or_path": values["base_model_name_or_path"] or None}


@cases
def test_from_peft_to_peft(make, config, tmp_path):
    """Loaded as PEFT loads, saved as PEFT saves, and loaded again."""
    theirs = wrapped(make, config)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_adapter(make(), tmp_path / "theirs")
    expected = PeftModel.from_pretrained(make(), tmp_path / "theirs")
    state, trains, _ = tiny.bits(expected)
    found = tiny.bits(model)
    assert state.keys() == found[0].keys() and trains == found[1]
    assert all(torch.equal(state[key], found[0][key]) for key in state)
    assert type(model) is type(expected) and not model.training
    close(model, theirs)
    assert not torch.allclose(tiny.outputs(model), tiny.outputs(make()), atol=1e-3)
    save_adapter(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "again")
    assert equal_files(tmp_path / "ours", tmp_path / "again")
    assert settings(tmp_path / "ours") == settings(tmp_path / "again")
    with safe_open(tmp_path / "ours" / WEIGHTS, "pt") as file:
        assert file.metadata().pop("format") == "pt"
    back = load_adapter(make(), tmp_path / "ours", is_trainable=True)
    assert sum(p.requires_grad for p in back.parameters()) > sum(trains.values())
    close(back.eval(), theirs)


@pytest.mark.parametrize(
    "name", sorted(CASES.keys() & {"linear", "embedding", "tokens", "dora", "saved", "experts"})
)
def test_beside_another_adapter(name, tmp_path):
    make, config = CASES[name]
    theirs = wrapped(make, config)
    theirs.save_pretrained(tmp_path)
    model = wrapped(make, lora("q_proj", "key", r=2))
    fastlora.patch_peft(model)
    before = tiny.outputs(model)
    assert load_adapter(model, tmp_path, "foo") is model
    assert torch.equal(tiny.outputs(model), before) and model.active_adapters == ["default"]
    model.set_adapter("foo")
    close(model, theirs)
    save_adapter(model, tmp_path / "foo", "foo")
    assert load_file(tmp_path / "foo" / WEIGHTS).keys() == load_file(tmp_path / WEIGHTS).keys()
    if name == "tokens":  # PEFT fails to save an adapter that trains none beside one that does
        return
    save_adapter(model, tmp_path / "default")
    close(load_adapter(make(), tmp_path / "default"), wrapped(make, lora("q_proj", "key", r=2)))


@pytest.mark.skipif(RELEASE < (0, 20), reason="this PEFT saves foobar's tensors with foo's")
def test_names_that_begin_alike(tmp_path):
    others = {"foo": wrapped(), "foobar": wrapped(config=lora("up_proj", "q_proj", r=2))}
    for name, other in others.items():
        save_adapter(other, tmp_path / name)
    model = load_adapter(tiny.llama(), tmp_path / "foo", "foo")
    load_adapter(model, tmp_path / "foobar", "foobar")
    for name, other in others.items():
        model.set_adapter(name)
        close(model, other)
        save_adapter(model, tmp_path / "again" / name, name)
        assert equal_files(tmp_path / "again" / name, tmp_path / name)
    model.delete_adapter("foo")
    close(model, others["foobar"])


def test_what_is_loaded_is_fused(tmp_path, fused):
    save_adapter(wrapped(), tmp_path)
    model = load_adapter(tiny.llama(), tmp_path)
    kinds = [type(m) for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert kinds == [FusedLinear] * 4
    tiny.outputs(model)
    assert len(fused) == 4
    with pytest.warns(UserWarning, match="fused nothing"):
        wrapped(config=lora(use_dora=True)).save_pretrained(tmp_path)
        load_adapter(tiny.llama(), tmp_path)


class Quantised(nn.Parameter):
    """As torchao's are: more than its elements, so that no copy without memory can be made."""


def test_a_quantised_base(tmp_path):
    def make():
        model = tiny.mlp()
        model.head.weight = Quantised(model.head.weight.detach())
        return model

    save_adapter(wrapped(make, lora("2", "head")), tmp_path)
    model = load_adapter(make(), tmp_path)
    head = model.base_model.model.head
    assert type(head.base_layer.weight) is Quantised and head.lora_A["default"].weight.is_cpu
    close(model, wrapped(make, lora("2", "head")))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(stored, base, tmp_path):
    save_adapter(wrapped(), tmp_path)
    tensors = {key: t.to(stored) for key, t in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    model = load_adapter(tiny.llama().to(base), tmp_path)
    expected = torch.float64 if base == torch.float64 else torch.float32
    found = peft.get_peft_model_state_dict(model)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key].to(expected)) for key in found)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_the_keys_that_servers_expect(make, tmp_path):
    """What vLLM and SGLang read: nothing but factors, each under the name of a linear layer.

    And a config whose r and lora_alpha give the scaling, and whose targets are a list, as neither
    takes a regular expression everywhere.
    """
    config = lora(target_modules="all-linear", fan_in_fan_out=make is tiny.gpt2)
    save_adapter(wrapped(make, config), tmp_path)
    modules, seen = dict(make().named_modules()), {}
    for key, tensor in load_file(tmp_path / WEIGHTS).items():
        path, factor = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()
        seen.setdefault(path, {})[factor] = tensor
    for path, factors in seen.items():
        layer = modules[path]
        out, into = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
        assert factors["A"].shape == (3, into) and factors["B"].shape == (out, 3), path
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 5)
    assert all(path.endswith(tuple(config["target_modules"])) for path in seen)
    assert isinstance(config["target_modules"], list)
    assert config["bias"] == "none" and not config["modules_to_save"]
    assert not config["use_dora"] and not config["rank_pattern"]


@pytest.mark.parametrize("targets", [LLAMA, ["lm_head"]])
def test_a_merged_or_compiled_model_saves_the_same(targets, tmp_path):
    """Merged, PEFT would write a head's weight with the adapter in it, to be added once more."""
    model = wrapped(config=lora(*targets))
    y = tiny.outputs(model)
    save_adapter(model, tmp_path / "plain")
    model.merge_adapter()
    save_adapter(torch.compile(model, backend="eager"), tmp_path / "merged")
    assert settings(tmp_path / "plain") == settings(tmp_path / "merged")
    assert torch.equal(
        tiny.outputs(PeftModel.from_pretrained(tiny.llama(), tmp_path / "merged")), y
    )
    if targets == LLAMA:
        for name in (CONFIG, WEIGHTS):
            plain, merged = ((tmp_path / f / name).read_bytes() for f in ("plain", "merged"))
            assert plain == merged


@pytest.mark.parametrize("spread", [DistributedDataParallel, fully_shard])
def test_a_distributed_model_saves_the_same(spread, one_process, tmp_path):
    model = wrapped(tiny.mlp, lora("2", modules_to_save=["head"], bias="lora_only"))
    save_adapter(model, tmp_path / "plain")
    save_adapter(spread(model), tmp_path / "spread")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "spread" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize("spread", [DistributedDataParallel, fully_shard])
def test_what_is_distributed_already_takes_no_adapter(spread, one_process, tmp_path):
    save_adapter(wrapped(tiny.mlp, lora("2")), tmp_path)
    with pytest.raises((TypeError, ValueError), match=r"must be plain|load the adapter first"):
        load_adapter(spread(tiny.mlp()), tmp_path)


def test_what_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"no adapter named 'other' .* has 'default'"):
        save_adapter(wrapped(), tmp_path / "out", "other")
    for model in (tiny.mlp(), nn.Sequential(wrapped())):
        with pytest.raises(TypeError, match=r"must be a peft.PeftModel, got Sequential"):
            save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_diverged_adapter_is_saved_with_a_warning(tmp_path):
    model = wrapped()
    with torch.no_grad():
        model.get_submodule(
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default"
        ).weight[0, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"NaN or infinity in .*layers.0.*q_proj.lora_A.weight"):
        save_adapter(model, tmp_path)


# A save that does not end; one that is killed, and a full disk, are in test_faults.py


def changed():
    """What is saved over `wrapped`: other values, another rank."""
    return wrapped(r=2)


def assert_intact(folder):
    """The folder holds `wrapped`'s adapter, and nothing else."""
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
    close(load_adapter(tiny.llama(), folder), wrapped())


@pytest.mark.parametrize(("call", "number"), [("fsync", 0), ("fsync", 1), ("replace", 0)])
def test_a_failing_system_call_leaves_the_old_adapter(call, number, tmp_path, monkeypatch):
    save_adapter(wrapped(), tmp_path)
    real, calls = getattr(os, call), []

    def fail(*args):
        calls.append(args)
        if len(calls) == number + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(changed(), tmp_path)
    monkeypatch.undo()
    assert_intact(tmp_path)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [True, False])
def test_once_the_weights_have_their_name_it_is_the_new_adapter(
    error, before, tmp_path, monkeypatch
):
    """A rename that fails, or Ctrl-C as the first one succeeds: a signal is raised after it."""
    if before:
        save_adapter(wrapped(), tmp_path)
    real = os.replace

    def fail(source, target):
        if error is KeyboardInterrupt or str(target).endswith(".safetensors"):
            real(source, target)
        if error is KeyboardInterrupt or str(target).endswith(".json"):
            raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(error):
        save_adapter(changed(), tmp_path)
    monkeypatch.undo()
    close(load_adapter(tiny.llama(), tmp_path), changed())


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_what_another_save_has_left_is_no_hindrance(error, tmp_path, monkeypatch):
    save_adapter(wrapped(), tmp_path)
    (tmp_path / CONFIG).write_text((tmp_path / CONFIG).read_text() + " ")
    (tmp_path / f".{CONFIG}.1.tmp").write_text("{}")
    own = checks._head

    def head(path):
        if path.suffix == ".tmp":
            raise error(errno.EACCES, "gone, or another user's", str(path))
        return own(path)

    monkeypatch.setattr(checks, "_head", head)
    with pytest.warns(UserWarning, match="is not the config"):
        model = load_adapter(tiny.llama(), tmp_path)
    close(model, wrapped())


def test_a_config_edited_by_hand_is_the_one_that_counts(tmp_path):
    save_adapter(wrapped(), tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**values, "lora_alpha": 99}))
    (tmp_path / f".{CONFIG}.1.tmp").write_text("{}")  # of some other save
    with pytest.warns(UserWarning, match="is not the config that the weights beside it were saved"):
        model = load_adapter(tiny.llama(), tmp_path)
    assert model.peft_config["default"].lora_alpha == 99


def test_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        save_adapter(wrapped(), tmp_path / "file")
    (tmp_path / "folder" / CONFIG).mkdir(parents=True)
    with pytest.raises(OSError):
        save_adapter(wrapped(), tmp_path / "folder")
    assert not [name for name in os.listdir(tmp_path / "folder") if name.endswith(".tmp")]


def test_a_link_is_replaced_and_what_it_points_to_is_not(tmp_path):
    save_adapter(wrapped(), tmp_path / "cache")
    (tmp_path / "linked").mkdir()
    for name in os.listdir(tmp_path / "cache"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "cache" / name)
    assert_intact(tmp_path / "linked")
    save_adapter(changed(), tmp_path / "linked")
    assert_intact(tmp_path / "cache")


def test_files_have_the_usual_mode(tmp_path):
    save_adapter(wrapped(), tmp_path)
    (tmp_path / "plain").write_text("")
    for name in os.listdir(tmp_path):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode
