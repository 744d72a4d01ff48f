# SPDX-License-Identifier: Apache-2.0
"""Which modules a config selects, and each one's rank and alpha, from names alone: no torch here.

Run as a script it answers one JSON question on stdin, so that a pattern from an untrusted file
runs in a process that can be stopped: matching a regular expression may take for ever.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable

# What `select` reads of a config.
FIELDS = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)

# No quantifier, group or alternative: a few such patterns take no time.
_PLAIN = re.compile(r"(?:[\w-]|\\?\.)*")
_MAX_PLAIN_PATTERNS = 64
_MAX_PLAIN_CHARACTERS = 2048


def select(spec: dict, names: Iterable[str]) -> dict:
    """Return what ``spec`` (the values of `FIELDS`) makes of the module ``names``, as PEFT does.

    ``layers``: {name: [r, lora_alpha]} of the modules that get an adapter; ``trained``: the names
    in modules_to_save; ``excluded``: names that exclude_modules or modules_to_save keep out.
    Raises ValueError for a bad regular expression.
    """
    names = list(names)
    excludes = _by_name_or_regex("exclude_modules", spec["exclude_modules"])
    to_save = spec["modules_to_save"] or []
    inside_saved = [_compile("modules_to_save", rf"(^|.*\.){m}($|\..*)") for m in to_save]
    targeted = _targets(spec)
    rank_of = _by_pattern("rank_pattern", spec["rank_pattern"], spec["r"])
    alpha_of = _by_pattern("alpha_pattern", spec["alpha_pattern"], spec["lora_alpha"])

    layers, excluded = {}, []
    for name in names:
        if excludes(name) or any(p.match(name) for p in inside_saved):
            excluded.append(name)
        elif targeted(name):
            layers[name] = [rank_of(name), alpha_of(name)]
    # A plain suffix, without a dot before it: "score" also names "pre_score", as in PEFT.
    trained = [name for name in names if to_save and name.endswith(tuple(to_save))]
    return {"layers": layers, "trained": trained, "excluded": excluded}


def select_within(spec: dict, names: Iterable[str], seconds: float) -> dict:
    """Return `select`'s answer; a pattern that could run away gets ``seconds`` in a process.

    Raises ValueError when the time is up or a pattern is no regular expression.
    """
    if _harmless(spec):
        return select(spec, names)
    question = json.dumps({"spec": spec, "names": list(names), "seconds": seconds})
    command = [sys.executable, "-I", __file__]
    try:
        run = subprocess.run(
            command, input=question, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        patterns = ", ".join(sorted({field for field, p in _patterns(spec) if not _is_plain(p)}))
        raise ValueError(
            f"matching the regular expressions of {patterns or 'the config'} took more than "
            f"{seconds:g} s: name the modules in a list instead"
        ) from None
    if run.returncode != 0:
        raise ValueError(f"matching the config's patterns failed: {run.stderr.strip()[-300:]}")
    answer = json.loads(run.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer


def _targets(spec: dict) -> Callable[[str], bool]:
    target = spec["target_modules"]
    by_name = _by_name_or_regex("target_modules", target)
    indices = spec["layers_to_transform"]
    if isinstance(target, str) or indices is None or indices == []:
        return by_name
    wanted = {indices} if isinstance(indices, int) else set(indices)
    layers_pattern = spec["layers_pattern"] or []
    if not layers_pattern:
        patterns = [re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")]
    else:
        given = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        patterns = [_compile("layers_pattern", rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.") for p in given]

    def in_layers(name: str) -> bool:
        match = next((m for p in patterns if (m := p.match(name))), None)
        index = match and match["idx"]
        return index is not None and int(index) in wanted

    # A name given in full is taken whatever its layer.
    return lambda name: by_name(name) and (name in target or in_layers(name))


def _by_name_or_regex(field: str, entries: str | list[str] | None) -> Callable[[str], bool]:
    """A str is a regular expression for whole names; a list holds whole names or last parts."""
    if not entries:
        return lambda name: False
    if isinstance(entries, str):
        pattern = _compile(field, entries)
        return lambda name: pattern.fullmatch(name) is not None
    wanted = frozenset(entries)
    return lambda name: any(name[i:] in wanted for i in _suffix_starts(name))


def _by_pattern(field: str, values: dict, default) -> Callable[[str], float]:
    """The value of the first pattern that matches the end of a name, after a dot or its start."""
    patterns = [(key, _compile(field, rf"(.*\.)?({key})$")) for key in values]

    def value(name: str):
        key = next((key for key, pattern in patterns if pattern.match(name)), name)
        return values.get(key, default)

    return value


def _suffix_starts(name: str) -> list[int]:
    return [0, *(i + 1 for i, char in enumerate(name) if char == ".")]


def _compile(field: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{field}: {pattern!r:.200} is not a regular expression: {str(error)!r:.200}"
        ) from None


def _patterns(spec: dict) -> list[tuple[str, str]]:
    """Every string of ``spec`` that becomes a regular expression, with its field."""
    found = []
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        if isinstance(spec[field], str):
            found.append((field, spec[field]))
    if isinstance(spec["layers_pattern"], list):
        found += [("layers_pattern", p) for p in spec["layers_pattern"]]
    for field in ("modules_to_save", "rank_pattern", "alpha_pattern"):
        found += [(field, p) for p in spec[field] or ()]
    return found


def _is_plain(pattern: str) -> bool:
    return _PLAIN.fullmatch(pattern) is not None


def _harmless(spec: dict) -> bool:
    patterns = [pattern for _, pattern in _patterns(spec)]
    few = len(patterns) <= _MAX_PLAIN_PATTERNS and len("".join(patterns)) <= _MAX_PLAIN_CHARACTERS
    return few and all(map(_is_plain, patterns))


def _limit_time(seconds: float) -> None:
    """Have the system end this process, should the one that waits for it be killed."""
    try:
        import resource
    except ImportError:  # Windows
        return
    most, (_, hard) = math.ceil(seconds) + 1, resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or hard > most:  # a lower limit of the system's stays
        resource.setrlimit(resource.RLIMIT_CPU, (most, most))


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    _limit_time(asked["seconds"])
    try:
        json.dump(select(asked["spec"], asked["names"]), sys.stdout)
    except ValueError as error:
        json.dump({"error": str(error)}, sys.stdout)
