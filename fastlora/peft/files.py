# SPDX-License-Identifier: Apache-2.0
"""Adapters in files: `load_adapter`, which checks before PEFT loads, and `save_adapter`.

A file is not trusted: its config and its header are compared with what PEFT would build, and all
values must be finite, before anything in the model changes. PEFT then gets what was checked.
Nothing is imported, fetched or unpickled because a file says so.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlora.files import locked, remove_abandoned, sync_folder, temporary_of
from fastlora.layers.classes import unwrapped
from fastlora.peft.config import MAX_BYTES, parsed
from fastlora.peft.patch import check_not_compiled, check_release, patch_peft
from fastlora.peft.patterns import check_patterns
from fastlora.peft.rehearsal import Expected, rehearsed, unchanged_on_error

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
# Where the weights say with which config they were saved.
_CONFIG_HASH = "adapter_config_sha256"
# Unfinished saves that are looked at.
_MAX_LEFT = 100
_PATTERN_SECONDS = 10.0
_FLOATS = ("F64", "F32", "BF16", "F16")
_INTEGERS = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}


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
    from peft import PeftModel
    from safetensors.torch import save_file

    check_release()
    _check_model(model, adapter_name)
    with locked(Path(folder), shared=True):
        path, data, of_weights = _config(Path(folder))
        values = parsed(path, data)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        names = [name for name, _ in base.named_modules()]
        try:
            check_patterns(values, names, _PATTERN_SECONDS)
            expected = rehearsed(model, values, adapter_name)
            _check_sizes(expected, trusted)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is refused: {error}") from None
        own = {_plain(key): tensor for key, tensor in base.state_dict().items()}
        weights = Path(folder) / WEIGHTS_FILE
        tensors = _read_weights(weights, expected, own, of_weights, trusted)
    changed = [own[_plain(key)] for key in tensors if _plain(key) in own]
    with unchanged_on_error(model, changed), tempfile.TemporaryDirectory() as checked:
        save_file(tensors, Path(checked) / WEIGHTS_FILE, metadata={"format": "pt"})
        (Path(checked) / CONFIG_FILE).write_text(json.dumps(values), encoding="utf-8")
        if isinstance(model, PeftModel):
            loaded = model
            loaded.load_adapter(checked, adapter_name, is_trainable)
        else:
            loaded = PeftModel.from_pretrained(model, checked, adapter_name, is_trainable)
        _check_arrived(loaded, adapter_name, tensors)
        if values["peft_type"] == "LORA":
            patch_peft(loaded)
    return loaded


def save_adapter(
    model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default"
) -> None:
    """Write an adapter of a ``PeftModel`` as PEFT does, for `load_adapter` and for PEFT.

    Both files are complete on the disk before either takes its name, the weights first: until
    then an adapter that the folder held stays as it was, and from then on `load_adapter` finds the
    new one, even where the process is killed between the two. A model that FSDP2 has sharded is
    saved by all its processes together, of which the first writes. Raises TypeError for a model
    that is none of PEFT's, ValueError for an unknown adapter, and OSError when the files cannot be
    written, such as on a full disk.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save

    model, folder = unwrapped(model), Path(folder)
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a peft.PeftModel, got {type(model).__name__}")
    if adapter_name not in model.peft_config:
        known = ", ".join(map(repr, model.peft_config))
        raise ValueError(f"no adapter named {adapter_name!r} to save; the model has {known}")
    own = get_peft_model_state_dict(model, adapter_name=adapter_name)
    if any(getattr(module, "merged", False) for module in model.modules()):
        own = {key: t for key, t in own.items() if not key.endswith(".base_layer.weight")}
    tensors = {key: _on_cpu(tensor) for key, tensor in own.items()}
    if any(map(_is_shard, own.values())) and torch.distributed.get_rank() != 0:
        return
    if broken := [key for key, tensor in tensors.items() if not _finite(tensor)]:
        warnings.warn(f"NaN or infinity in {_few(broken)}: load_adapter() refuses it", stacklevel=2)
    text = _config_text(model, adapter_name)
    folder.mkdir(parents=True, exist_ok=True)
    weights = _with_config_hash(save(tensors, metadata={"format": "pt"}), text)
    _write_together({folder / WEIGHTS_FILE: weights, folder / CONFIG_FILE: text})


# Writing


