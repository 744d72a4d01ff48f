# SPDX-License-Identifier: Apache-2.0
"""Adapters that travel: from here to PEFT and back bit for bit, and to what serves them."""

from __future__ import annotations

import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_adapter_files import cases, injected
from tiny_models import bits, gpt2, llama, outputs, same, train_a_little
from torch import nn

import fastlora
from fastlora import LoRAConfig, load_adapter, save_adapter
from fastlora.model import records

TWO = {
    "first": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
    "second": {"r": 2, "use_rslora": True, "target_modules": "all-linear"},
}


def equal_files(one, other):
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours
    )


@cases
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_to_peft_and_back(make, values, tmp_path):
    model = injected(make, **values)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    back = make()
    load_adapter(back, tmp_path / "theirs", is_trainable=True)
    assert same(bits(model), bits(back))
    assert torch.equal(outputs(model), outputs(back))
    one, other = (records(each)["default"].config for each in (model, back))
    for field in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"):
        assert getattr(one, field) == getattr(other, field), field
    save_adapter(back, tmp_path / "again")
    assert equal_files(tmp_path / "ours", tmp_path / "again")


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_several_adapters_in_subfolders(base, tmp_path):
    """PEFT saves a model's adapters into folders below one, and so they come back."""
    model = llama().to(base)
    for name, values in TWO.items():
        fastlora.inject(model, LoRAConfig(**values), name)
        train_a_little(model)
        save_adapter(model, tmp_path / "ours" / name, name)
    names = iter(TWO)
    first = next(names)
    theirs = peft.PeftModel.from_pretrained(
        llama().to(base), tmp_path / "ours" / first, adapter_name=first
    )
    for name in names:
        theirs.load_adapter(tmp_path / "ours" / name, adapter_name=name)
    theirs.save_pretrained(tmp_path / "theirs")
    back = llama().to(base)
    for name in TWO:
        load_adapter(back, tmp_path / "theirs" / name, name)
        assert equal_files(tmp_path / "ours" / name, tmp_path / "theirs" / name)
    for name in TWO:
        found = []
        for each in (model, back):
            fastlora.set_adapter(each, name)
            found.append(outputs(each))
        assert torch.equal(*found)
        if base == torch.float32:
            theirs.set_adapter(name)
            torch.testing.assert_close(outputs(theirs.eval()), found[0])


def test_a_patched_model_saves_what_it_would_have(tmp_path):
    asked = peft.LoraConfig(r=3, target_modules="all-linear", rank_pattern={"q_proj": 2})
    model = train_a_little(peft.get_peft_model(llama(), asked)).eval()
    model.save_pretrained(tmp_path / "plain")
    fastlora.patch_peft(model)
    model.save_pretrained(tmp_path / "patched")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        patched = (tmp_path / "patched" / file).read_bytes()
        assert patched == (tmp_path / "plain" / file).read_bytes()
    ours = llama()
    load_adapter(ours, tmp_path / "patched")
    assert torch.equal(outputs(ours), outputs(model))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_keys_that_servers_expect(make, tmp_path):
    """What vLLM and SGLang read: nothing but factors, each under the name of a linear layer.

    And a config whose r and lora_alpha give the scaling, and whose targets are last parts of
    names, as neither takes a regular expression everywhere.
    """
    save_adapter(injected(make, target_modules="all-linear"), tmp_path)
    modules = dict(make().named_modules())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    seen = {}
    for key, tensor in tensors.items():
        path, factor = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()
        seen.setdefault(path, {})[factor] = tensor
    for path, factors in seen.items():
        layer = modules[path]
        out, into = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
        assert factors["A"].shape == (3, into) and factors["B"].shape == (out, 3), path
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 5)
    assert config["target_modules"] == sorted({path.rpartition(".")[2] for path in seen})
    assert config["bias"] == "none" and not config["modules_to_save"]
    assert not config.get("use_dora") and not config["rank_pattern"]
