# SPDX-License-Identifier: Apache-2.0
"""Adapters in files: PEFT's adapter_config.json beside adapter_model.safetensors, both ways.

A file is not trusted: it is compared with the model and the config, header first, and nothing in
the model changes before all of it has been found good. Nothing is imported, fetched or unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastlora.config import LoRAConfig
from fastlora.files import locked, remove_abandoned, sync_folder, temporary_of
from fastlora.inject import InjectReport, Plan, apply, features, plan
from fastlora.injected import DEFAULT_ADAPTER
from fastlora.layers.hyperparameters import default_adapter_dtype
from fastlora.model import adapter_names, records, tensors_of, unwrapped
from fastlora.trainable import TrainableModule

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
_MAX_CONFIG_BYTES = 1 << 20
_MAX_RANK = 4096
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


def save_adapter(
    model: nn.Module, folder: str | os.PathLike, adapter: str = DEFAULT_ADAPTER
) -> None:
    """Write an adapter as PEFT does, for `load_adapter` and ``PeftModel.from_pretrained``.

    Both files are complete on the disk before either takes its name, the weights first: until
    then an adapter that the folder held stays as it was, and from then on `load_adapter` finds the
    new one, even where the process is killed between the two. A model that FSDP2 has sharded is
    saved by all its processes together, of which the first writes. Raises ValueError for an unknown
    adapter and OSError when the files cannot be written, such as on a full disk.
    """
    from safetensors.torch import save

    model, folder = unwrapped(model), Path(folder)
    if adapter not in records(model):
        raise ValueError(_not_saved(model, adapter))
    config = records(model)[adapter].config
    if config.base_model_name_or_path is None:
        origin = getattr(getattr(model, "config", None), "_name_or_path", None)
        config = replace(config, base_model_name_or_path=origin or None)
    own = tensors_of(model, adapter)
    tensors = {PREFIX + key: _on_cpu(tensor) for key, tensor in own.items()}
    if any(map(_is_shard, own.values())) and torch.distributed.get_rank() != 0:
        return
    if broken := [key for key, tensor in tensors.items() if not _finite(tensor)]:
        warnings.warn(f"NaN or infinity in {_few(broken)}: load_adapter() refuses it", stacklevel=2)
    if wide := [key for key, tensor in tensors.items() if _is_wide(key, tensor)]:
        warnings.warn(
            f"the rank is above the layer's width in {_few(wide)}: load_adapter() will need "
            "any_rank=True",
            stacklevel=2,
        )
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True, allow_nan=False).encode()
    folder.mkdir(parents=True, exist_ok=True)
    weights = _with_config_hash(save(tensors, metadata={"format": "pt"}), text)
    _write_together({folder / WEIGHTS_FILE: weights, folder / CONFIG_FILE: text})


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter: str = DEFAULT_ADAPTER,
    is_trainable: bool = False,
    *,
    adapter_dtype: torch.dtype | None = None,
    any_rank: bool = False,
) -> InjectReport:
    """Put an adapter that PEFT or `save_adapter` wrote into ``model`` and make it the active one.

    ``folder`` is a local folder. The adapter is frozen unless ``is_trainable``; others in the
    model stay, inactive. ``adapter_dtype`` as for `inject`, whatever dtype the file has.
    Raises FileNotFoundError when the folder holds no adapter, and ValueError or TypeError when
    it is not one for this model, is damaged, or asks for what is not supported; the model is then
    as it was.
    Warns where the config is not the one that the weights were saved with.
    """
    with locked(Path(folder), shared=True):
        path, data, of_weights = _config(Path(folder))
        config = _parsed(path, data)
        made = plan(model, config, adapter, adapter_dtype, seconds=_PATTERN_SECONDS)
        model = unwrapped(model)
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError("model is on the meta device: give it its weights first")
        _check_ranks(made, any_rank)
        tensors = _read_weights(Path(folder) / WEIGHTS_FILE, made, of_weights)
    apply(model, made, adapter, tensors, trainable=is_trainable)
    return made.report(model, adapter)


# Writing


def _not_saved(model: nn.Module, adapter: str) -> str:
    for name, module in model.named_modules():
        if adapter in records(module):
            return f"adapter {adapter!r} was injected into the submodule {name!r}: save that"
    if adapter in adapter_names(model):
        return (
            f"adapter {adapter!r} was not injected into this {type(model).__name__}: layers placed "
            "by hand have no config to save, and a model is saved as it was given to inject()"
        )
    known = ", ".join(map(repr, records(model))) or "none"
    return f"no adapter named {adapter!r} to save; injected or loaded: {known}"


def _is_wide(key: str, tensor: Tensor) -> bool:
    rank_first = key.endswith(".lora_A.weight")
    if not (rank_first or key.endswith(".lora_B.weight")):
        return False
    r, width = tensor.shape if rank_first else reversed(tensor.shape)
    return r > width


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
        return file.read(_MAX_CONFIG_BYTES + 1)


def _hash(config: bytes) -> str:
    return hashlib.sha256(config).hexdigest()


def _parsed(path: Path, data: bytes) -> LoRAConfig:
    try:
        if len(data) > _MAX_CONFIG_BYTES:
            raise ValueError(f"it is larger than {_MAX_CONFIG_BYTES:,} bytes")
        values = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_not_finite,
            parse_float=_finite_float,
        )
        if not isinstance(values, dict):
            raise ValueError(f"it must hold an object, not a {type(values).__name__}")
        return LoRAConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{str(path)!r} is refused: {error}") from None
    except RecursionError:
        raise ValueError(f"{str(path)!r} is refused: it is nested too deeply") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        again = next(key for key in values if keys.count(key) > 1)
        raise ValueError(f"it has {again!r:.100} more than once")
    return values


def _not_finite(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}, and numbers must be finite")


def _finite_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_finite(text[:40])


def _check_ranks(made: Plan, any_rank: bool) -> None:
    for name, (layer, r, _) in made.layers.items():
        width = min(features(layer))
        if r > _MAX_RANK:
            raise ValueError(f"r={r} for {name!r} is more than {_MAX_RANK}, the most of a file")
        if r > width and not any_rank:
            raise ValueError(
                f"r={r} for {name!r} is more than {width}, the smaller side of its weight; pass "
                "any_rank=True where you trust the file"
            )


def _read_weights(path: Path, made: Plan, config_hash: str | None) -> dict[str, Tensor]:
    """Return the plan's tensors by key, after comparing the file's header with the plan.

    They are copies: what is written to the file afterwards reaches no model.
    """
    from safetensors import SafetensorError, safe_open

    expected = _expected(made)
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get(_CONFIG_HASH) != config_hash:
                raise ValueError(f"{str(path)!r} was replaced while it was read: load it again")
            keys = set(file.keys())
            copies = {key for key in keys if key.endswith(".base_layer.weight")}
            if changed := [key for key in copies if not _is_own_weight(file, key, made)]:
                raise ValueError(
                    f"{str(path)!r} would overwrite frozen weights of the model: {_few(changed)}"
                )
            _check_keys(path, keys - copies, expected, made)
            for key, like in expected.items():
                header = file.get_slice(PREFIX + key)
                _check_header(PREFIX + key, header.get_shape(), header.get_dtype(), like)
            tensors = {
                key: file.get_tensor(PREFIX + key).to(like.dtype, copy=True)
                for key, like in expected.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a whole safetensors file: {error}") from None
    if broken := [key for key, tensor in tensors.items() if not _finite(tensor)]:
        raise ValueError(f"{str(path)!r} holds NaN or infinity in {_few(broken)}")
    return tensors


def _expected(made: Plan) -> dict[str, Tensor]:
    """Return for each key a meta tensor with the shape and dtype that the model will hold."""
    expected = {}
    for name, (layer, r, _) in made.layers.items():
        k, n = features(layer)
        dtype = made.adapter_dtype or default_adapter_dtype(layer.weight.dtype)
        expected[f"{name}.lora_A.weight"] = torch.empty(r, k, dtype=dtype, device="meta")
        expected[f"{name}.lora_B.weight"] = torch.empty(n, r, dtype=dtype, device="meta")
    for name, module in made.trained.items():
        original = module.original_module if isinstance(module, TrainableModule) else module
        for key, tensor in original.state_dict().items():
            expected[f"{name}.{key}"] = tensor.to("meta")
    return expected | {key: owner.bias.to("meta") for key, owner in made.biases.items()}


def _is_own_weight(file: Any, key: str, made: Plan) -> bool:
    """Whether this is a copy of an adapted layer's weight: PEFT writes one of an output head."""
    name = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
    if name not in made.layers:
        return False
    weight = made.layers[name][0].weight
    if file.get_slice(key).get_shape() != list(weight.shape):
        return False
    tensor = file.get_tensor(key)
    return tensor.dtype == weight.dtype and torch.equal(tensor, weight.detach().cpu())


def _check_keys(path: Path, keys: set[str], expected: Iterable[str], made: Plan) -> None:
    if made.config.bias == "all":  # PEFT also writes the biases of its wrappers' own copies
        again = tuple(
            f"{PREFIX}{name}.{part}."
            for name in made.trained
            for part in ("original_module", "modules_to_save")
        )
        keys = {key for key in keys if not (key.startswith(again) and key.endswith("bias"))}
    wanted = {PREFIX + key for key in expected}
    if keys != wanted:
        missing, unexpected = wanted - keys, keys - wanted
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


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _few(names: Iterable[str]) -> str:
    """Name three; what comes from a file may not reach a terminal as it is."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name[:200])[1:-1] for name in names[:3]) + more or "none"
