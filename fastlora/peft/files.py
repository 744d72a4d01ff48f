# SPDX-License-Identifier: Apache-2.0
"""Adapters in files: `load_adapter`, which checks before PEFT loads, and `save_adapter`.

A file is not trusted: its config and its header are compared with what PEFT would build, and all
values must be finite, before anything in the model changes. PEFT then gets what was checked.
Nothing is imported, fetched or unpickled because a file says so.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastlora.files import locked, remove_abandoned, sync_folder, temporary_of
from fastlora.layers.classes import unwrapped
from fastlora.peft import checks
from fastlora.peft.checks import CONFIG_FILE, WEIGHTS_FILE, few, finite, plain_name
from fastlora.peft.config import parsed
from fastlora.peft.patterns import check_patterns
from fastlora.peft.rehearsal import rehearsed, unchanged_on_error
from fastlora.peft.require import check_not_compiled, check_release

if TYPE_CHECKING:
    from peft import PeftModel

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
    check_release()
    from peft import PeftModel
    from safetensors.torch import save_file

    from fastlora.peft.patch import patch_peft

    _check_model(model, adapter_name)
    with locked(Path(folder), shared=True):
        path, data, of_weights = checks.find_config(Path(folder))
        values = parsed(path, data)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        names = [name for name, _ in base.named_modules()]
        try:
            check_patterns(values, names, _PATTERN_SECONDS)
            expected = rehearsed(model, values, adapter_name)
            checks.check_sizes(expected, trusted)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is refused: {error}") from None
        own = {plain_name(k): t for k, t in base.state_dict().items() if isinstance(t, Tensor)}
        weights = Path(folder) / WEIGHTS_FILE
        tensors = checks.read_weights(weights, expected, own, of_weights, trusted)
    # A copy of a module that is trained in full leaves the original as it is.
    written = [key for key in tensors if key in expected.embeddings or key.endswith(".bias")]
    changed = [own[plain_name(key)] for key in written if plain_name(key) in own]
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
    if broken := [key for key, tensor in tensors.items() if not finite(tensor)]:
        warnings.warn(f"NaN or infinity in {few(broken)}: load_adapter() refuses it", stacklevel=2)
    text = _config_text(model, adapter_name)
    folder.mkdir(parents=True, exist_ok=True)
    weights = _with_config_hash(save(tensors, metadata={"format": "pt"}), text)
    _write_together({folder / WEIGHTS_FILE: weights, folder / CONFIG_FILE: text})


# Loading


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
        raise ValueError(f"PEFT did not load {few(lost)} as {adapter_name!r}")


# Saving


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
    header["__metadata__"][checks.CONFIG_HASH] = checks.hash_of(config)
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
