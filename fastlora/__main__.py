# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m fastlora finetune``, ``ranks``, ``tune`` and ``info``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import warnings
from typing import Any

from fastlora.commands import finetune, ranks, tune
from fastlora.commands.shared import UserError, leave, rank

COMMANDS = {
    "finetune": (finetune, "fine-tune a language model on your own lines of text"),
    "ranks": (ranks, "find the rank and the layers to fine-tune with, by short runs of finetune"),
    "tune": (tune, "measure which implementation is fastest for a model's layers on this machine"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    options = vars(_parser().parse_args(argv))
    command = options.pop("command")
    if command == "info":
        from fastlora.commands import info

        return info.main()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
    warnings.filterwarnings("ignore", "Could not find a config file")  # of a .gguf, or offline
    module, _ = COMMANDS[command]
    values = {name: _value(name, value) for name, value in options.items()}
    try:
        module.run(module.Settings(**values))
    except UserError as error:
        which = f"process {rank()}: " if rank() else ""
        print(f"{which}error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastlora", description="LoRA linear layers that cost what frozen ones cost."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="say what runs here: versions, device, implementations")
    for name, (module, text) in COMMANDS.items():
        shown = argparse.ArgumentDefaultsHelpFormatter
        _add(commands.add_parser(name, help=text, formatter_class=shown), module.Settings)
    return parser


def _add(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add an option for each field; a tuple takes several values, of its first one's type."""
    for field in dataclasses.fields(settings):
        if not field.metadata:  # no option
            continue
        option: dict[str, Any] = dict(field.metadata)
        default = field.default
        if default is dataclasses.MISSING:
            option["required"] = True
        elif isinstance(default, bool):
            option |= {"action": "store_true", "default": default}
        else:
            several = isinstance(default, tuple)
            example = default[0] if several and default else default
            kind = type(example) if isinstance(example, int | float) else str
            option |= {"default": default, "type": kind, "nargs": "+" if several else None}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **option)


def _value(name: str, value: Any) -> Any:
    """Return an option's value as settings hold it: names of modules, or one expression."""
    if not isinstance(value, list | tuple):
        return value
    one = len(value) == 1 and name == "target_modules"
    if one and (value[0] == "all-linear" or not re.fullmatch(r"\w+", value[0])):
        return value[0]
    return tuple(value)


if __name__ == "__main__":
    leave(main())
