# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m fastlora finetune``, ``ranks``, ``tune`` and ``info``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import warnings

from fastlora.commands import finetune, ranks, tune
from fastlora.commands.shared import UserError, leave, rank

# What runs it, its options, and what it does.
COMMANDS = {
    "finetune": (finetune.run, finetune.Settings, "fine-tune a language model on your own lines"),
    "ranks": (ranks.run, ranks.RankSettings, "find the rank and the layers, by runs of finetune"),
    "tune": (
        tune.run,
        tune.TuneSettings,
        "measure which implementation is fastest on this machine",
    ),
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
    targets = tuple(options["target_modules"])
    if len(targets) == 1 and (targets == ("all-linear",) or not re.fullmatch(r"\w+", targets[0])):
        targets = targets[0]  # one expression
    run, settings, _ = COMMANDS[command]
    try:
        run(settings(**options | {"target_modules": targets}))
    except UserError as error:
        which = f"process {rank()}: " if rank() else ""
        print(f"{which}error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return a parser with an option for each field of a command's settings."""
    parser = argparse.ArgumentParser(
        prog="python -m fastlora", description="LoRA linear layers that cost what frozen ones cost."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="say what runs here: versions, device, implementations")
    shown = argparse.ArgumentDefaultsHelpFormatter
    for name, (_, settings, text) in COMMANDS.items():
        one = commands.add_parser(name, help=text, formatter_class=shown)
        for field in dataclasses.fields(settings):
            if field.metadata:
                one.add_argument(f"--{field.name.replace('_', '-')}", **field.metadata)
    return parser


if __name__ == "__main__":
    leave(main())
