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

# PEFT's names of methods whose configs hold nothing but the values below.
_METHODS = ("LORA", "IA3", "LOHA", "LOKR", "HRA", "LN_TUNING")
# Keys that say nothing of how the adapter runs, or where code and models are to be had.
_IGNORED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
_MAX_FLOAT32 = 3.4028234663852886e38
_MAX_NAMES = 4096  # PEFT compares each with each
_MAX_NAME = 300  # and every part of one


def parsed(path: Path, data: bytes) -> dict[str, Any]:
    """Return the values that PEFT may have of a config file's content.

    Raises ValueError or TypeError that says what of it is refused.
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
        return checked(values)
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{str(path)!r} is refused: {error}") from None
    except RecursionError:
        raise ValueError(f"{str(path)!r} is refused: it is nested too deeply") from None


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """Return what of ``values`` changes the adapter; keys that are not known may hold nothing."""
    if values.get("peft_type") not in _METHODS:
        raise ValueError(
            f"peft_type must be one of {', '.join(_METHODS)}, got {values.get('peft_type')!r:.100}"
        )
    kept, refused = {"peft_type": values["peft_type"]}, []
    for key, value in values.items():
        if key in _FIELDS or (key in _OPTIONAL and value is not None):
            _check(key, value, *(_FIELDS | _OPTIONAL)[key])
            kept[key] = value
        elif key not in _IGNORED | _OPTIONAL.keys() and value not in (None, False, {}, [], ""):
            refused.append(f"{key if key.isidentifier() else repr(key)!s:.60}={value!r:.40}")
    if refused:
        raise ValueError(
            f"load_adapter() does not support {', '.join(sorted(refused)):.500}; "
            "PEFT may load it, where you trust the file"
        )
    return kept


def _check(name: str, value: Any, must: str, right: Callable[[Any], bool]) -> None:
    if name in _PATTERNS:
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a dict with modules' names, got {value!r:.100}")
        for key, each in value.items():
            _check(f"{name}[{key!r:.100}]", each, must, right)
    elif not right(value):
        raise ValueError(f"{name} must be {must}, got {value!r:.100}")


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 31


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MAX_FLOAT32


def _is_list_of(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(right, value))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_NAME


def _are_names(value: Any) -> bool:
    return _is_list_of(_is_name)(value) and len(value) <= _MAX_NAMES


def _is_index(value: Any) -> bool:
    return _is_int(value) and value >= 0


_are_indices = _is_list_of(_is_index)


def _are_tokens(value: Any) -> bool:
    if isinstance(value, dict):
        return _are_names(list(value)) and all(map(_are_indices, value.values()))
    return _are_indices(value)


def _fields(must: str, right: Callable[[Any], bool], *names: str) -> dict[str, tuple]:
    return dict.fromkeys(names, (must, right))


_RANK = f"an int from 1 to {MAX_RANK}", lambda value: _is_int(value) and 1 <= value <= MAX_RANK
_ALPHA = "a number that is finite in float32", _is_finite
_NAMES = f"a list of at most {_MAX_NAMES} names of at most {_MAX_NAME} characters"
_SWITCHES = (
    "apply_GS",
    "decompose_both",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "init_ia3_weights",
    "init_weights",
    "lora_bias",
    "rank_dropout_scale",
    "use_dora",
    "use_effective_conv2d",
    "use_qalora",
    "use_rslora",
)
# What each value must be: in words, and whether it is.
_FIELDS = {
    **_fields(*_RANK, "r"),
    **_fields(*_ALPHA, "lora_alpha", "alpha"),
    **_fields(
        "at least 0 and less than 1",
        lambda value: _is_finite(value) and 0 <= value < 1,
        *("lora_dropout", "rank_dropout", "module_dropout"),
    ),
    **_fields("True or False", lambda value: type(value) is bool, *_SWITCHES),
    **_fields("an int", _is_int, "decompose_factor"),
    **_fields(
        "'none', 'all' or 'lora_only'", lambda value: value in ("none", "all", "lora_only"), "bias"
    ),
    **_fields(
        "one of True, False, 'gaussian', 'orthogonal', 'eva' and 'mica', as the others change the "
        "model's frozen weights",
        lambda value: type(value) in (bool, str) and value in _INITS,
        "init_lora_weights",
    ),
}
# Those that may also be null, for PEFT's default.
_OPTIONAL = {
    **_fields(*_RANK, "rank_pattern"),
    **_fields(*_ALPHA, "alpha_pattern"),
    **_fields(
        f"a regular expression or {_NAMES}",
        lambda value: isinstance(value, str) or _are_names(value),
        *("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules"),
    ),
    **_fields(_NAMES, _are_names, "modules_to_save", "target_parameters"),
    **_fields(
        "a layer's index or a list of them",
        lambda value: _is_index(value) or _are_indices(value),
        "layers_to_transform",
    ),
    **_fields("a list of token ids", _are_indices, "alora_invocation_tokens"),
    **_fields("token ids, in a list or by embedding", _are_tokens, "trainable_token_indices"),
    **_fields("a name of PEFT's", lambda value: isinstance(value, str), "task_type"),
}
_PATTERNS = ("rank_pattern", "alpha_pattern")


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
