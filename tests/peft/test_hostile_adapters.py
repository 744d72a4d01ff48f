# SPDX-License-Identifier: Apache-2.0
"""Adapter files that nobody should load: refused by name, with the model as it was."""

import json
import os
import pickle
import struct
import time

import hostile_adapters
import peft
import pytest
import tiny_models as tiny
import torch
from peft_models import wrapped
from safetensors.torch import load_file, save_file

import fastlora
from fastlora import load_adapter, save_adapter
from fastlora.peft import checks, files, patch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
P = "base_model.model."
pytestmark = pytest.mark.filterwarnings("ignore:.*is not the config")
KEY = f"{P}head.lora_A.weight"


def good(**changes):
    """A model with an adapter of rank 3 for two of the layers of `tiny.mlp`, and its norm."""
    values = {"r": 3, "target_modules": ["2", "head"], "modules_to_save": ["1"]}
    return wrapped(**{**values, **changes})


@pytest.fixture
def folder(tmp_path):
    save_adapter(good(), tmp_path)
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
    other = wrapped(target_modules=["0", "2"], modules_to_save=["1"])
    other.add_adapter("second", peft.LoraConfig(target_modules=["2"]))
    for model in (tiny.mlp(), other):
        before = tiny.bits(model)
        with pytest.raises(error, match=message) as caught:
            load_adapter(model, folder, "new")
        assert tiny.same(before, tiny.bits(model))
        assert len(str(caught.value)) < 1500 and str(caught.value).isprintable()
    assert list(other.peft_config) == ["default", "second"]


def test_the_good_one_loads(folder):
    model = load_adapter(tiny.mlp(), folder)
    assert torch.equal(tiny.outputs(model), tiny.outputs(load_adapter(tiny.mlp(), folder)))
    assert not torch.equal(tiny.outputs(model), tiny.outputs(tiny.mlp()))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_what_is_written_to_the_file_later_reaches_no_model(bias, tmp_path):
    save_adapter(good(bias=bias), tmp_path)
    before = tiny.bits(model := load_adapter(tiny.mlp(), tmp_path))
    path = tmp_path / WEIGHTS
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert tiny.same(before, tiny.bits(model))


def test_what_is_written_to_the_file_meanwhile_reaches_no_model(folder, monkeypatch):
    """PEFT gets what was checked."""
    expected = tiny.bits(load_adapter(tiny.mlp(), folder))
    own = checks.read_weights

    def read(path, *args):
        tensors = own(path, *args)
        with open(path, "r+b") as file:
            file.write(b"\xff" * path.stat().st_size)
        (folder / CONFIG).write_text("{}")
        return tensors

    monkeypatch.setattr(checks, "read_weights", read)
    assert tiny.same(tiny.bits(load_adapter(tiny.mlp(), folder)), expected)


def test_weights_replaced_between_two_looks_at_them(folder, monkeypatch):
    """As another process may where the system has no locks: another alpha would be taken."""
    rehearsed = files.rehearsed

    def slowly(*args):
        save_adapter(good(lora_alpha=9), folder / "other")
        os.replace(folder / "other" / WEIGHTS, folder / WEIGHTS)
        return rehearsed(*args)

    monkeypatch.setattr(files, "rehearsed", slowly)
    before = tiny.bits(model := tiny.mlp())
    with pytest.raises(ValueError, match="was replaced while it was read: load it again"):
        load_adapter(model, folder)
    assert tiny.same(before, tiny.bits(model))