def _config_text(model: PeftModel, adapter_name: str) -> bytes:
    """Return what ``PeftModel.save_pretrained`` writes, its sets in order."""
    config, base = model.peft_config[adapter_name], model.get_base_model()
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    values["inference_mode"] = True
    if values["base_model_name_or_path"] is None:
        values["base_model_name_or_path"] = vars(base).get("name_or_path") or None
    if values["task_type"] is None:
        kind = type(base)
        values["auto_mapping"] = {
            "base_model_class": kind.__name__,
            "parent_library": kind.__module__,
        }
    return json.dumps(values, indent=2, sort_keys=True, allow_nan=False).encode()


def _with_config_hash(weights: bytes, config: bytes) -> bytes:
    """Add the config's hash to a file's metadata; safetensors would write the two in any order."""
    end = 8 + int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8:end])
    header["__metadata__"][_CONFIG_HASH] = _hash(config)
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # tensors start at multiples of 8 bytes
    return len(text).to_bytes(8, "little") + text + weights[end:]


def _write_together(contents: dict[Path, bytes]) -> None:
    folder = next(iter(contents)).parent
    temporary = {path: temporary_of(path) for path in contents}
    for path in contents:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has the name of the file", str(path))
    try:
        for path, data in contents.items():
            with open(temporary[path], "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        with locked(folder):
            for path in contents:
                os.replace(temporary[path], path)
    except BaseException:
        # Ctrl-C may come at the end of the first replace(): what is left belongs to that file then.
        if temporary[next(iter(contents))].exists():
            for path in temporary.values():
                path.unlink(missing_ok=True)
        raise
    sync_folder(folder)
    for path in contents:
        remove_abandoned(path)


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _on_cpu(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if _is_shard(tensor):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True).contiguous()


# Reading


def _config(folder: Path) -> tuple[Path, bytes, str | None]:
    """Return the config of the weights, its content, and the hash that they have of theirs.

    It is the one saved with them, also where that was killed before it got its name.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{str(folder)!r} is not a folder; load_adapter() takes a local folder with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}, and downloads nothing"
        )
    pickles = [p for p in _PICKLES if (folder / p).exists()]
    if pickles and not (folder / WEIGHTS_FILE).exists():
        raise ValueError(
            f"{str(folder / pickles[0])!r} is a pickle, which can run code when it is read, and is "
            f"refused; convert it to {WEIGHTS_FILE} where you trust it, for example by loading and "
            "saving it with PEFT"
        )
    config = folder / CONFIG_FILE
    _check_file(folder / WEIGHTS_FILE)
    wanted = _config_hash(folder / WEIGHTS_FILE)
    left = _newest(folder.glob(f".{CONFIG_FILE}.*.tmp"))[:_MAX_LEFT] if wanted else []
    for path in (config, *left):
        with contextlib.suppress(OSError):  # not ours to read, or just deleted
            if path.is_file() and _hash(data := _head(path)) == wanted:
                return path, data, wanted
    _check_file(config)  # edited by hand, or written by PEFT
    if wanted:
        warnings.warn(
            f"{str(config)!r} is not the config that the weights beside it were saved with",
            stacklevel=3,
        )
    return config, _head(config), wanted


def _newest(paths: Iterable[Path]) -> list[Path]:
    """Return the files, the newest first; one may get its name meanwhile."""
    times = {}
    for path in paths:
        with contextlib.suppress(OSError):
            times[path] = path.stat().st_mtime
    return sorted(times, key=times.get, reverse=True)


def _check_file(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(
            f"{str(path.parent)!r} holds no adapter: there is no {path.name} in it"
        )
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{str(path)!r} is not a file")


def _config_hash(weights: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt") as file:
            return (file.metadata() or {}).get(_CONFIG_HASH)
    except SafetensorError:  # said where the tensors are read
        return None


def _head(path: Path) -> bytes:
    """Return the file, or more than a config may have of it."""
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


def _hash(config: bytes) -> str:
    return hashlib.sha256(config).hexdigest()


def _check_model(model: nn.Module, adapter_name: str) -> None:
    """Raise for what PEFT could not load an adapter into, or only by halves."""
    from peft import PeftMixedModel, PeftModel

    if not isinstance(adapter_name, str):
        raise TypeError(f"adapter_name must be a str, got {type(adapter_name).__name__}")
    if "." in adapter_name or adapter_name in "lora_" or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            "adapter_name must be non-empty, without '.', no part of 'lora_' and no method of a "
            f"dict, got {adapter_name!r}"
        )
    if unwrapped(model) is not model or isinstance(model, PeftMixedModel):
        raise TypeError(f"model must be plain or a PeftModel, got {type(model).__name__}")
    check_not_compiled(model)
    if any(map(_is_shard, model.parameters())):
        raise ValueError("model is sharded: load the adapter first, then shard it")
    offloaded = getattr(model, "hf_device_map", None)
    if offloaded is None and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model is on the meta device: give it its weights first")
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise ValueError(f"adapter {adapter_name!r} exists already: delete_adapter() it first")


def _check_sizes(expected: Expected, trusted: bool) -> None:
    for name, (r, width) in expected.ranks.items():
        if r > width and not trusted:
            raise ValueError(
                f"r={r} for {name!r} is more than {width}, the smaller side of its weight; pass "
                "trusted=True where you trust the file"
            )
    for name, (index, count) in expected.tokens.items():
        if index >= count:
            raise ValueError(f"token {index} is to be trained in {name!r}, which has {count}")


def _read_weights(
    path: Path, expected: Expected, own: dict[str, Tensor], config_hash: str | None, trusted: bool
) -> dict[str, Tensor]:
    """Return the tensors that PEFT may have, after comparing the file's header with ``expected``.

    They are copies: what is written to the file afterwards reaches no model. ``own``: the model's
    tensors by their plain names.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get(_CONFIG_HASH) != config_hash:
                raise ValueError(f"{str(path)!r} was replaced while it was read: load it again")
            likes, keys = dict(expected.tensors), set(file.keys())
            copies = {key for key in keys - likes.keys() if _plain(key) in own}
            changed = {key for key in copies if not _is_own(file, key, own[_plain(key)])}
            if trusted:  # what has another shape is refused with the others
                likes |= {key: own[_plain(key)] for key in changed & expected.embeddings}
            if frozen := changed - likes.keys():
                raise ValueError(
                    f"{str(path)!r} would overwrite frozen weights of the model: {_few(frozen)}"
                )
            _check_keys(path, keys - (copies - changed), likes)
            for key in keys & likes.keys():
                header = file.get_slice(key)
                _check_header(key, header.get_shape(), header.get_dtype(), likes[key])
            tensors = {key: file.get_tensor(key).clone() for key in sorted(keys & likes.keys())}
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a whole safetensors file: {error}") from None
    if broken := [key for key, t in tensors.items() if not _finite(t.to(likes[key].dtype))]:
        raise ValueError(f"{str(path)!r} holds NaN or infinity in {_few(broken)}")
    return tensors


def _plain(key: str) -> str:
    """Return a tensor's name in a model without adapters."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")


def _is_own(file: Any, key: str, own: Tensor) -> bool:
    """Whether a file's tensor is a copy of the model's: PEFT writes some of embeddings."""
    if file.get_slice(key).get_shape() != list(own.shape) or own.is_meta:
        return False
    tensor = file.get_tensor(key)
    return tensor.dtype == own.dtype and torch.equal(tensor, own.detach().cpu())


def _check_keys(path: Path, keys: set[str], likes: dict[str, Tensor]) -> None:
    # With bias="all" PEFT also writes those of its wrappers' own copies.
    needless = {k for k in likes if ".original_module." in k or ".modules_to_save." in k}
    missing, unexpected = likes.keys() - needless - keys, keys - likes.keys()
    if missing or unexpected:
        raise ValueError(
            f"{str(path)!r} is not for this model and {CONFIG_FILE}: "
            f"{len(missing)} tensors missing ({_few(missing)}), "
            f"{len(unexpected)} unexpected ({_few(unexpected)})"
        )


def _check_header(key: str, shape: list[int], dtype: str, like: Tensor) -> None:
    if tuple(shape) != tuple(like.shape):
        raise ValueError(f"{key} must be {list(like.shape)}, as model and config say, got {shape}")
    allowed = _FLOATS if like.is_floating_point() else (_INTEGERS.get(like.dtype),)
    if dtype not in allowed:
        raise TypeError(f"{key} must be {' or '.join(map(str, allowed))}, got {dtype}")


def _check_arrived(model: PeftModel, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError where PEFT has not loaded all that it was given."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    lost = [
        key
        for key, tensor in tensors.items()
        if key in state
        and not state[key].is_meta
        and not torch.equal(state[key].detach().cpu(), tensor.to(state[key].dtype))
    ]
    if lost:
        raise ValueError(f"PEFT did not load {_few(lost)} as {adapter_name!r}")


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _few(names: Iterable[str]) -> str:
    """Name three; what comes from a file may not reach a terminal as it is."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name[:200])[1:-1] for name in names[:3]) + more or "none"
