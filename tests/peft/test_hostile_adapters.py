# SPDX-License-Identifier: Apache-2.0
"""Adapter files that nobody should load: refused by name, with the model as it was."""

import json
import os
import pickle
import time
from unittest import mock

import peft
import pytest
import tiny_models as tiny
import torch
from hostile_adapters import ATTACKS, CONFIG, KEY, WEIGHTS, P, config, weights
from peft_models import wrapped
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import load_adapter, save_adapter
from fastlora.peft import files, patch


@pytest.fixture
def folder(tmp_path):
    """A good adapter: whatever a test changes is all that can be refused."""
    (tmp_path / CONFIG).write_bytes(config())
    (tmp_path / WEIGHTS).write_bytes(weights())
    return tmp_path


def edit(folder, **changes):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **changes}))


def put(folder, key, tensor):
    save_file({**load_file(folder / WEIGHTS), key: tensor}, folder / WEIGHTS)


def refused(folder, message, error=ValueError):
    """Loading fails, for a plain model and for one that has an adapter; neither is changed."""
    other = wrapped(target_modules=["0", "2"], modules_to_save=["1"])
    other.add_adapter("second", peft.LoraConfig(target_modules=["2"]))
    for model in (tiny.mlp(), other):
        before = tiny.bits(model)
        with pytest.raises(error, match=message) as caught:
            load_adapter(model, folder, "new")
        assert tiny.same(before, tiny.bits(model))
        assert len(str(caught.value)) < 1500 and str(caught.value).isprintable()
    assert list(other.peft_config) == ["default", "second"]


@pytest.mark.parametrize(("file", "content", "message"), ATTACKS, ids=range(len(ATTACKS)))
def test_an_attack(file, content, message, folder):
    (folder / file).write_bytes(content)
    refused(folder, message)


def test_what_says_nothing_of_the_adapter_is_not_looked_at(folder):
    """Names of code and of models: nothing is imported or asked for because a file says so."""
    expected = tiny.bits(load_adapter(tiny.mlp(), folder))
    origin = {"base_model_name_or_path": "/dev/zero", "revision": "x"}
    edit(folder, auto_mapping={"parent_library": "antigravity"}, **origin)
    edit(folder, runtime_config={"ephemeral_gpu_offload": True}, a_switch_that_is_off=False)
    model = load_adapter(tiny.mlp(), folder)
    assert tiny.same(tiny.bits(model), expected)
    found = model.peft_config["default"]
    assert found.base_model_name_or_path is found.auto_mapping is found.revision is None
    assert not found.runtime_config.ephemeral_gpu_offload


@pytest.mark.filterwarnings("ignore:.*is not the config")
def test_a_rank_above_a_layer_s_width_has_to_be_allowed(tmp_path):
    """As PEFT makes for a head of few classes; nobody's file may ask for more than 4096."""
    save_adapter(model := wrapped(r=6, target_modules=["2", "head"]), tmp_path)
    refused(tmp_path, "r=6 for 'head' is more than 5")
    other = load_adapter(tiny.mlp(), tmp_path, trusted=True)
    torch.testing.assert_close(tiny.outputs(other), tiny.outputs(model), rtol=1e-4, atol=1e-5)
    edit(tmp_path, r=4097)
    with pytest.raises(ValueError, match="from 1 to 4096"):
        load_adapter(tiny.mlp(), tmp_path, trusted=True)


FOREVER = r"(.|..|\w)*!"
PATTERNS = [
    {"target_modules": FOREVER},
    {"exclude_modules": FOREVER},
    {"rank_pattern": {FOREVER: 4}},
    {"modules_to_save": [FOREVER]},
    {"layers_pattern": FOREVER, "layers_to_transform": [1]},
    {"alpha_pattern": {f"{i}(a|b|c|d)*(e|f)*": 1 for i in range(30_000)}},
]