def test_a_rank_above_a_layer_s_width_has_to_be_allowed(tmp_path):
    """As PEFT makes for a head of few classes; nobody's file may ask for more than 4096."""
    save_adapter(model := good(r=6), tmp_path)
    refused(tmp_path, "r=6 for 'head' is more than 5, the smaller side of its weight; .*trusted")
    other = load_adapter(tiny.mlp(), tmp_path, trusted=True)
    torch.testing.assert_close(tiny.outputs(other), tiny.outputs(model), rtol=1e-4, atol=1e-5)
    edit_config(tmp_path, r=4097)
    with pytest.raises(ValueError, match="from 1 to 4096"):
        load_adapter(tiny.mlp(), tmp_path, trusted=True)


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
        ({"r": 6}, "r=6 for 'head' is more than 5, the smaller side of its weight; .*trusted"),
        ({"r": 4097}, "r must be an int from 1 to 4096, got 4097"),
        ({"r": 4}, r"lora_A.weight must be \[4, 8\], as model and config say, got \[3, 8\]"),
        ({"rank_pattern": {"head": 2}}, r"head.lora_A.weight must be \[2, 8\]"),
        ({"rank_pattern": {"head": True}}, r"rank_pattern\['head'\] must be an int"),
        ({"rank_pattern": ["head"]}, "rank_pattern must be a dict"),
        ({"r": 3.0}, "r must be an int"),
        ({"r": True}, "r must be an int"),
        ({"r": None}, "r must be an int"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number that is finite"),
        ({"lora_alpha": 1e299}, "lora_alpha must be a number that is finite"),
        ({"lora_alpha": None}, "lora_alpha must be a number that is finite"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number"),
        ({"alpha_pattern": {"head": -1e39}}, r"alpha_pattern\['head'\] must be a number that is"),
        ({"lora_dropout": -0.5}, "lora_dropout must be"),
        ({"use_rslora": "yes"}, "use_rslora must be True or False"),
        ({"init_lora_weights": 1}, "init_lora_weights must be"),
        ({"bias": ["all"]}, "bias must be 'none'"),
        ({"layers_to_transform": [-1]}, "layers_to_transform must be a layer's index or"),
        ({"trainable_token_indices": [1]}, "PEFT does not take it"),
        ({"trainable_token_indices": {"1": [-1]}}, "trainable_token_indices must be token ids"),
        ({"alora_invocation_tokens": "1"}, "must be a list of token ids"),
        ({"some_future_switch": {"on": 1}}, "not support some_future_switch="),
        ({"long" * 200: 1}, "not support longlong"),
        ({f"key{i}": 1 for i in range(999)}, "not support key0=1, key100=1"),
        ({"target_modules": [f"a{i}" for i in range(9999)]}, "at most 4096 names"),
        (
            {"target_modules": [f"a{i}" for i in range(999)]},
            "PEFT does not take it|0 tensors missing",
        ),
        ({"target_modules": 7}, "target_modules must be a regular expression or a list"),
        ({"target_modules": "(("}, "'\\(\\(' is not a regular expression"),
        ({"target_modules": None}, "PEFT does not take it"),
        ({"target_modules": ["2"]}, r"0 tensors missing \(none\), 2 unexpected \(.*head.lora_A"),
        ({"modules_to_save": None}, "would overwrite frozen weights of the model: .*1.bias, "),
        (
            {"modules_to_save": ["0"]},
            "overwrite frozen weights of the model: .*1.bias|PEFT does not",
        ),
        ({"task_type": "ANYTHING"}, "PEFT does not take it"),
        ({"peft_type": None}, "peft_type must be one of"),
        ({"bias": "all"}, "would overwrite|tensors missing|PEFT does not take it"),
    ],
    ids=lambda v: str(v)[:60],
)
def test_a_config_that_is_wrong(changes, message, folder):
    edit_config(folder, **changes)
    refused(folder, message, (ValueError, TypeError))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"peft_type": "LORA", "rank_pattern": {"a": 1, "a": 2}}', "has 'a' more than once"),
        ('{"peft_type": "LORA", "lora_alpha": -Infinity}', "holds -Infinity"),
        ('{"peft_type": "LORA", "lora_alpha": 1' + "0" * 5000 + "}", "refused"),
        ('["LORA"]', "must hold an object, not a list"),
        ("", "refused"),
        ('{"a":' * 100_000, "nested too deeply"),
        (b'{"peft_type": "LORA"}' + b" " * (1 << 20), "larger than 1,048,576 bytes"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_config_file_that_is_malformed(text, message, folder):
    (folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, message)


FOREVER = r"(.|..|\w)*!"


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": FOREVER},
        {"exclude_modules": FOREVER},
        {"rank_pattern": {FOREVER: 4}},
        {"modules_to_save": [FOREVER]},
        {"layers_pattern": FOREVER, "layers_to_transform": [1]},
        {"alpha_pattern": {f"{i}(a|b|c|d)*(e|f)*": 1 for i in range(30_000)}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_pattern_that_never_ends(changes, folder, monkeypatch):
    monkeypatch.setattr(files, "_PATTERN_SECONDS", 0.5)
    model = torch.nn.Sequential()
    model.add_module("h" * 50, torch.nn.Linear(8, 5))
    edit_config(folder, **{"target_modules": ["h" * 50], "modules_to_save": None, **changes})
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"{next(iter(changes))} took more than 0.5 s"):
        load_adapter(model, folder)
    assert time.monotonic() - start < 10


def test_what_says_nothing_of_the_adapter_is_not_looked_at(folder):
    """Names of code and of models: nothing is imported or asked for because a file says so."""
    edit_config(
        folder,
        auto_mapping={"parent_library": "antigravity"},
        base_model_name_or_path="/dev/zero",
        revision="x",
        runtime_config={"ephemeral_gpu_offload": True},
        a_switch_that_is_off=False,
    )
    model = load_adapter(tiny.mlp(), folder)
    config = model.peft_config["default"]
    assert config.base_model_name_or_path is config.auto_mapping is config.revision is None
    assert not config.runtime_config.ephemeral_gpu_offload


# The weights


def put(key, tensor):
    return lambda tensors: tensors.update({key: tensor})


def spoil(value):
    def change(tensors):
        tensors[KEY][1, 2] = value

    return change


WRONG = [
    (spoil(torch.nan), "holds NaN or infinity in .*head.lora_A.weight"),
    (spoil(-torch.inf), "holds NaN or infinity in .*head.lora_A.weight"),
    (put(f"{P}1.weight", torch.full((8,), torch.nan)), "infinity in .*1.weight"),
    (lambda t: t.update({KEY: t[KEY].double() * 1e300}), "infinity in .*head.lora_A.weight"),
    (lambda t: t.pop(KEY), r"1 tensors missing \(.*head.lora_A.weight\), 0 unexpected \(none\)"),
    (lambda t: t.clear(), r"6 tensors missing \(.* and 3 more\), 0 unexpected"),
    (put(f"{P}0.weight", torch.zeros(8, 6)), r"overwrite frozen weights of the model: .*0.weight"),
    (put("0.weight", torch.zeros(8, 6)), "overwrite frozen weights of the model: 0.weight"),
    (put(f"{P}0.lora_A.weight", torch.zeros(3, 6)), "1 unexpected"),
    (put(f"{P}head.lora_magnitude_vector", torch.zeros(5)), "1 unexpected"),
    (put(KEY + "\n\x1b[2J", torch.zeros(1)), "1 unexpected"),
    (put(f"{P}1.original_module.bias", torch.ones(8)), "overwrite frozen"),
    (put(f"{P}1.modules_to_save.bias", torch.zeros(8)), "1 unexpected"),
    (put(f"{P}head.base_layer.bias", torch.zeros(5)), "overwrite frozen"),
    (put(f"{P}head.base_layer.weight", torch.zeros(5, 8)), "overwrite frozen .*head.base_layer"),
    (put(f"{P}head.base_layer.weight", torch.zeros(9)), "overwrite frozen"),
    (put(KEY, torch.zeros(3, 9)), r"must be \[3, 8\], as model and config say, got \[3, 9\]"),
    (put(KEY, torch.zeros(24)), r"must be \[3, 8\]"),
    (put(f"{P}1.weight", torch.zeros(())), r"must be \[8\]"),
    (put(KEY, torch.zeros(3, 8, dtype=torch.int64)), "must be F64 or F32 or .*, got I64"),
    (put(KEY, torch.zeros(3, 8, dtype=torch.complex64)), "got C64"),
    (put(KEY, torch.zeros(3, 8, dtype=torch.float8_e4m3fn)), "got F8_E4M3"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=range(len(WRONG)))
def test_weights_that_are_wrong(change, message, folder):
    edit_weights(folder, change)
    refused(folder, message, (ValueError, TypeError))


def test_a_copy_of_the_model_s_own_weight_is_harmless(folder):
    own = tiny.mlp().head.weight.detach().clone()
    edit_weights(folder, put(f"{P}head.base_layer.weight", own))
    load_adapter(tiny.mlp(), folder)
    own[0, 0] += 1e-3
    edit_weights(folder, put(f"{P}head.base_layer.weight", own))
    refused(folder, "overwrite frozen")
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
    edit_weights(tmp_path, put(f"{P}model.embed_tokens.weight", torch.zeros(7, 16)))
    with pytest.raises(ValueError, match=r"embed_tokens.weight must be \[40, 16\]"):
        load_adapter(tiny.llama(), tmp_path, trusted=True)


def test_integers_stay_integers(tmp_path):
    """A batch norm that is trained in full has a counter."""

    def make():
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8))

    save_adapter(wrapped(make(), target_modules=["0"], modules_to_save=["1"]), tmp_path)
    load_adapter(make(), tmp_path)
    edit_weights(tmp_path, put(f"{P}1.num_batches_tracked", torch.zeros(())))
    with pytest.raises(TypeError, match=r"num_batches_tracked must be I64, got F32"):
        load_adapter(make(), tmp_path)


