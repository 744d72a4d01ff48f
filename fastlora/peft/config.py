# SPDX-License-Identifier: Apache-2.0
"""What an adapter_config.json may say: each value is checked, all else refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MAX_BYTES = 1 << 20
MAX_RANK = 4096

_MAX_FLOAT32 = 3.4028234663852886e38
_MAX_NAMES = 4096  # PEFT compares each with each
_MAX_NAME = 300  # and every part of one
_NAMES = f"a list of at most {_MAX_NAMES} names of at most {_MAX_NAME} characters"
# PEFT's methods whose configs hold nothing but the values below.
_METHODS = ("LORA", "IA3", "LOHA", "LOKR", "HRA", "LN_TUNING")
# Keys that nothing depends on: of the file and where code and models are to be had, of how weights
# started, and of what is refused or chosen at run time.
_ORIGIN = ("auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision")
_STARTS = ("corda_config", "eva_config", "loftq_config")
_IDLE = ("inference_mode", "megatron_core", "qalora_group_size", "runtime_config")
_IGNORED = {*_ORIGIN, *_STARTS, *_IDLE}


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 31


def _is_index(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _is_rank(value: Any) -> bool:
    return _is_int(value) and 1 <= value <= MAX_RANK


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MAX_FLOAT32


def _are_names(value: Any) -> bool:
    names = isinstance(value, list) and len(value) <= _MAX_NAMES
    return names and all(isinstance(v, str) and 0 < len(v) <= _MAX_NAME for v in value)


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_index, value))


def _are_tokens(value: Any) -> bool:
    if isinstance(value, dict):
        return _are_names(list(value)) and all(map(_are_indices, value.values()))
    return _are_indices(value)


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: type(value) in (bool, str) and value in values


# What a value must be: in words, whether it is, and for which keys, with ? where it may be null.
_RULES = (
    (f"an int from 1 to {MAX_RANK}", _is_rank, "r rank_pattern?"),
    ("a number that is finite in float32", _is_finite, "lora_alpha alpha alpha_pattern?"),
    (
        "at least 0 and less than 1",
        lambda value: _is_finite(value) and 0 <= value < 1,
        "lora_dropout rank_dropout module_dropout",
    ),
    (
        "True or False",
        lambda value: type(value) is bool,
        "apply_GS decompose_both ensure_weight_tying fan_in_fan_out init_ia3_weights init_weights "
        "lora_bias rank_dropout_scale use_dora use_effective_conv2d use_qalora use_rslora",
    ),
    ("an int", _is_int, "decompose_factor"),
    ("'none', 'all' or 'lora_only'", _one_of("none", "all", "lora_only"), "bias"),
    (
        "one of True, False, 'gaussian', 'orthogonal', 'eva' and 'mica', as the others change the "
        "model's frozen weights",
        _one_of(True, False, "gaussian", "orthogonal", "eva", "mica"),
        "init_lora_weights",
    ),
    (
        f"a regular expression or {_NAMES}",
        lambda value: isinstance(value, str) or _are_names(value),
        "target_modules? exclude_modules? layers_pattern? feedforward_modules?",
    ),
    (_NAMES, _are_names, "modules_to_save? target_parameters?"),
    (
        "a layer's index or a list of them",
        lambda value: _is_index(value) or _are_indices(value),
        "layers_to_transform?",
    ),
    ("a list of token ids", _are_indices, "alora_invocation_tokens?"),
    ("token ids, in a list or by embedding", _are_tokens, "trainable_token_indices?"),
    ("a name of PEFT's", lambda value: isinstance(value, str), "task_type?"),
)
KNOWN = {key.rstrip("?"): rule[:2] for rule in _RULES for key in rule[2].split()}
_OPTIONAL = {key[:-1] for rule in _RULES for key in rule[2].split() if key.endswith("?")}


def parsed(path: Path, data: bytes) -> dict[str, Any]:
    """Return what of a config file's content changes the adapter, for PEFT.

    Keys that are not known may hold null, false or nothing. Raises ValueError for all else.
    """
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
        values = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_not_finite,
            parse_float=_finite_float,
        )
        if not isinstance(values, dict):
            raise ValueError(f"it must hold an object, not a {type(values).__name__}")
        return _checked(values)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is refused: {error}") from None
    except RecursionError:
        raise ValueError(f"{str(path)!r} is refused: it is nested too deeply") from None


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    method = values.get("peft_type")
    if not _one_of(*_METHODS)(method):
        raise ValueError(f"peft_type must be one of {', '.join(_METHODS)}, got {method!r:.100}")
    kept, refused = {"peft_type": method}, []
    for key, value in values.items():
        if key in KNOWN and not (value is None and key in _OPTIONAL):
            _check(key, value, *KNOWN[key])
            kept[key] = value
        elif key not in KNOWN.keys() | _IGNORED and value not in (None, False, {}, [], ""):
            refused.append(f"{key if key.isidentifier() else repr(key)!s:.60}={value!r:.40}")
    if refused:
        raise ValueError(
            f"load_adapter() does not support {', '.join(sorted(refused)):.500}; "
            "PEFT may load it, where you trust the file"
        )
    return kept


def _check(name: str, value: Any, must: str, right: Callable[[Any], bool]) -> None:
    if name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a dict with modules' names, got {value!r:.100}")
        for key, each in value.items():
            _check(f"{name}[{key!r:.100}]", each, must, right)
    elif not right(value):
        raise ValueError(f"{name} must be {must}, got {value!r:.100}")


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