@pytest.mark.parametrize("changes", PATTERNS, ids=lambda changes: next(iter(changes)))
def test_a_pattern_that_never_ends(changes, folder, monkeypatch):
    monkeypatch.setattr(files, "_PATTERN_SECONDS", 0.5)
    model = nn.Sequential()
    model.add_module("h" * 50, nn.Linear(8, 5))
    edit(folder, **{"target_modules": ["h" * 50], "modules_to_save": None, **changes})
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"{next(iter(changes))} took more than 0.5 s"):
        load_adapter(model, folder)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_what_is_written_to_the_file_later_reaches_no_model(bias, tmp_path):
    save_adapter(wrapped(bias=bias, modules_to_save=["1"]), tmp_path)
    before = tiny.bits(model := load_adapter(tiny.mlp(), tmp_path))
    path = tmp_path / WEIGHTS
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert tiny.same(before, tiny.bits(model))


@pytest.mark.parametrize("when", ["before the config", "before the weights", "before PEFT"])
def test_an_adapter_replaced_while_it_is_read(when, tmp_path, monkeypatch):
    """As another process may where the system has no locks: it is the old one, or an error."""
    for alpha in (8, 9):
        save_adapter(wrapped(lora_alpha=alpha), tmp_path / str(alpha))
    before = tiny.bits(model := tiny.mlp())
    expected = tiny.outputs(load_adapter(tiny.mlp(), tmp_path / "8"))
    name = "_find_config" if "config" in when else "_read"
    own = getattr(files, name)

    def slow(*args):
        found = own(*args) if when == "before PEFT" else None
        for file in (WEIGHTS, CONFIG):
            os.replace(tmp_path / "9" / file, tmp_path / "8" / file)
        return found or own(*args)

    monkeypatch.setattr(files, name, slow)
    if name == "_read":
        assert torch.equal(tiny.outputs(load_adapter(model, tmp_path / "8")), expected)
        return
    with pytest.raises(ValueError, match="got another adapter meanwhile: load it again"):
        load_adapter(model, tmp_path / "8")
    assert tiny.same(before, tiny.bits(model))


def test_tensors_are_not_read_before_the_header_was_compared(folder, monkeypatch):
    """A file that says it holds much is refused by what it says."""
    put(folder, KEY, torch.zeros(3, 9))
    own, spies = files._read, []

    def spied(weights, *rest):
        spies.append(mock.Mock(wraps=weights))
        return own(spies[-1], *rest)

    monkeypatch.setattr(files, "_read", spied)
    refused(folder, "must be")
    assert all(spy.get_slice.called and not spy.get_tensor.called for spy in spies)


def test_a_copy_of_the_model_s_own_weight_is_harmless(folder):
    own = tiny.mlp().head.weight.detach().clone()
    put(folder, f"{P}head.base_layer.weight", own)
    load_adapter(tiny.mlp(), folder)
    own[0, 0] += 1e-3
    put(folder, f"{P}head.base_layer.weight", own)
    with pytest.raises(ValueError, match="overwrite frozen"):  # it is no embedding
        load_adapter(tiny.mlp(), folder, trusted=True)


def fail(model):
    fastlora.patch_peft(model)
    raise MemoryError("no more")


def test_other_embeddings_have_to_be_allowed(tmp_path, monkeypatch):
    """As PEFT saves them of a model that was given more tokens."""
    model = wrapped(tiny.llama(), target_modules=["q_proj"])
    with torch.no_grad():
        model.get_input_embeddings().weight[3] += 1
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    before = tiny.bits(plain := tiny.llama())
    with pytest.raises(ValueError, match=r"overwrite frozen .*: \S*embed_tokens.weight$"):
        load_adapter(plain, tmp_path)
    with monkeypatch.context() as broken, pytest.raises(MemoryError):
        broken.setattr(patch, "patch_peft", fail)
        load_adapter(plain, tmp_path, trusted=True)
    assert tiny.same(before, tiny.bits(plain))
    loaded = load_adapter(plain, tmp_path, trusted=True)
    torch.testing.assert_close(tiny.outputs(loaded), tiny.outputs(model), rtol=1e-4, atol=1e-5)
    put(tmp_path, f"{P}model.embed_tokens.weight", torch.zeros(7, 16))
    with pytest.raises(ValueError, match=r"embed_tokens.weight must be \[40, 16\]"):
        load_adapter(tiny.llama(), tmp_path, trusted=True)


