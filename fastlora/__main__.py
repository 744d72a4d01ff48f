# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m fastlora finetune``, ``ranks``, ``tune`` and ``info``."""

from __future__ import annotations

import argparse
import re
import sys

from fastlora.commands import finetune, ranks, tune
from fastlora.commands.finetune import Settings
from fastlora.commands.processes import leave, rank


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    options = vars(_parser().parse_args(argv))
    command = options.pop("command")
    if command == "info":
        from fastlora.commands import info

        return info.main() or 0
    if "target_modules" in options:
        options["target_modules"] = _target_modules(options["target_modules"])
    try:
        if command == "tune":
            tune.run(**options)
        elif command == "ranks":
            search = {name: options.pop(name) for name in ("max_r", "gain", "seeds")}
            start = options.pop("target_modules", None)
            ranks.run(Settings(**options), start, **search)
        else:
            finetune.run(Settings(**options))
    except finetune.UserError as error:
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
    _add_finetune(commands)
    _add_ranks(commands)
    _add_tune(commands)
    return parser


def _add_finetune(commands) -> None:
    train = commands.add_parser(
        "finetune",
        help="fine-tune a language model on your own lines of text",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_training(train)
    add = train.add_argument
    add("--output", default=Settings.output, help="folder for the adapter, curve and metrics")
    add("--ask", help="a question to answer before and after")
    add("--r", type=int, default=Settings.r, help="rank")
    add(
        "--target-modules",
        nargs="+",
        default=[Settings.target_modules],
        metavar="NAME",
        help="layer names, one regular expression, or all-linear",
    )
    add("--seed", type=int, default=Settings.seed, help="decides order, split, start and dropout")


def _add_ranks(commands) -> None:
    search = commands.add_parser(
        "ranks",
        help="find the rank and the layers to fine-tune with, by short runs of finetune",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_training(search)
    add = search.add_argument
    add("--output", default="out/ranks", help="folder for the trials, the table and the picture")
    add("--max-r", type=int, default=64, help="ranks are 1, 2, 4, ... up to this one")
    add(
        "--gain",
        type=float,
        default=0.01,
        metavar="FRACTION",
        help="of held-out loss that twice the rank, or more layers, must take off; 0.01 is 1%%",
    )
    add(
        "--target-modules",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="layers to start with; by default the query and value projections of attention",
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[Settings.seed],
        help="each trial is trained once for each; with several, what a seed changes is no gain",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options that every fine-tuning has."""
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or id, or a folder with one .gguf")
    add("--data", required=True, help='JSONL: "prompt" and "response", or "text", on each line')
    add("--alpha", type=float, default=Settings.alpha, help="scaling is alpha / r")
    add("--dropout", type=float, default=Settings.dropout, help="on the adapters' input")
    add("--steps", type=int, default=Settings.steps, help="optimizer steps")
    add("--batch-size", type=int, default=Settings.batch_size, help="examples a step")
    add("--seq-len", type=int, default=Settings.seq_len, help="tokens kept of each example")
    add("--lr", type=float, default=Settings.lr, help="peak learning rate")
    add("--held-out", type=float, default=Settings.held_out, help="fraction never trained on")
    add("--dtype", choices=finetune.DTYPES, default=Settings.dtype, help="of the frozen model")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--save-every", type=int, default=Settings.save_every, help="steps between checkpoints")
    add("--restart", action="store_true", help="begin again, whatever --output holds")


def _add_tune(commands) -> None:
    tune = commands.add_parser(
        "tune",
        help="measure which implementation is fastest for a model's layers on this machine",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = tune.add_argument
    what = tune.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="Hugging Face folder or id, or a folder with one .gguf")
    what.add_argument("--shapes", nargs="+", metavar="NxK", help="outputs x inputs: 14336x4096")
    add("--target-modules", nargs="+", default=["all-linear"], metavar="NAME", help="of --model")
    add("--tokens", nargs="+", type=int, default=[512, 8192], help="tokens in a batch")
    add("--r", nargs="+", type=int, default=[16], help="ranks")
    add("--dropout", choices=("both", "on", "off"), default="both", help="training draws it")
    add("--dtype", choices=tune.DTYPES, default="bf16", help="of the frozen weights")
    add("--adapter-dtype", choices=tune.DTYPES, default="fp32", help="fp32 as in PEFT")
    add("--seconds", type=float, default=1.0, help="for each problem, beside its kernels")
    add("--device", help="default: cuda if there is one, else cpu")


def _target_modules(values: list[str]) -> str | tuple[str, ...]:
    if len(values) == 1 and (values[0] == "all-linear" or not re.fullmatch(r"\w+", values[0])):
        return values[0]
    return tuple(values)


if __name__ == "__main__":
    leave(main())
