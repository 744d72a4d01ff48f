# SPDX-License-Identifier: Apache-2.0
"""Adapters in files: `load_adapter`, which checks before PEFT loads, and `save_adapter`.

A file is not trusted: its config and its header are compared with what PEFT would build, and all
values must be finite, before anything in the model changes. PEFT then gets what was checked.
Nothing is imported, fetched or unpickled because a file says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlora.files import locked, replace_files
from fastlora.functional import DTYPES
from fastlora.layers.classes import unwrapped
from fastlora.peft import patch
from fastlora.peft.config import MAX_BYTES, check_patterns, parsed
from fastlora.peft.rehearsal import rehearsed, unchanged_on_error

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Where the weights say with which config they were saved.
CONFIG_HASH = "adapter_config_sha256"
_PATTERN_SECONDS = 10.0


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    is_trainable: bool = False,
    *,
    trusted: bool = False,
) -> PeftModel:
    """Have PEFT load an adapter that it or `save_adapter` wrote, after a check; return its model.

    ``model`` is plain, for ``PeftModel.from_pretrained``, or a ``PeftModel``, which gets another
    adapter; `patch_peft` fuses what it can. ``folder`` is a local folder. The adapter is frozen
    unless ``is_trainable``. With ``trusted`` r may be above the smaller side of a layer's weight,
    and the model's own embeddings are overwritten where the file has other ones.
    Raises FileNotFoundError when the folder holds no adapter, and ValueError or TypeError when it
    is not one for this model, is damaged, or asks for what is not supported; the model is then as
    it was. Warns where the config is not the one that the weights were saved with.
    """
    peft = patch.check_release()
    from safetensors.torch import save_file

    from fastlora.peft import expert_files

    _check_model(model, adapter_name)
    folder = Path(folder)
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    own = {_plain_name(k): t for k, t in base.state_dict().items() if isinstance(t, Tensor)}
    with locked(folder, shared=True), _opened(folder) as weights:
        path, data = _find_config(folder, _hash_in(weights))
        try:
            values = parsed(data)
            names = [name for name, _ in base.named_modules()]
            check_patterns(values, names, _PATTERN_SECONDS)
            joined = expert_files.Joined(weights, base, values)
            expected, embeddings = rehearsed(model, values, adapter_name, trusted)
            path = folder / WEIGHTS_FILE
            if joined.peft_wrote_experts:
                expert_files.check_layout(json.loads(data).get("peft_version"), expected)
            tensors = _read(joined, expected, own, embeddings if trusted else set())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{str(path)!r} is refused: {error}") from None
    # A copy of a module that is trained in full leaves the original as it is.
    written = [key for key in tensors if key in embeddings or key.endswith(".bias")]
    changed = [own[_plain_name(key)] for key in written if _plain_name(key) in own]
    with unchanged_on_error(model, changed), tempfile.TemporaryDirectory() as checked:
        save_file(tensors, Path(checked) / WEIGHTS_FILE, metadata={"format": "pt"})
        (Path(checked) / CONFIG_FILE).write_text(json.dumps(values), encoding="utf-8")
        if isinstance(model, peft.PeftModel):
            loaded = model
            loaded.load_adapter(checked, adapter_name, is_trainable)
        else:
            loaded = peft.PeftModel.from_pretrained(model, checked, adapter_name, is_trainable)
        _check_arrived(loaded, adapter_name, tensors)
        if values["peft_type"] == "LORA":
            patch.patch_peft(loaded)
    return loaded


def _check_model(model: nn.Module, adapter_name: str) -> None:
    """Raise for what PEFT could not load an adapter into, or only by halves."""
    from peft import PeftMixedModel, PeftModel

    if not isinstance(adapter_name, str):
        raise TypeError(f"adapter_name must be a str, got {type(adapter_name).__name__}")
    if "." in adapter_name or adapter_name in "lora_" or hasattr(nn.ModuleDict(), adapter_name):
        right = "non-empty, without '.', no part of 'lora_' and no method of a dict"
        raise ValueError(f"adapter_name must be {right}, got {adapter_name!r}")
    if unwrapped(model) is not model or isinstance(model, PeftMixedModel):
        raise TypeError(f"model must be plain or a PeftModel, got {type(model).__name__}")
    patch.check_not_compiled(model)
    if any(map(_is_shard, model.parameters())):
        raise ValueError("model is sharded: load the adapter first, then shard it")
    if not hasattr(model, "hf_device_map") and any(p.is_meta for p in model.parameters()):
        raise ValueError("model is on the meta device: give it its weights first")
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise ValueError(f"adapter {adapter_name!r} exists already: delete_adapter() it first")


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    """Open the weights, which stay what they are where a save gives their name to others."""
    from safetensors import SafetensorError, safe_open

    weights = _file(folder / WEIGHTS_FILE)
    try:
        with safe_open(weights, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{str(weights)!r} is not a whole safetensors file: {error}") from None


def _file(path: Path) -> Path:
    if path.is_file():  # and no pipe, which would be waited for
        return path
    raise FileNotFoundError(
        f"there is no file {str(path)!r}: load_adapter() takes a local folder with {CONFIG_FILE} "
        f"and {WEIGHTS_FILE}. It downloads nothing, and opens no pickle (.bin, .pt), which can run "
        "code: convert one that you trust by loading and saving it with PEFT"
    )


def _find_config(folder: Path, wanted: str | None) -> tuple[Path, bytes]:
    """Return the config of the weights, and its content: by its hash, which they have.

    It is the one saved with them, also where that was killed before it got its name.
    """
    config = folder / CONFIG_FILE
    for path in (config, *folder.glob(f".{CONFIG_FILE}.*.tmp")) if wanted else ():
        with contextlib.suppress(OSError):  # not ours to read, or just deleted
            if path.is_file() and hashlib.sha256(data := _head(path)).hexdigest() == wanted:
                return path, data
    data = _head(_file(config))  # edited by hand, or written by PEFT
    if wanted:
        with _opened(folder) as now:  # where the system has no locks
            if _hash_in(now) != wanted:
                raise ValueError(f"{str(folder)!r} got another adapter meanwhile: load it again")
        edited = f"{str(config)!r} is not the config that the weights beside it were saved with"
        warnings.warn(edited, stacklevel=3)
    return config, data


def _hash_in(weights: Any) -> str | None:
    return (weights.metadata() or {}).get(CONFIG_HASH)


def _head(path: Path) -> bytes:
    """Return the file, or more than a config may have of it."""
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


def _read(
    weights: Any, expected: dict[str, Tensor], own: dict[str, Tensor], overwritten: set[str]
) -> dict[str, Tensor]:
    """Return the tensors that PEFT may have; what is written to the file later reaches no model.

    ``own``: the model's tensors by their plain names, of which PEFT saves copies that nobody needs;
    ``overwritten``: keys of those that may have other values in the file.
    """
    keys = set(weights.keys())
    copies = {key for key in keys - expected.keys() if _plain_name(key) in own}
    changed = {key for key in copies if not _is_copy(weights, key, own[_plain_name(key)])}
    if frozen := changed - overwritten:
        raise ValueError(f"it would overwrite frozen weights of the model: {_few(frozen)}")
    likes = expected | {key: own[_plain_name(key)] for key in changed}
    # With bias="all" PEFT also writes those of its wrappers' own copies.
    needless = {k for k in likes if ".original_module." in k or ".modules_to_save." in k}
    missing, unexpected = likes.keys() - needless - keys, keys - likes.keys() - copies
    if missing or unexpected:
        less = f"{len(missing)} tensors missing ({_few(missing)})"
        more = f"{len(unexpected)} unexpected ({_few(unexpected)})"
        raise ValueError(f"it is not for this model and {CONFIG_FILE}: {less}, {more}")
    taken = sorted(keys & likes.keys())
    for key in taken:
        must, shape = list(likes[key].shape), weights.get_slice(key).get_shape()
        if shape != must:
            raise ValueError(f"{key} must be {must}, as model and config say, got {shape}")
    tensors = {}
    for key in taken:
        tensor, dtype = weights.get_tensor(key), likes[key].dtype
        allowed = DTYPES if dtype in DTYPES else (dtype,)
        if tensor.dtype not in allowed:
            raise ValueError(f"{key} must be {' or '.join(map(str, allowed))}, got {tensor.dtype}")
        tensors[key] = tensor.clone()
        if not torch.isfinite(tensors[key].to(dtype)).all():
            raise ValueError(f"it holds NaN or infinity in {key}")
    return tensors


def _is_copy(weights: Any, key: str, own: Tensor) -> bool:
    if weights.get_slice(key).get_shape() != list(own.shape) or own.is_meta:
        return False
    tensor = weights.get_tensor(key)
    return tensor.dtype == own.dtype and torch.equal(tensor, own.detach().cpu())


def _plain_name(key: str) -> str:
    """Return a tensor's name in a model without adapters."""
    name = key.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _check_arrived(model: PeftModel, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError where PEFT has not loaded all that it was given."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    for key in tensors.keys() & state.keys():
        found = state[key].detach()
        if not (found.is_meta or torch.equal(found.cpu(), tensors[key].to(found.dtype))):
            raise ValueError(f"PEFT did not load {key} as {adapter_name!r}")


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    *,
    per_expert: bool = False,
) -> None:
    """Write an adapter of a ``PeftModel`` as PEFT does, for `load_adapter` and for PEFT.

    Both files are complete on the disk before either takes its name, the weights first: until
    then an adapter that the folder held stays as it was, and from then on `load_adapter` finds the
    new one, even where the process is killed between the two. A model that FSDP2 has sharded is
    saved by all its processes together, of which the first writes.

    PEFT keeps the adapters of a mixture's experts in one tensor. With ``per_expert`` each has keys
    of its own, as checkpoints of such models have and servers read them (vLLM, SGLang):
    ``experts.3.up_proj.lora_A.weight`` [R, K]. `load_adapter` reads both.
    Raises TypeError for a model that is none of PEFT's, ValueError for an unknown adapter and for
    experts that have no such keys, and OSError when the files cannot be written, such as on a full
    disk.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save

    from fastlora.peft import expert_files

    model, folder = unwrapped(model), Path(folder)
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a peft.PeftModel, got {type(model).__name__}")
    if adapter_name not in model.peft_config:
        known = ", ".join(map(repr, model.peft_config))
        raise ValueError(f"no adapter named {adapter_name!r} to save; the model has {known}")
    own = get_peft_model_state_dict(model, adapter_name=adapter_name)
    if any(getattr(module, "merged", False) for module in model.modules()):
        own = {key: t for key, t in own.items() if not key.endswith(".base_layer.weight")}
    tensors = {
        key: (t.full_tensor() if _is_shard(t) else t).detach().to("cpu", copy=True).contiguous()
        for key, t in own.items()
    }
    if any(map(_is_shard, own.values())) and torch.distributed.get_rank() != 0:
        return
    if broken := {key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()}:
        warnings.warn(f"NaN or infinity in {_few(broken)}: load_adapter() refuses it", stacklevel=2)
    values = _config_values(model, adapter_name)
    if per_expert:
        tensors, values = expert_files.by_expert(model, adapter_name, tensors, values)
    config = json.dumps(values, indent=2, sort_keys=True, allow_nan=False).encode()
    weights = _with_config_hash(save(tensors, metadata={"format": "pt"}), config)
    folder.mkdir(parents=True, exist_ok=True)
    files = {WEIGHTS_FILE: weights, CONFIG_FILE: config}
    replace_files({folder / n: lambda file, data=d: file.write(data) for n, d in files.items()})


def _with_config_hash(weights: bytes, config: bytes) -> bytes:
    """Add the config's hash to a file's metadata; safetensors would write the two in any order."""
    end = 8 + int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8:end])
    header["__metadata__"][CONFIG_HASH] = hashlib.sha256(config).hexdigest()
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # tensors start at multiples of 8 bytes
    return len(text).to_bytes(8, "little") + text + weights[end:]


def _config_values(model: PeftModel, adapter_name: str) -> dict[str, Any]:
    """Return what ``PeftModel.save_pretrained`` writes, its sets in order."""
    config, base = model.peft_config[adapter_name].to_dict(), model.get_base_model()
    values = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    name = config["base_model_name_or_path"] or vars(base).get("name_or_path") or None
    values |= {"inference_mode": True, "base_model_name_or_path": name}
    if config["task_type"] is None:
        kind = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        values["auto_mapping"] = kind
    return values


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _few(names: set[str]) -> str:
    """Name three; what comes from a file may not reach a terminal as it is."""
    shown = ", ".join(repr(name[:200])[1:-1] for name in sorted(names)[:3]) or "none"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
