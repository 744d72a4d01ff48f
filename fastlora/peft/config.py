# SPDX-License-Identifier: Apache-2.0
"""What an adapter_config.json may say: values that are checked, and patterns that end in time.

Run as a script it matches patterns, in a process that can be stopped: a regular expression may take
for ever. No torch here.
"""

import json
import math
import re
import signal
import subprocess
import sys
from typing import Any

MAX_BYTES = 1 << 20

_MAX_RANK = 4096
_MAX_FLOAT32 = 3.4028234663852886e38
_MAX_NAMES = 4096  # PEFT compares each with each
_MAX_NAME = 300  # and every part of one
_NAMES = f"a list of at most {_MAX_NAMES} names of at most {_MAX_NAME} characters"
# PEFT's methods whose configs hold nothing but the values below.
_METHODS = ("LORA", "IA3", "LOHA", "LOKR", "HRA", "LN_TUNING")
_NOTHING = (None, False, {}, [], "")
_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
_START = f"one of {', '.join(map(repr, _STARTS))}, as others change the model's frozen weights"
# Keys that nothing depends on: where code and models are to be had, how weights started, and what
# is refused or chosen at run time.
_ORIGIN = ("auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision")
_STARTED = ("corda_config", "eva_config", "loftq_config")
_IDLE = ("inference_mode", "megatron_core", "qalora_group_size", "runtime_config")


def _is_int(value: Any, least: int = 1 - (1 << 31), most: int = (1 << 31) - 1) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MAX_FLOAT32


def _are_names(value: Any) -> bool:
    names = isinstance(value, list) and len(value) <= _MAX_NAMES
    return names and all(isinstance(v, str) and 0 < len(v) <= _MAX_NAME for v in value)


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and all(_is_int(v, 0) for v in value)


def _are_tokens(value: Any) -> bool:
    by_name = isinstance(value, dict) and _are_names([*value])
    return _are_indices(value) or (by_name and all(map(_are_indices, value.values())))


_DROPOUTS = "lora_dropout rank_dropout module_dropout"
_SWITCHES = (
    "apply_GS decompose_both ensure_weight_tying fan_in_fan_out init_ia3_weights init_weights "
    "lora_bias rank_dropout_scale use_dora use_effective_conv2d use_qalora use_rslora"
)
_CHOICES = "target_modules? exclude_modules? layers_pattern? feedforward_modules?"
# What a value must be: in words, whether it is, and for which keys, with ? where it may be null.
_RULES = (
    (f"an int from 1 to {_MAX_RANK}", lambda v: _is_int(v, 1, _MAX_RANK), "r rank_pattern?"),
    ("a number that is finite in float32", _is_number, "lora_alpha alpha alpha_pattern?"),
    ("at least 0 and less than 1", lambda v: _is_number(v) and 0 <= v < 1, _DROPOUTS),
    ("True or False", lambda v: type(v) is bool, _SWITCHES),
    ("an int", _is_int, "decompose_factor"),
    ("'none', 'all' or 'lora_only'", lambda v: v in ("none", "all", "lora_only"), "bias"),
    (_START, lambda v: type(v) in (bool, str) and v in _STARTS, "init_lora_weights"),
    (f"a pattern or {_NAMES}", lambda v: isinstance(v, str) or _are_names(v), _CHOICES),
    (_NAMES, _are_names, "modules_to_save? target_parameters?"),
    (
        "a layer's index or a list of them",
        lambda v: _is_int(v, 0) or _are_indices(v),
        "layers_to_transform?",
    ),
    ("a list of token ids", _are_indices, "alora_invocation_tokens?"),
    ("token ids, in a list or by embedding", _are_tokens, "trainable_token_indices?"),
    ("a name of PEFT's", lambda v: isinstance(v, str), "task_type?"),
)
KNOWN = {key.rstrip("?"): rule for *rule, keys in _RULES for key in keys.split()}
_OPTIONAL = {key[:-1] for *_, keys in _RULES for key in keys.split() if key.endswith("?")}


