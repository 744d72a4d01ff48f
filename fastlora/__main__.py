# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m fastlora finetune``, ``ranks``, ``tune`` and ``info``."""

import argparse
import os
import sys
import warnings

import torch

from fastlora.commands import finetune, info, ranks, tune
from fastlora.commands.shared import UserError, first_line, rank

COMMANDS = {
    "finetune": (finetune, "fine-tune a language model on your own lines"),
    "ranks": (ranks, "find the rank and the layers, by runs of finetune"),
    "tune": (tune, "measure which implementation is fastest on this machine"),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong as the commands do."""

    def error(self, message: str) -> None:
        raise UserError(message)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    parser = Parser("python -m fastlora", description="LoRA layers that cost what frozen ones do.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="say what runs here: versions, device, implementations")
    for name, (module, text) in COMMANDS.items():
        shown = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
        module.add_options(commands.add_parser(name, help=text, **shown).add_argument)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
    warnings.filterwarnings("ignore", "Could not find a config file")  # of a .gguf, or offline
    try:
        s = parser.parse_args(argv)
        if s.command == "info":
            return info.run()
        COMMANDS[s.command][0].run(s)
        return 0
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        wrong = first_line(error)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fastlora"):
            raise
        wrong = f'{first_line(error)}: pip install "fastlora-kernels[finetune]"'
    which = f"process {rank()}: " if rank() else ""
    print(f"{which}error: {wrong}", file=sys.stderr)
    return 2


def leave(code: int) -> None:
    """End this process."""
    # A group of gloo's, on a CPU, is left as it is: to free it can wait for ever for a thread that
    # waits for Python, and Python can abort as it ends (pytorch/pytorch#179291).
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_backend() == "gloo":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