def test_tokens_that_a_model_does_not_have(tmp_path):
    values = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 39]}
    save_adapter(wrapped(tiny.llama(), **values), tmp_path)
    load_adapter(tiny.llama(), tmp_path)
    edit_config(tmp_path, trainable_token_indices=[1, 40])
    with (
        pytest.warns(UserWarning, match="is not the config"),
        pytest.raises(ValueError, match=r"token 40 is to be trained in .*, which has 40"),
    ):
        load_adapter(tiny.llama(), tmp_path)


def header(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        pickle.dumps({KEY: 1}),
        header(b'{"a": '),
        header(
            b'{"%s": {"dtype": "F32", "shape": [3, 8], "data_offsets": [0, 96]}}' % KEY.encode()
        ),
        header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}') + b"\0" * 8,
        0.1,
        0.99,
    ],
    ids=range(8),
)
def test_a_weights_file_that_is_malformed(data, folder):
    if isinstance(data, float):  # cut off
        whole = (folder / WEIGHTS).read_bytes()
        data = whole[: int(len(whole) * data)]
    (folder / WEIGHTS).write_bytes(data)
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


# The model


@pytest.mark.parametrize("made", [tiny.mlp, wrapped])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_failure_after_all_checks_changes_nothing(made, bias, tmp_path, monkeypatch):
    """In the last thing that is done: all is taken back, biases too."""
    save_adapter(good(bias=bias), tmp_path)
    monkeypatch.setattr(patch, "patch_peft", fail)
    model = made()
    kept = {} if made is tiny.mlp else dict(model.peft_config)
    before, y = tiny.bits(model), tiny.outputs(model)
    with pytest.raises(MemoryError if made is tiny.mlp or bias == "none" else ValueError):
        load_adapter(model, tmp_path, "new")
    assert tiny.same(before, tiny.bits(model)) and torch.equal(tiny.outputs(model), y)
    assert kept == getattr(model, "peft_config", {})
    monkeypatch.undo()
    if bias == "none":
        load_adapter(model, tmp_path, "new")


def test_what_peft_does_not_load_is_noticed(folder, monkeypatch):
    monkeypatch.setattr(
        peft.peft_model,
        "set_peft_model_state_dict",
        lambda *_, **__: torch.nn.Module().load_state_dict({}),
    )
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
