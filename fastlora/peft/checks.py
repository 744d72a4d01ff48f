# SPDX-License-Identifier: Apache-2.0
"""What the files of an adapter must be before PEFT gets them: found, paired, whole, as expected."""

from __future__ import annotations

import contextlib
import hashlib
import stat
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.peft.config import MAX_BYTES
from fastlora.peft.rehearsal import Expected

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Where the weights say with which config they were saved.
CONFIG_HASH = "adapter_config_sha256"

_PREFIX = "base_model.model."
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
# Unfinished saves that are looked at.
_MAX_LEFT = 100
_FLOATS = ("F64", "F32", "BF16", "F16")


def find_config(folder: Path) -> tuple[Path, bytes, str | None]:
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
    wanted = _hash_in(folder / WEIGHTS_FILE)
    left = _newest(folder.glob(f".{CONFIG_FILE}.*.tmp"))[:_MAX_LEFT] if wanted else []
    for path in (config, *left):
        with contextlib.suppress(OSError):  # not ours to read, or just deleted
            if path.is_file() and hash_of(data := _head(path)) == wanted:
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


def _hash_in(weights: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt") as file:
            return (file.metadata() or {}).get(CONFIG_HASH)
    except SafetensorError:  # said where the tensors are read
        return None


def _head(path: Path) -> bytes:
    """Return the file, or more than a config may have of it."""
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


def hash_of(config: bytes) -> str:
    return hashlib.sha256(config).hexdigest()


def check_sizes(expected: Expected, trusted: bool) -> None:
    for name, (r, width) in expected.ranks.items():
        if r > width and not trusted:
            raise ValueError(
                f"r={r} for {name!r} is more than {width}, the smaller side of its weight; pass "
                "trusted=True where you trust the file"
            )
    for name, (index, count) in expected.tokens.items():
        if index >= count:
            raise ValueError(f"token {index} is to be trained in {name!r}, which has {count}")


def read_weights(
    path: Path, expected: Expected, own: dict[str, Tensor], config_hash: str | None, trusted: bool
) -> dict[str, Tensor]:
    """Return the tensors that PEFT may have, after comparing the file's header with ``expected``.

    They are copies: what is written to the file afterwards reaches no model. ``own``: the model's
    tensors by their plain names.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get(CONFIG_HASH) != config_hash:
                raise ValueError(f"{str(path)!r} was replaced while it was read: load it again")
            likes, keys = dict(expected.tensors), set(file.keys())
            copies = {key for key in keys - likes.keys() if plain_name(key) in own}
            changed = {key for key in copies if not _is_own(file, key, own[plain_name(key)])}
            if trusted:  # what has another shape is refused with the others
                likes |= {key: own[plain_name(key)] for key in changed & expected.embeddings}
            if frozen := changed - likes.keys():
                raise ValueError(
                    f"{str(path)!r} would overwrite frozen weights of the model: {few(frozen)}"
                )
            _check_keys(path, keys - (copies - changed), likes)
            for key in sorted(keys & likes.keys()):
                header = file.get_slice(key)
                _check_header(key, header.get_shape(), header.get_dtype(), likes[key])
            tensors = {key: file.get_tensor(key).clone() for key in sorted(keys & likes.keys())}
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a whole safetensors file: {error}") from None
    if broken := [key for key, t in tensors.items() if not finite(t.to(likes[key].dtype))]:
        raise ValueError(f"{str(path)!r} holds NaN or infinity in {few(broken)}")
    return tensors


def plain_name(key: str) -> str:
    """Return a tensor's name in a model without adapters."""
    return key.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")


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
            f"{len(missing)} tensors missing ({few(missing)}), "
            f"{len(unexpected)} unexpected ({few(unexpected)})"
        )


def _check_header(key: str, shape: list[int], dtype: str, like: Tensor) -> None:
    if tuple(shape) != tuple(like.shape):
        raise ValueError(f"{key} must be {list(like.shape)}, as model and config say, got {shape}")
    allowed = _FLOATS
    if not like.is_floating_point():
        sign = "I" if like.dtype.is_signed else "U"
        allowed = ("BOOL" if like.dtype == torch.bool else f"{sign}{8 * like.itemsize}",)
    if dtype not in allowed:
        raise TypeError(f"{key} must be {' or '.join(allowed)}, got {dtype}")


def finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def few(names: Iterable[str]) -> str:
    """Name three; what comes from a file may not reach a terminal as it is."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name[:200])[1:-1] for name in names[:3]) + more or "none"
