# SPDX-License-Identifier: Apache-2.0
"""Adapter files: PEFT's, both ways; and a save that fails leaves what was there."""

import errno
import json
import os
import subprocess
import sys

import peft
import pytest
import tiny_models as tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastlora
from fastlora import LoRAConfig, inject, load_adapter, save_adapter
from fastlora.model import tensors_of
from fastlora.peft import adapters

LLAMA = ["q_proj", "down_proj"]
CASES = {
    "linear": (tiny.llama, {"target_modules": LLAMA}),
    "all-linear": (tiny.llama, {"target_modules": "all-linear"}),
    "regex": (tiny.llama, {"target_modules": r".*\.(q|v)_proj"}),
    "head": (tiny.llama, {"target_modules": ["lm_head"]}),
    "rslora": (tiny.llama, {"target_modules": LLAMA, "use_rslora": True}),
    "dropout": (tiny.llama, {"target_modules": LLAMA, "lora_dropout": 0.5}),
    "patterns": (
        tiny.llama,
        {
            "target_modules": LLAMA,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 5},
            "alpha_pattern": {r"layers\.0\..*": 2.5},
        },
    ),
    "layers": (tiny.llama, {"target_modules": LLAMA, "layers_to_transform": [1]}),
    "conv1d": (tiny.gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "biased": (tiny.bert, {"target_modules": ["query", "dense"]}),
    "saved": (
        tiny.bert,
        {"target_modules": ["query"], "modules_to_save": ["pooler", "classifier"]},
    ),
    "task": (tiny.bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "lora_only": (tiny.bert, {"target_modules": ["query"], "bias": "lora_only"}),
    "all biases": (
        tiny.bert,
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["pooler", "classifier"]},
    ),
}

cases = pytest.mark.parametrize(("make", "values"), CASES.values(), ids=CASES)


def injected(make=tiny.llama, adapter="default", **values):
    model = make()
    inject(
        model, LoRAConfig(**{"r": 3, "lora_alpha": 5, "target_modules": LLAMA, **values}), adapter
    )
    return tiny.train_a_little(model)


def unlike(a, b):
    return not torch.allclose(a, b, atol=1e-3)


@cases
def test_ours_in_peft(make, values, tmp_path):
    model = injected(make, **values)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(tiny.outputs(theirs), tiny.outputs(model))
    assert unlike(tiny.outputs(model), tiny.outputs(make()))


@cases
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.filterwarnings("ignore:these select nothing")
def test_peft_s_here(make, values, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, **values)
    theirs = tiny.train_a_little(peft.get_peft_model(make(), config)).eval()
    theirs.save_pretrained(tmp_path)
    model = make()
    report = load_adapter(model, tmp_path)
    torch.testing.assert_close(tiny.outputs(model), tiny.outputs(theirs))
    assert unlike(tiny.outputs(model), tiny.outputs(make()))
    assert report.trainable == 0 and not any(p.requires_grad for p in model.parameters())
    with fastlora.disable_adapters(model):
        assert torch.equal(tiny.outputs(model), tiny.outputs(make()))


