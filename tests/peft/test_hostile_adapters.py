# SPDX-License-Identifier: Apache-2.0
"""Adapter files that nobody should load: refused by name, with the model as it was."""

import json
import os
import pickle
import struct
import time

import hostile_adapters
import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file

import fastlora
from fastlora import LoRAConfig, inject, load_adapter, save_adapter
from fastlora.peft import adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.head.lora_A.weight"


@pytest.fixture
def folder(tmp_path):
    """A good adapter of rank 3 for two of the layers of `tiny.mlp`, and its classifier."""
    model = tiny.mlp()
    config = LoRAConfig(r=3, target_modules=["2", "head"], modules_to_save=["1"])
    inject(model, config)
    save_adapter(tiny.train_a_little(model), tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **changes}))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(folder, message, error=ValueError):
    """Loading fails, for a plain model and for one that has an adapter; neither is changed."""
    other = tiny.mlp()
    inject(other, LoRAConfig(target_modules=["0", "2"], modules_to_save=["1"]), "other")
    for model in (tiny.mlp(), tiny.train_a_little(other)):
        before = tiny.bits(model)
        with pytest.raises(error, match=message) as caught:
            load_adapter(model, folder)
        assert tiny.same(before, tiny.bits(model))
        assert len(str(caught.value)) < 1500 and str(caught.value).isprintable()
    with pytest.raises(ValueError, match="no adapter named"):
        fastlora.set_adapter(tiny.mlp(), "default")


def test_the_good_one_loads(folder):
    model = tiny.mlp()
    load_adapter(model, folder)
    assert not torch.equal(tiny.outputs(model), tiny.outputs(tiny.mlp()))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_what_is_written_to_the_file_later_reaches_no_model(bias, tmp_path):
    model = tiny.mlp()
    inject(model, LoRAConfig(r=3, target_modules=["2", "head"], bias=bias))
    save_adapter(tiny.train_a_little(model), tmp_path)
    load_adapter(model := tiny.mlp(), tmp_path)
    before = tiny.bits(model)
    path = tmp_path / WEIGHTS
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(b"\xff" * size)
    assert tiny.same(before, tiny.bits(model))


def test_weights_replaced_between_two_looks_at_them(folder, monkeypatch):
    """As another process may where the system has no locks: another alpha would be taken."""
    plan = adapters.plan

    def slowly(*args, **options):
        other = tiny.mlp()
        inject(other, LoRAConfig(r=3, lora_alpha=9, target_modules=["2", "head"]))
        save_adapter(other, folder / "other")
        os.replace(folder / "other" / WEIGHTS, folder / WEIGHTS)
        return plan(*args, **options)

    monkeypatch.setattr(adapters, "plan", slowly)
    before = tiny.bits(model := tiny.mlp())
    with pytest.raises(ValueError, match="was replaced while it was read: load it again"):
        load_adapter(model, folder)
    assert tiny.same(before, tiny.bits(model))


def test_a_rank_above_a_layer_s_width_has_to_be_allowed(tmp_path):
    """As PEFT writes for a head of few classes; nobody's file may ask for more than 4096."""
    model = tiny.mlp()
    inject(model, LoRAConfig(r=6, target_modules=["head"]))
    with pytest.warns(UserWarning, match=r"in .*head.lora_B.weight: load_adapter.. .*any_rank"):
        save_adapter(tiny.train_a_little(model), tmp_path)
    refused(tmp_path, "r=6 for 'head' is more than 5")
    load_adapter(other := tiny.mlp(), tmp_path, any_rank=True)
    assert torch.equal(tiny.outputs(other), tiny.outputs(model))
    edit_config(tmp_path, r=4097)
    with pytest.raises(ValueError, match="more than 4096"):
        load_adapter(tiny.mlp(), tmp_path, any_rank=True)


@pytest.mark.parametrize("name", hostile_adapters.ATTACKS)
def test_a_kept_attack(name, folder):
    """The files kept are what the script makes, and each is refused for its reason."""
    file, content, message = hostile_adapters.ATTACKS[name]
    kept = hostile_adapters.FOLDER / name
    assert [path.name for path in kept.iterdir()] == [file]
    assert (kept / file).read_bytes() == content, "run python tests/tools/hostile_adapters.py"
    # All else is right, so that nothing but the attack can be what is refused.
    (folder / CONFIG).write_bytes(hostile_adapters.config())
    (folder / WEIGHTS).write_bytes(hostile_adapters.weights())
    load_adapter(tiny.mlp(), folder)
    (folder / file).write_bytes(content)
    refused(folder, message, (ValueError, TypeError))


def test_no_attack_is_forgotten():
    kept = {path.name for path in hostile_adapters.FOLDER.iterdir()}
    assert kept == hostile_adapters.ATTACKS.keys()


# The config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 10**9}, r"r=1000000000 for '2' is more than 4096"),
        ({"r": 6}, "r=6 for 'head' is more than 5, the smaller side of its weight; .*any_rank"),
        ({"r": 4097}, "more than 4096"),
        ({"rank_pattern": {"head": 10**12}}, "for 'head' is more than 4096"),
        ({"r": 4}, r"lora_A.weight must be \[4, 8\], as model and config say, got \[3, 8\]"),
        ({"rank_pattern": {"head": 2}}, r"head.lora_A.weight must be \[2, 8\]"),
        ({"r": 0}, "r must be at least 1"),
        ({"r": 3.0}, "r must be an int"),
        ({"r": True}, "r must be an int"),
        ({"r": None}, "r must be an int"),
        ({"lora_alpha": 10**400}, "lora_alpha must be finite"),
        ({"lora_alpha": 1e299}, "lora_alpha must be finite"),
        ({"alpha_pattern": {"head": -1e39}}, r"alpha_pattern\['head'\] must be finite"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number"),
        ({"lora_dropout": 1.0}, "lora_dropout must be"),
        ({"lora_dropout": -0.5}, "lora_dropout must be"),
        ({"use_dora": True}, "not support use_dora=True"),
        ({"use_rslora": "yes"}, "use_rslora must be True or False"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be"),
        ({"trainable_token_indices": [1]}, "not support trainable_token_indices"),
        ({"some_future_switch": {"on": 1}}, "not support some_future_switch="),
        ({"long" * 200: 1}, "not support longlong"),
        ({f"key{i}": 1 for i in range(999)}, "not support key0=1, key100=1"),
        ({"\x1b[2J": 1}, r"not support '\\x1b\[2J'=1"),
        ({"target_modules": [f"a{i}" for i in range(9999)]}, "selects nothing"),
        ({"peft_type": "LOKR"}, "peft_type must be 'LORA', got 'LOKR'"),
        (
            {"bias": "lora_only"},
            r"2 tensors missing \(.*2.base_layer.bias, .*head.base_layer.bias\)",
        ),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": ["nothing"]}, r"\['nothing'\] .*selects nothing"),
        (
            {"target_modules": ["0", "2", "head"]},
            r"2 tensors missing \(.*0.lora_A.weight, .*0.lora_B",
        ),
        ({"target_modules": ["2"]}, r"0 tensors missing \(none\), 2 unexpected \(.*head.lora_A"),
        ({"modules_to_save": None}, r"2 unexpected \(.*model.1.bias, .*model.1.weight\)"),
        ({"modules_to_save": ["0"]}, r"2 unexpected|has adapters already"),
        ({"target_modules": "(("}, "'\\(\\(' is not a regular expression"),
        ({"auto_mapping": {"parent_library": "antigravity"}, "r": 4}, "must be"),
    ],
    ids=lambda v: str(v)[:60],
)
def test_a_config_that_is_wrong(changes, message, folder):
    edit_config(folder, **changes)
    refused(folder, message, (ValueError, TypeError))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"peft_type": "LORA", "r": 3, "r": 1000}', "has 'r' more than once"),
        ('{"peft_type": "LORA", "rank_pattern": {"a": 1, "a": 2}}', "has 'a' more than once"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "holds NaN"),
        ('{"peft_type": "LORA", "lora_alpha": -Infinity}', "holds -Infinity"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999}', "holds 1e999"),
        ('{"peft_type": "LORA", "lora_alpha": 1' + "0" * 5000 + "}", "refused"),
        ('["LORA"]', "must hold an object, not a list"),
        ("", "refused"),
        ('{"peft_type": "LORA"', "refused"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (b"\xff\xfe{}", "refused"),
        (b'{"peft_type": "LORA"}' + b" " * (1 << 20), "larger than 1,048,576 bytes"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_config_file_that_is_malformed(text, message, folder):
    (folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, message)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"(.|..|\w)*!"},
        {"exclude_modules": r"(.|..|\w)*!"},
        {"rank_pattern": {r"(.|..|\w)*!": 4}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_pattern_that_never_ends(changes, folder, monkeypatch):
    monkeypatch.setattr(adapters, "_PATTERN_SECONDS", 0.5)
    model = torch.nn.Sequential()
    model.add_module("h" * 50, torch.nn.Linear(8, 5))
    edit_config(folder, **{"target_modules": ["h" * 50], **changes, "modules_to_save": None})
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"{next(iter(changes))} took more than 0.5 s"):
        load_adapter(model, folder)
    assert time.monotonic() - start < 10


# The weights


def put(key, tensor):
    return lambda tensors: tensors.update({key: tensor})


def spoil(value):
    def change(tensors):
        tensors[KEY][1, 2] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil(torch.nan), "holds NaN or infinity in head.lora_A.weight"),
        (spoil(-torch.inf), "holds NaN or infinity in head.lora_A.weight"),
        (put("base_model.model.1.weight", torch.full((8,), torch.nan)), "infinity in 1.weight"),
        (lambda t: t.update({KEY: t[KEY].double() * 1e300}), "infinity in head.lora_A.weight"),
        (
            lambda t: t.pop(KEY),
            r"1 tensors missing \(.*head.lora_A.weight\), 0 unexpected \(none\)",
        ),
        (lambda t: t.clear(), r"6 tensors missing \(.* and 3 more\), 0 unexpected"),
        (put("base_model.model.0.weight", torch.zeros(8, 6)), r"1 unexpected \(.*model.0.weight\)"),
        (put("0.weight", torch.zeros(8, 6)), r"1 unexpected \(0.weight\)"),
        (put("base_model.model.0.lora_A.weight", torch.zeros(3, 6)), "1 unexpected"),
        (put("base_model.model.head.lora_magnitude_vector", torch.zeros(5)), "1 unexpected"),
        (put(KEY + "\n\x1b[2J", torch.zeros(1)), "1 unexpected"),
        (put("base_model.model.1.original_module.bias", torch.zeros(8)), "1 unexpected"),
        (put("base_model.model.head.base_layer.bias", torch.zeros(5)), "1 unexpected"),
        (
            put("base_model.model.head.base_layer.weight", torch.zeros(5, 8)),
            "overwrite frozen weights of the model: base_model.model.head.base_layer.weight",
        ),
        (put("base_model.model.head.base_layer.weight", torch.zeros(9)), "overwrite frozen"),
        (put("base_model.model.0.base_layer.weight", torch.zeros(8, 6)), "overwrite frozen"),
        (put(KEY, torch.zeros(3, 9)), r"must be \[3, 8\], as model and config say, got \[3, 9\]"),
        (put(KEY, torch.zeros(8, 3)), r"must be \[3, 8\]"),
        (put(KEY, torch.zeros(24)), r"must be \[3, 8\]"),
        (put("base_model.model.1.weight", torch.zeros(())), r"must be \[8\]"),
        (put(KEY, torch.zeros(3, 8, dtype=torch.int64)), "must be F64 or F32 or .*, got I64"),
        (put(KEY, torch.zeros(3, 8, dtype=torch.complex64)), "got C64"),
        (put(KEY, torch.zeros(3, 8, dtype=torch.float8_e4m3fn)), "got F8_E4M3"),
    ],
    ids=range(23),
)
def test_weights_that_are_wrong(change, message, folder):
    edit_weights(folder, change)
    refused(folder, message, (ValueError, TypeError))