def test_integers_stay_integers(tmp_path):
    """A batch norm that is trained in full has a counter."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    save_adapter(wrapped(model, target_modules=["0"], modules_to_save=["1"]), tmp_path)
    put(tmp_path, f"{P}1.num_batches_tracked", torch.zeros(()))
    with pytest.raises(ValueError, match=r"tracked must be torch.int64, got torch.float32"):
        load_adapter(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), tmp_path)


@pytest.mark.filterwarnings("ignore:.*is not the config")
def test_tokens_that_a_model_does_not_have(tmp_path):
    values = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 39]}
    save_adapter(wrapped(tiny.llama(), **values), tmp_path)
    load_adapter(tiny.llama(), tmp_path)
    edit(tmp_path, trainable_token_indices=[1, 40])
    with pytest.raises(ValueError, match=r"token 40 is to be trained in .*, which has 40"):
        load_adapter(tiny.llama(), tmp_path)


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("was_run",))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["pickle", "folder", "pipe", "device", "loop", "dangling"])
def test_what_is_no_file_is_not_opened(name, kind, folder, monkeypatch):
    monkeypatch.chdir(folder)
    path = folder / name
    path.unlink()
    make = {
        "pickle": lambda: (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap())),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
        "dangling": lambda: path.symlink_to(folder / "gone"),
    }
    make[kind]()
    refused(folder, f"no file .*{name}'.* downloads nothing, .* no pickle", FileNotFoundError)
    assert not (folder / "was_run").exists()


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("made", [tiny.mlp, wrapped])
def test_a_failure_after_all_checks_changes_nothing(made, bias, tmp_path, monkeypatch):
    """In the last thing that is done: all is taken back, biases too."""
    save_adapter(wrapped(target_modules=["2", "head"], bias=bias), tmp_path)
    monkeypatch.setattr(patch, "patch_peft", fail)
    model = made()
    kept = dict(getattr(model, "peft_config", {}))
    before, y = tiny.bits(model), tiny.outputs(model)
    # PEFT takes no second adapter that trains biases.
    with pytest.raises(MemoryError if made is tiny.mlp or bias == "none" else ValueError):
        load_adapter(model, tmp_path, "new")
    assert tiny.same(before, tiny.bits(model)) and torch.equal(tiny.outputs(model), y)
    assert kept == getattr(model, "peft_config", {})
    monkeypatch.undo()
    if bias == "none":
        load_adapter(model, tmp_path, "new")


def test_what_peft_does_not_load_is_noticed(folder, monkeypatch):
    nothing = nn.Module().load_state_dict({})
    monkeypatch.setattr(peft.peft_model, "set_peft_model_state_dict", lambda *_, **__: nothing)
    refused(folder, r"PEFT did not load .* as 'new'")


@pytest.mark.parametrize(
    ("make", "name", "error", "message"),
    [
        (lambda: tiny.mlp().to("meta"), "new", ValueError, "meta device: give it its weights"),
        (wrapped, "default", ValueError, r"'default' exists already: delete_adapter\(\) it first"),
        (lambda: torch.compile(tiny.mlp()), "new", TypeError, "must be plain or a PeftModel"),
        (lambda: "model", "new", TypeError, r"must be an nn\.Module, got str"),
        (tiny.mlp, "a.b", ValueError, "adapter_name must be non-empty, without '.'"),
        (tiny.mlp, "", ValueError, "adapter_name must be non-empty"),
        (tiny.mlp, "lora", ValueError, "no part of 'lora_'"),
        (tiny.mlp, "keys", ValueError, "no method of a dict"),
        (tiny.mlp, 7, TypeError, "adapter_name must be a str, got int"),
    ],
)
def test_a_model_or_a_name_that_cannot_be(make, name, error, message, folder):
    with pytest.raises(error, match=message):
        load_adapter(make(), folder, name)
