# SPDX-License-Identifier: Apache-2.0
"""Whether a file's regular expressions end in time, as PEFT would match them; no torch here.

Run as a script it answers one JSON question on stdin, in a process that can be stopped: matching a
regular expression may take for ever.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable

# What PEFT 0.19 to 0.21 puts around a pattern; with None it has to match a module's whole name.
_AROUND = {
    "target_modules": None,
    "exclude_modules": None,
    "feedforward_modules": None,
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
# No quantifier, group or alternative: a few such patterns take no time.
_PLAIN = re.compile(r"(?:[\w-]|\\?\.)*")
_MAX_PLAIN_PATTERNS = 64
_MAX_PLAIN_CHARACTERS = 2048


def check_patterns(config: dict, names: Iterable[str], seconds: float) -> None:
    """Raise ValueError for a pattern that is none, or takes over ``seconds`` on ``names``."""
    patterns = list(_patterns(config))
    if _harmless([pattern for _, pattern in patterns]):
        return
    question = json.dumps({"patterns": patterns, "names": list(names), "seconds": seconds})
    command = [sys.executable, "-I", __file__]
    try:
        run = subprocess.run(
            command, input=question, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        slow = sorted({field for field, pattern in patterns if not _PLAIN.fullmatch(pattern)})
        raise ValueError(
            f"matching the regular expressions of {', '.join(slow) or 'the config'} took more than "
            f"{seconds:g} s: name the modules in a list instead"
        ) from None
    if run.returncode != 0:
        raise ValueError(f"matching the config's patterns failed: {run.stderr.strip()[-300:]!r}")
    if run.stdout:
        raise ValueError(run.stdout)


def _patterns(config: dict) -> Iterable[tuple[str, str]]:
    """Yield every string that becomes a regular expression, with its field."""
    for field, around in _AROUND.items():
        value = config.get(field) or ()
        if isinstance(value, str):
            yield field, value
        elif around is not None:  # else it is a list of names
            yield from ((field, pattern) for pattern in value)


def _harmless(patterns: list[str]) -> bool:
    few = len(patterns) <= _MAX_PLAIN_PATTERNS and len("".join(patterns)) <= _MAX_PLAIN_CHARACTERS
    return few and all(map(_PLAIN.fullmatch, patterns))


def _why_not(patterns: list[tuple[str, str]], names: list[str]) -> str:
    """Match as PEFT does, which compiles most again, and return what is wrong with a pattern."""
    matched = []
    for field, pattern in patterns:
        around = _AROUND[field]
        text = pattern if around is None else around.format(pattern)
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            why = f"is not a regular expression: {str(error)!r:.200}"
            return f"{field}: {pattern!r:.200} {why}"
        matched.append((re.fullmatch if around is None else re.match, text))
    for name in names:
        for match, text in matched:
            match(text, name)
    return ""


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
    print(_why_not(asked["patterns"], asked["names"]), end="")