def test_a_copy_of_the_model_s_own_weight_is_harmless(folder):
    own = tiny.mlp().head.weight.detach().clone()
    edit_weights(folder, put("base_model.model.head.base_layer.weight", own))
    load_adapter(tiny.mlp(), folder)
    own[0, 0] += 1e-3
    edit_weights(folder, put("base_model.model.head.base_layer.weight", own))
    refused(folder, "overwrite frozen")


def header(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        pickle.dumps({KEY: 1}),
        struct.pack("<Q", 1 << 60) + b"{}",
        header(b'{"a": '),
        header(
            b'{"%s": {"dtype": "F32", "shape": [3, 8], "data_offsets": [0, 96]}}' % KEY.encode()
        ),
        header(b'{"a": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 0]}}'),
        header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}') + b"\0" * 8,
    ],
    ids=range(8),
)
def test_a_weights_file_that_is_malformed(data, folder):
    (folder / WEIGHTS).write_bytes(data)
    refused(folder, "not a whole safetensors file")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_weights_file_that_was_cut_off(kept, folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(len(data) * kept)])
    refused(folder, "not a whole safetensors file")


def test_tensors_are_not_read_before_the_header_was_compared(folder, monkeypatch):
    """A file that says it holds much is refused by what it says."""
    edit_weights(folder, put(KEY, torch.zeros(3, 9)))
    read = []

    class File:
        def __init__(self, *args, **kwargs):
            self.file = safetensors.safe_open_(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def __getattr__(self, name):
            read.append(name)
            return getattr(self.file, name)

    import safetensors

    monkeypatch.setattr(safetensors, "safe_open_", safetensors.safe_open, raising=False)
    monkeypatch.setattr(safetensors, "safe_open", File)
    refused(folder, "must be")
    assert "get_slice" in read and "get_tensor" not in read


# The folder


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("was_run",))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"])
def test_a_pickle_is_not_opened(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Trap()))
    refused(folder, f"{name}' is a pickle, which can run code .* convert it to {WEIGHTS}")
    assert not (folder / "was_run").exists()


