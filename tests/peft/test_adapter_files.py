# SPDX-License-Identifier: Apache-2.0
"""Adapter files: PEFT's, both ways; and a save that fails leaves what was there."""

import builtins
import copy
import errno
import functools
import json
import os
import re

import peft
import pytest
import tiny_models as tiny
import torch
from hostile_adapters import CONFIG, WEIGHTS
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import Quantised
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastlora
from fastlora import load_adapter, save_adapter
from fastlora.peft import files

LLAMA = ["q_proj", "down_proj"]
HEADS = {"modules_to_save": ["pooler", "classifier"]}
TOKENS = {"trainable_token_indices": {"embed_tokens": [1, 9], "lm_head": [3]}}
# As Unsloth writes it.
REGEX = (
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))"
)


def lora(*targets, **values):
    return LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": list(targets) or LLAMA} | values
    )


def quantised():
    """No copy without memory can be made of it."""
    model = tiny.mlp()
    model.head.weight = Quantised(model.head.weight.detach())
    return model


mixtral = functools.partial(tiny.decoder, "Mixtral", num_local_experts=4)
PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 5},
    "alpha_pattern": {r"layers\.0\..*": 2.5},
}
CASES = {
    "linear": (tiny.llama, lora()),
    "regex": (tiny.llama, lora(target_modules=REGEX)),
    "head": (tiny.llama, lora("lm_head")),
    "rslora and dropout": (tiny.llama, lora(use_rslora=True, lora_dropout=0.5)),
    "patterns": (tiny.llama, lora(**PATTERNS)),
    "layers": (tiny.llama, lora(layers_to_transform=[1])),
    "conv1d": (tiny.gpt2, lora("c_attn", "c_proj", "c_fc", fan_in_fan_out=True)),
    "saved": (tiny.bert, lora("query", **HEADS)),
    "task": (tiny.bert, lora(target_modules="all-linear", task_type="SEQ_CLS")),
    "lora_only": (tiny.bert, lora("query", bias="lora_only")),
    "all biases": (tiny.bert, lora("query", bias="all", **HEADS)),
    "lora_bias": (tiny.bert, lora("query", lora_bias=True)),
    "dora": (tiny.llama, lora(use_dora=True)),
    "embedding": (tiny.llama, lora("embed_tokens", "q_proj")),
    "tied embedding": (tiny.gpt2, lora("wte", "c_attn", fan_in_fan_out=True)),
    "saved embeddings": (tiny.llama, lora(modules_to_save=["embed_tokens", "lm_head"])),
    "tokens": (tiny.llama, lora(**TOKENS)),
    "tied tokens": (tiny.gpt2, lora("c_fc", trainable_token_indices=[1, 9], fan_in_fan_out=True)),
    "experts": (mixtral, lora("q_proj", target_parameters=["experts.gate_up_proj"])),
    "quantised": (quantised, lora("2", "head")),
    "starts": (tiny.llama, lora(r=4, init_lora_weights="orthogonal")),
    "ia3": (tiny.llama, peft.IA3Config(target_modules=LLAMA, feedforward_modules=LLAMA[1:])),
    "loha": (tiny.llama, peft.LoHaConfig(r=3, target_modules=LLAMA)),
    "lokr": (tiny.llama, peft.LoKrConfig(r=3, target_modules=LLAMA, init_weights=False)),
    "hra": (tiny.llama, peft.HRAConfig(r=2, target_modules=LLAMA)),
    "norms": (tiny.llama, peft.LNTuningConfig(target_modules=["input_layernorm"])),
}
RELEASE = tuple(map(int, peft.__version__.split(".")[:2]))
# What saves no such biases, and what fails on experts with the transformers of today.
LACKING = {"lora_only": (0, 21), "experts": (0, 20)}
CASES = {name: case for name, case in CASES.items() if LACKING.get(name, RELEASE) <= RELEASE}
BESIDE = sorted(CASES.keys() & {"linear", "embedding", "tokens", "dora", "saved", "experts"})
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(tied|embedding layers found|fused nothing|Setting `save_embedding_layers`)"
)


def wrapped(make=tiny.llama, config=None, **values):
    given = copy.deepcopy(config) or lora(**values)
    return tiny.train_a_little(get_peft_model(make(), given)).eval()


def close(one, other):
    torch.testing.assert_close(tiny.outputs(one), tiny.outputs(other), rtol=1e-4, atol=1e-5)


def same_bytes(*folders):
    (_,) = {tuple((folder / name).read_bytes() for name in (CONFIG, WEIGHTS)) for folder in folders}


def settings(folder):
    values = json.loads((folder / CONFIG).read_text())
    values = {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in values.items()}
    return {**values, "base_model_name_or_path": values["base_model_name_or_path"] or None}


@pytest.mark.parametrize(("make", "config"), CASES.values(), ids=CASES)
def test_from_peft_to_peft(make, config, tmp_path):
    """Loaded as PEFT loads, saved as PEFT saves, and loaded again."""
    theirs = wrapped(make, config)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_adapter(make(), tmp_path / "theirs")
    expected = PeftModel.from_pretrained(make(), tmp_path / "theirs")
    trains = tiny.bits(expected)[1]
    assert trains == tiny.bits(model)[1]
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert type(model) is type(expected) and not model.training
    assert not any(type(module) is peft.tuners.lora.Linear for module in model.modules())  # fused
    close(model, theirs)
    assert not torch.allclose(tiny.outputs(model), tiny.outputs(make()), atol=1e-3)
    save_adapter(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "again")
    ours, again = (
        (load_file(f / WEIGHTS), settings(f)) for f in (tmp_path / "ours", tmp_path / "again")
    )
    torch.testing.assert_close(ours[0], again[0], rtol=0, atol=0)
    assert ours[1] == again[1]
    with safe_open(tmp_path / "ours" / WEIGHTS, "pt") as file:
        assert file.metadata()["format"] == "pt"
    back = load_adapter(make(), tmp_path / "ours", is_trainable=True)
    assert sum(p.requires_grad for p in back.parameters()) > sum(trains.values())
    close(back.eval(), theirs)


@pytest.mark.parametrize("case", BESIDE)
def test_beside_another_adapter(case, tmp_path):
    make, config = CASES[case]
    theirs = wrapped(make, config)
    theirs.save_pretrained(tmp_path)
    model = wrapped(make, lora("q_proj", "key", r=2))
    fastlora.patch_peft(model)
    before = tiny.outputs(model)
    name = "defaulted" if RELEASE >= (0, 20) else "foo"  # before, it was saved with "default"
    assert load_adapter(model, tmp_path, name) is model
    assert torch.equal(tiny.outputs(model), before) and model.active_adapters == ["default"]
    model.set_adapter(name)
    close(model, theirs)
    save_adapter(model, tmp_path / name, name)
    assert load_file(tmp_path / name / WEIGHTS).keys() == load_file(tmp_path / WEIGHTS).keys()
    if case != "tokens":  # PEFT fails to save an adapter that trains none beside one that does
        save_adapter(model, tmp_path / "default")
        close(load_adapter(make(), tmp_path / "default"), wrapped(make, lora("q_proj", "key", r=2)))


def test_dtypes(tmp_path):
    """PEFT casts; an adapter is kept in float32 at least."""
    save_adapter(wrapped(), tmp_path)
    adapter = load_file(tmp_path / WEIGHTS)
    for stored, base, kept in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float64, torch.bfloat16, torch.float32),
        (torch.float16, torch.float64, torch.float64),
    ):
        tensors = {key: t.to(stored) for key, t in adapter.items()}
        save_file(tensors, tmp_path / WEIGHTS)
        found = peft.get_peft_model_state_dict(load_adapter(tiny.llama().to(base), tmp_path))
        expected = {key: t.to(kept) for key, t in tensors.items()}
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_the_keys_that_servers_expect(make, tmp_path):
    """What vLLM and SGLang read: linear layers' factors; r, lora_alpha and targets in a list."""
    config = lora(target_modules="all-linear", fan_in_fan_out=make is tiny.gpt2)
    save_adapter(wrapped(make, config), tmp_path)
    modules, config = dict(make().named_modules()), json.loads((tmp_path / CONFIG).read_text())
    for key, tensor in load_file(tmp_path / WEIGHTS).items():
        path, factor = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()
        out, into = modules[path].weight.shape[:: 1 if isinstance(modules[path], nn.Linear) else -1]
        assert tensor.shape == ((3, into) if factor == "A" else (out, 3)), path
        assert path.endswith(tuple(config["target_modules"]))
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 5)
    assert isinstance(config["target_modules"], list) and config["bias"] == "none"
    assert not (config["modules_to_save"] or config["use_dora"] or config["rank_pattern"])


@pytest.mark.parametrize("targets", [LLAMA, ["lm_head"]])
def test_a_merged_or_compiled_model_saves_the_same(targets, tmp_path):
    """Merged, PEFT would write a head's weight with the adapter in it, to be added once more."""
    model = wrapped(config=lora(*targets))
    y = tiny.outputs(model)
    save_adapter(model, tmp_path / "plain")
    model.merge_adapter()
    save_adapter(torch.compile(model, backend="eager"), tmp_path / "merged")
    saved = PeftModel.from_pretrained(tiny.llama(), tmp_path / "merged")
    assert torch.equal(tiny.outputs(saved), y)
    if targets == LLAMA:
        same_bytes(tmp_path / "plain", tmp_path / "merged")


