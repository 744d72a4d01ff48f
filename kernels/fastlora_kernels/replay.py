# SPDX-License-Identifier: Apache-2.0
"""Launches that are worked out once for tensors of the same sizes that lie in the same way.

Which config, which grid and which arguments, nothing of it depends on anything else. `replayed`
keeps what a function did to its tensors and does it to others, as a line of Python for each launch
and each tensor that is made: what works them out takes several times as long.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora_kernels.configs import Config
from fastlora_kernels.launch import INTERPRETED, Launch, recording, stream_of

MOST_RECORDS = 4096  # of a function: lengths may be endless
RECORDS = not INTERPRETED


def replayed(function: Callable) -> Callable:
    """Return ``function`` so that what it did to tensors is done to others without it.

    Arguments are tensors, numbers, strings, None, a dictionary, or lists and tuples of such. A
    record serves all of which everything is the same but where tensors lie, to 16 bytes;
    dictionaries are one object. The function makes tensors by `empty` and works on them by `noted`.
    """
    records: dict[tuple, tuple] = {}

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        if not RECORDS or recording.done is not None:
            return function(*args, **options)
        given: list[Tensor] = []
        key: list = [*options]
        _read((args, *options.values()), given, key)
        asked = tuple(key)
        found = records.get(asked)
        if found is not None:
            return found[0](*given)
        if len(records) >= MOST_RECORDS:
            records.clear()
        recording.done, own = [], []
        try:
            aliases, named = _alias(args, own), _alias(tuple(options.values()), own)
            result = function(*aliases, **dict(zip(options, named, strict=True)))
            again = _written_out(own, recording.done, result)
        finally:
            recording.done = None
        records[asked] = again, [v for v in (*args, *options.values()) if isinstance(v, dict)]
        return result

    return run


_PLAIN = {type(None), bool, int, float, str, Config}
_TENSORS = {Tensor, torch.nn.Parameter}


def _read(values: Sequence, given: list[Tensor], key: list) -> None:
    """Add the tensors in ``values`` to ``given``, and all but where they lie to ``key``."""
    for value in values:
        kind = type(value)
        if kind in _PLAIN:
            key.append(value)
        elif kind not in _TENSORS and isinstance(value, (list, tuple)):
            key.append(len(value))
            _read(value, given, key)
        elif kind is dict:
            key.append(id(value))
        else:
            given.append(value)
            at = value.data_ptr() & 15
            key += value.size(), value.stride(), value.dtype, at, value.get_device()


def _alias(value: Any, own: list) -> Any:
    """Return ``value`` with another object for each tensor, added to ``own``.

    One that is given twice may be two the next time.
    """
    if isinstance(value, Tensor):
        own.append(value.detach())
        return own[-1]
    if isinstance(value, list | tuple):
        return tuple([_alias(v, own) for v in value])
    return value


def _written_out(given: list[Tensor], done: list[tuple], result: Any) -> Callable:
    """Return a function that does what was ``done`` to tensors in the place of those ``given``."""
    names = {id(t): f"t{i}" for i, t in enumerate(given)}
    head, constants = ", ".join(names.values()), []
    last: dict[str, int] = {}  # the line that takes a tensor last

    def text(value: Any, of: str = "") -> str:
        if isinstance(value, Tensor):
            last[names[id(value)]] = len(lines)
            return names[id(value)] + of
        if isinstance(value, list | tuple):
            return f"({''.join(text(v, of) + ', ' for v in value)})"
        constants.append(value)
        return "None" if value is None else f"c{len(constants) - 1}"

    launches = [getattr(function, "__self__", None) for function, _, _ in done]
    ready = [one for one in launches if isinstance(one, Launch) and one.ready]
    lines = [f"stream = {text(stream_of(ready))}()"] if ready else []
    for (function, args, made), launch in zip(done, launches, strict=True):
        line = f"{text(function)}{text(args)}"
        if launch in ready:
            own = launch.ready
            start = f"{text(own.run)}(*{text(own.head)}, stream, *{text(own.about)}"
            own = f"{start}, *{text(args, '.data_ptr()')}, *{text(own.rest)})"
            line = f"{line} if stream is None else {own}"
        elif made is not None and id(made) not in names:
            names[id(made)] = f"t{len(names)}"
            line = f"{text(made)} = {line}"
        lines.append(line)
    lines.append(f"return {text(result)}")
    for name, i in last.items():
        if i < len(lines) - 1:
            lines[i] += f"; del {name}"
    return _function(head, tuple(lines), len(constants))(*constants)


@functools.lru_cache(1024)
def _function(head: str, lines: tuple[str, ...], constants: int) -> Callable:
    """Return what makes a function of its constants: the lines are the same for other sizes."""
    names: dict[str, Any] = {}
    body, own = "\n  ".join(lines), ", ".join(f"c{i}" for i in range(constants))
    exec(f"def with_({own}):\n def again({head}):\n  {body}\n return again", names)
    return names["with_"]