def test_a_folder_that_is_none_or_holds_no_adapter(folder, tmp_path):
    nowhere = tmp_path / "hub-user" / "adapter"
    refused(nowhere, "is not a folder; .* downloads nothing", FileNotFoundError)
    refused(folder / CONFIG, "is not a folder", FileNotFoundError)
    (folder / CONFIG).unlink()
    refused(folder, f"no {CONFIG} in it", FileNotFoundError)
    (folder / WEIGHTS).unlink()
    refused(folder, f"no {WEIGHTS} in it", FileNotFoundError)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop", "dangling"])
def test_what_is_no_file_is_not_waited_for(name, kind, folder):
    path = folder / name
    path.unlink()
    make = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
        "dangling": lambda: path.symlink_to(folder / "gone"),
    }
    make[kind]()
    refused(folder, "is not a file|holds no adapter", (ValueError, OSError))


def test_links_to_files_are_followed(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(tmp_path / f"blob-{name}")
        (linked / name).symlink_to(tmp_path / f"blob-{name}")
    load_adapter(tiny.mlp(), linked)


def test_a_model_without_weights_is_refused(folder):
    model = tiny.mlp().to("meta")
    with pytest.raises(ValueError, match="meta device"):
        load_adapter(model, folder)


def test_a_failure_after_all_checks_changes_nothing(folder, monkeypatch):
    from fastlora import LoRALinear

    add, calls = LoRALinear.add_adapter, []

    def fail(layer, name, **kwargs):
        calls.append(name)
        if len(calls) % 2 == 0:
            raise MemoryError("no more")
        add(layer, name, **kwargs)

    monkeypatch.setattr(LoRALinear, "add_adapter", fail)
    model = tiny.mlp()
    before = tiny.bits(model)
    with pytest.raises(MemoryError):
        load_adapter(model, folder)
    assert tiny.same(before, tiny.bits(model))