@pytest.mark.parametrize("spread", [DistributedDataParallel, fully_shard])
def test_a_distributed_model_saves_the_same_and_loads_none(spread, one_process, tmp_path):
    model = wrapped(tiny.mlp, lora("2", modules_to_save=["head"], bias="lora_only"))
    save_adapter(model, tmp_path / "plain")
    model, folders = spread(model), [tmp_path / f"{i}" for i in range(8)]
    for folder in folders:  # what differed at random would now
        save_adapter(model, folder)
    same_bytes(tmp_path / "plain", *folders)
    with pytest.raises((TypeError, ValueError), match=r"must be plain|load the adapter first"):
        load_adapter(spread(tiny.mlp()), tmp_path / "plain")


def test_what_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"no adapter named 'other' .* has 'default'"):
        save_adapter(wrapped(), tmp_path / "out", "other")
    for model in (tiny.mlp(), nn.Sequential(wrapped())):
        with pytest.raises(TypeError, match=r"must be a peft.PeftModel, got Sequential"):
            save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_diverged_adapter_is_saved_with_a_warning(tmp_path):
    model = wrapped()
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"NaN or infinity in .*layers.0.*q_proj.lora_A.weight"):
        save_adapter(model, tmp_path)


# A save that does not end; one that is killed, and a full disk, are in test_faults.py
@pytest.mark.parametrize(
    ("call", "number", "error", "kept"),
    [
        ("open", 0, PermissionError, True),  # as in a folder that may only be read
        ("fsync", 0, OSError, True),
        ("fsync", 1, OSError, True),
        ("replace", 0, OSError, True),
        ("replace", 1, OSError, False),
        ("replace", 0, KeyboardInterrupt, False),
    ],
)
def test_once_the_weights_have_their_name_it_is_the_new_adapter(
    call, number, error, kept, tmp_path, monkeypatch
):
    """Until then it is the old one. A signal is raised after the call in which it came."""
    if kept:
        save_adapter(wrapped(), tmp_path)
    module, calls = builtins if call == "open" else os, []
    real = getattr(module, call)

    def fail(*args):
        calls.append(args)
        if error is KeyboardInterrupt or len(calls) <= number:
            real(*args)
        if len(calls) > number:
            raise error(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as failing, pytest.raises(error):
        failing.setattr(module, call, fail)
        save_adapter(wrapped(r=2), tmp_path)
    close(load_adapter(tiny.llama(), tmp_path), wrapped() if kept else wrapped(r=2))
    if kept:
        assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


def test_a_config_edited_by_hand_is_the_one_that_counts(tmp_path, monkeypatch):
    """Whatever other saves have left beside it, and whoever may read that."""
    save_adapter(wrapped(), tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**values, "lora_alpha": 99}))
    (tmp_path / f".{CONFIG}.1.tmp").write_text("{}")
    own = files._head

    def head(path):
        if path.suffix == ".tmp":
            raise PermissionError(errno.EACCES, "another user's", str(path))
        return own(path)

    monkeypatch.setattr(files, "_head", head)
    with pytest.warns(UserWarning, match="is not the config that the weights beside it were saved"):
        model = load_adapter(tiny.llama(), tmp_path)
    assert model.peft_config["default"].lora_alpha == 99


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / CONFIG).mkdir(parents=True)
    for name in ("file", "folder"):
        with pytest.raises(OSError):
            save_adapter(wrapped(), tmp_path / name)
    assert os.listdir(tmp_path / "folder") == [CONFIG]
    for name in ("file", "hub-user/adapter"):
        with pytest.raises(FileNotFoundError, match="takes a local folder"):
            load_adapter(tiny.llama(), tmp_path / name)


def test_a_link_is_replaced_and_what_it_points_to_is_not(tmp_path):
    save_adapter(wrapped(), tmp_path / "cache")
    (tmp_path / "linked").mkdir()
    for name in os.listdir(tmp_path / "cache"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "cache" / name)
    close(load_adapter(tiny.llama(), tmp_path / "linked"), wrapped())
    save_adapter(wrapped(r=2), tmp_path / "linked")
    close(load_adapter(tiny.llama(), tmp_path / "cache"), wrapped())
    (tmp_path / "plain").write_text("")
    for name in os.listdir(tmp_path / "linked"):  # the new files have the usual mode
        assert (tmp_path / "linked" / name).stat().st_mode == (tmp_path / "plain").stat().st_mode