def parsed(data: bytes) -> dict[str, Any]:
    """Return what of a config file's content changes the adapter, for PEFT.

    Keys that are not known may hold null, false or nothing. Raises ValueError for all else, and
    RecursionError for what is nested too deeply.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
    numbers = {"parse_constant": _finite, "parse_float": _finite}
    values = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, **numbers)
    if not isinstance(values, dict):
        raise ValueError(f"it must hold an object, not a {type(values).__name__}")
    method = values.get("peft_type")
    if method not in _METHODS:
        raise ValueError(f"peft_type must be one of {', '.join(_METHODS)}, got {method!r:.100}")
    kept, refused = {"peft_type": method}, []
    for key, value in values.items():
        if key in KNOWN and not (value is None and key in _OPTIONAL):
            _check(key, value)
            kept[key] = value
        elif key not in (*KNOWN, *_ORIGIN, *_STARTED, *_IDLE) and value not in _NOTHING:
            refused.append(f"{key if key.isidentifier() else repr(key)!s:.60}={value!r:.40}")
    if refused:
        listed, cure = ", ".join(sorted(refused)), "PEFT may load it, where you trust the file"
        raise ValueError(f"load_adapter() does not support {listed:.500}; {cure}")
    return kept


def _check(key: str, value: Any) -> None:
    must, right = KNOWN[key]
    each = [(key, value)]
    if key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(value, dict):
            raise ValueError(f"{key} must be a dict with modules' names, got {value!r:.100}")
        each = [(f"{key}[{name!r:.100}]", v) for name, v in value.items()]
    for name, v in each:
        if not right(v):
            raise ValueError(f"{name} must be {must}, got {v!r:.100}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"it has {key!r:.100} more than once")
        values[key] = value
    return values


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"it holds {text:.40}, and numbers must be finite")
    return value


# What PEFT 0.19 to 0.21 matches with modules' whole names, with a file's pattern inside.
_AROUND = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "feedforward_modules": "{}",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\..*",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
# No quantifier, group or alternative: a few such patterns, a line each, take no time.
_PLAIN = re.compile(r"(?:[\w\n-]|\\?\.)*")
_MAX_PLAIN = 512  # characters


def check_patterns(config: dict[str, Any], names: list[str], seconds: float) -> None:
    """Raise ValueError for a pattern that is none, or takes over ``seconds`` on ``names``."""
    patterns = []
    for field, around in _AROUND.items():
        value = config.get(field) or ()
        if isinstance(value, str):
            patterns.append((field, value))
        elif around != "{}":  # else it is a list of names
            patterns += [(field, pattern) for pattern in value]
    text = "\n".join(pattern for _, pattern in patterns)
    if len(text) <= _MAX_PLAIN and _PLAIN.fullmatch(text):
        return
    command, asked = [sys.executable, "-I", __file__], json.dumps([patterns, names, seconds])
    try:
        run = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        slow = sorted({field for field, pattern in patterns if not _PLAIN.fullmatch(pattern)})
        raise ValueError(
            f"matching the regular expressions of {', '.join(slow) or 'the config'} took more than "
            f"{seconds:g} s: name the modules in a list instead"
        ) from None
    if run.returncode:
        said = run.stderr.splitlines() or ["matching its patterns failed"]
        raise ValueError(said[-1][-500:])


def _match(patterns: list[tuple[str, str]], names: list[str], seconds: float) -> None:
    """Match as PEFT does, which compiles most again, and exit with what is wrong with a pattern."""
    if hasattr(signal, "alarm"):  # should the process that waits be killed; not on Windows
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(seconds) + 2)
    for name in names:
        for field, pattern in patterns:
            try:
                re.fullmatch(_AROUND[field].replace("{}", pattern), name)
            except (re.error, RecursionError, OverflowError) as error:
                why = f"is not a regular expression: {str(error)!r:.200}"
                sys.exit(f"{field}: {pattern!r:.200} {why}")


if __name__ == "__main__":
    _match(*json.load(sys.stdin))