@cases
def test_ours_here_is_the_same_bit_for_bit(make, values, tmp_path):
    model = injected(make, **values)
    save_adapter(model, tmp_path / "deep" / "er")
    other = make()
    report = load_adapter(other, tmp_path / "deep" / "er", is_trainable=True)
    assert tiny.same(tiny.bits(model), tiny.bits(other))
    assert torch.equal(tiny.outputs(model), tiny.outputs(other))
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    save_adapter(other, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        again = (tmp_path / "again" / name).read_bytes()
        assert again == (tmp_path / "deep" / "er" / name).read_bytes()


@cases
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_file_has_peft_s_keys(make, values, tmp_path):
    save_adapter(injected(make, **values), tmp_path / "ours")
    config = peft.LoraConfig(r=3, lora_alpha=5, **values)
    peft.get_peft_model(make(), config).save_pretrained(tmp_path / "theirs")
    ours = load_file(tmp_path / "ours/adapter_model.safetensors")
    theirs = load_file(tmp_path / "theirs/adapter_model.safetensors")
    needless = (".original_module.", ".modules_to_save.", "lm_head.base_layer.weight")
    extra = {key for key in theirs if any(part in key for part in needless)}
    assert {k: t.shape for k, t in ours.items()} == {
        k: t.shape for k, t in theirs.items() if k not in extra
    }
    with safe_open(tmp_path / "ours/adapter_model.safetensors", "pt") as file:
        assert file.metadata().pop("format") == "pt"


def test_a_conv1d_is_said_to_be_one(tmp_path):
    for make, expected in ((tiny.gpt2, True), (tiny.llama, False)):
        model = make()
        inject(model, LoRAConfig(target_modules="all-linear", fan_in_fan_out=not expected))
        save_adapter(model, tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert saved["fan_in_fan_out"] is expected


class Twin(nn.Module):
    """ "all-linear" that no list of last parts can say: one `out` is the head."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"out": nn.Linear(4, 4)})
        self.out = nn.Linear(4, 4)

    def get_output_embeddings(self):
        return self.out


def test_all_linear_is_saved_as_the_layers_it_chose(tmp_path):
    for model, expected in ((Twin(), r"body\.out"), (tiny.mlp(), ["0", "2", "head"])):
        inject(model, LoRAConfig(target_modules="all-linear"))
        save_adapter(model, tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert saved["target_modules"] == expected


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_dtypes(stored, base, tmp_path):
    model = tiny.llama().to(base)
    inject(model, LoRAConfig(target_modules=LLAMA))
    save_adapter(tiny.train_a_little(model), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key: tensor.to(stored) for key, tensor in load_file(path).items()}
    save_file(tensors, path)
    for asked, expected in ((None, torch.float32), (base, base)):
        other = tiny.llama().to(base)
        load_adapter(other, tmp_path, adapter_dtype=asked)
        for key, tensor in tensors_of(other, "default").items():
            assert torch.equal(tensor, tensors[f"base_model.model.{key}"].to(expected))


def test_beside_other_adapters_it_becomes_the_active_one(tmp_path):
    first = injected(adapter="foo")
    save_adapter(first, tmp_path / "foo", "foo")
    second = injected(adapter="foobar", target_modules=["up_proj", "q_proj"], r=2)
    save_adapter(second, tmp_path / "foobar", "foobar")
    foo, foobar = tiny.outputs(first), tiny.outputs(second)
    load_adapter(first, tmp_path / "foobar", "foobar")
    assert torch.equal(tiny.outputs(first), foobar)
    fastlora.set_adapter(first, "foo")
    assert torch.equal(tiny.outputs(first), foo)
    for name in ("foo", "foobar"):
        save_adapter(first, tmp_path / "again", name)
        again = load_file(tmp_path / "again/adapter_model.safetensors")
        before = load_file(tmp_path / name / "adapter_model.safetensors")
        assert again.keys() == before.keys()
        assert all(torch.equal(again[key], before[key]) for key in again)
    with pytest.raises(ValueError, match="'foobar' exists already"):
        load_adapter(first, tmp_path / "foobar", "foobar")


def test_a_loaded_adapter_trains_when_asked_or_switched_to(tmp_path):
    save_adapter(injected(), tmp_path)
    model = tiny.llama()
    load_adapter(model, tmp_path)
    assert not any(p.requires_grad for p in model.parameters())
    fastlora.set_adapter(model, "default")
    assert any(p.requires_grad for p in model.parameters())
    load_adapter(other := tiny.llama(), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in other.parameters())


def test_biases_that_are_aside_are_saved(tmp_path):
    model = injected(tiny.bert, "foo", target_modules=["query"], bias="all")
    y = tiny.outputs(model)
    inject(model, LoRAConfig(target_modules=["query"]), "bar")
    save_adapter(model, tmp_path, "foo")
    other = tiny.bert()
    load_adapter(other, tmp_path)
    assert torch.equal(tiny.outputs(other), y)


def test_a_merged_or_compiled_model_saves_the_same(tmp_path):
    model = injected()
    save_adapter(model, tmp_path / "plain")
    fastlora.merge(model)
    save_adapter(torch.compile(model, backend="eager"), tmp_path / "merged")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        plain = (tmp_path / "plain" / name).read_bytes()
        assert (tmp_path / "merged" / name).read_bytes() == plain


@pytest.mark.parametrize("spread", [DistributedDataParallel, fully_shard])
def test_a_distributed_model_saves_the_same(spread, one_process, tmp_path):
    model = tiny.mlp()
    inject(model, LoRAConfig(target_modules=["2"], modules_to_save=["head"], bias="lora_only"))
    save_adapter(tiny.train_a_little(model), tmp_path / "plain")
    save_adapter(spread(model), tmp_path / "spread")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        plain = (tmp_path / "plain" / name).read_bytes()
        assert (tmp_path / "spread" / name).read_bytes() == plain


def test_what_is_distributed_already_takes_no_adapter(one_process):
    model = DistributedDataParallel(tiny.mlp())
    with pytest.raises(ValueError, match="inject first, then wrap"):
        inject(model, LoRAConfig(target_modules=["2"]))


def test_an_unknown_adapter_is_not_saved(tmp_path):
    for model, known in ((injected(), "'default'"), (tiny.llama(), "none")):
        with pytest.raises(ValueError, match=f"no adapter named 'other' .* {known}"):
            save_adapter(model, tmp_path / "out", "other")
    assert not (tmp_path / "out").exists()


def test_a_diverged_adapter_is_saved_with_a_warning(tmp_path):
    model = injected()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_A["default"][0, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"NaN or infinity in .*layers.0.*q_proj.lora_A.weight"):
        save_adapter(model, tmp_path)


# A save that does not end


def changed():
    """What is saved over `injected`: other values, another rank."""
    return injected(r=2)


def assert_intact(folder):
    """The folder holds `injected`'s adapter, and nothing else."""
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    model = tiny.llama()
    load_adapter(model, folder)
    assert torch.equal(tiny.outputs(model), tiny.outputs(injected()))


@pytest.mark.parametrize(("call", "number"), [("fsync", 0), ("fsync", 1), ("replace", 0)])
def test_a_failing_system_call_leaves_the_old_adapter(call, number, tmp_path, monkeypatch):
    save_adapter(injected(), tmp_path)
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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_leaves_the_old_adapter(tmp_path, monkeypatch):
    import builtins

    save_adapter(injected(), tmp_path)
    real = builtins.open

    def full(path, mode="r", *args, **kwargs):
        if "x" in mode:
            real(path, mode).close()
            return real("/dev/full", "wb", buffering=0)
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(changed(), tmp_path)
    monkeypatch.undo()
    assert_intact(tmp_path)


KILLED = """
import os, signal, sys
import torch
from torch import nn
import fastlora

torch.set_num_threads(1)

def save(fill, folder):
    model = nn.Sequential(nn.Linear(6, 6))
    config = fastlora.LoRAConfig(r=3, lora_alpha=3 * fill, target_modules=["0"])
    fastlora.inject(model, config)
    with torch.no_grad():
        model[0].lora_B["default"].fill_(fill)
    fastlora.save_adapter(model, folder)

for when in range(5):
    folder = os.path.join(sys.argv[1], str(when))
    if when < 4:
        save(1.0, folder)
    else:  # the first adapter of a folder, killed as the last one is
        when = 3
    child = os.fork()
    if child == 0:
        calls = 0
        def dying(real):
            def call(*args):
                global calls
                if calls == when:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                return real(*args)
            return call
        os.fsync, os.replace = dying(os.fsync), dying(os.replace)
        save(2.0, folder)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_in_the_middle_there_is_a_whole_adapter(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True)
    # Two flushes and the first rename: up to then it is the old one. The second rename would have
    # named the config, which is found without it.
    for when, expected in enumerate([1.0, 1.0, 1.0, 2.0, 2.0]):
        model = nn.Sequential(nn.Linear(6, 6))
        load_adapter(model, tmp_path / str(when))
        assert model[0].lora_B["default"].unique().item() == expected
        assert model[0].scaling["default"] == expected


def test_a_rename_that_fails_leaves_the_new_adapter(tmp_path, monkeypatch):
    save_adapter(injected(), tmp_path)
    real = os.replace

    def fail(source, target):
        if str(target).endswith(".json"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output error"):
        save_adapter(changed(), tmp_path)
    monkeypatch.undo()
    model = tiny.llama()
    load_adapter(model, tmp_path)
    assert torch.equal(tiny.outputs(model), tiny.outputs(changed()))


def test_ctrl_c_as_the_weights_get_their_name(tmp_path, monkeypatch):
    """A signal that comes in a system call is raised when it has succeeded."""
    save_adapter(injected(), tmp_path)
    real = os.replace

    def interrupted(source, target):
        real(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(changed(), tmp_path)
    monkeypatch.undo()
    model = tiny.llama()
    load_adapter(model, tmp_path)
    assert torch.equal(tiny.outputs(model), tiny.outputs(changed()))


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_what_another_save_has_left_is_no_hindrance(error, tmp_path, monkeypatch):
    save_adapter(injected(), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    (tmp_path / ".adapter_config.json.1.tmp").write_text("{}")
    own = adapters._head

    def head(path):
        if path.suffix == ".tmp":
            raise error(errno.EACCES, "gone, or another user's", str(path))
        return own(path)

    monkeypatch.setattr(adapters, "_head", head)
    model = tiny.llama()
    with pytest.warns(UserWarning, match="is not the config"):
        load_adapter(model, tmp_path)
    assert torch.equal(tiny.outputs(model), tiny.outputs(injected()))


def test_a_config_edited_by_hand_is_the_one_that_counts(tmp_path):
    save_adapter(injected(), tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "lora_alpha": 99}))
    (tmp_path / ".adapter_config.json.1.tmp").write_text("{}")  # of some other save
    model = tiny.llama()
    with pytest.warns(UserWarning, match="is not the config that the weights beside it were saved"):
        load_adapter(model, tmp_path)
    assert fastlora.model.records(model)["default"].config.lora_alpha == 99


def test_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        save_adapter(injected(), tmp_path / "file")
    (tmp_path / "folder" / "adapter_config.json").mkdir(parents=True)
    with pytest.raises(OSError):
        save_adapter(injected(), tmp_path / "folder")
    assert not [name for name in os.listdir(tmp_path / "folder") if name.endswith(".tmp")]


def test_a_link_is_replaced_and_what_it_points_to_is_not(tmp_path):
    save_adapter(injected(), tmp_path / "cache")
    (tmp_path / "linked").mkdir()
    for name in os.listdir(tmp_path / "cache"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "cache" / name)
    assert_intact(tmp_path / "linked")
    save_adapter(changed(), tmp_path / "linked")
    assert_intact(tmp_path / "cache")


def test_files_have_the_usual_mode(tmp_path):
    save_adapter(injected(), tmp_path)
    (tmp_path / "plain").write_text("")
    for name in os.listdir(tmp_path):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode
