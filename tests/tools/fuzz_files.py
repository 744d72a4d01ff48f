# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing of everything that reads a file somebody else may have written.

python tests/tools/fuzz_files.py [--minutes 10] [TARGET ...]    # make fuzz

An escape is any exception but the documented ones, a model that a refused adapter has changed, or
an input that takes longer than a second. It ends the run; the input is kept in the folder it names.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

SECONDS = 1  # for one input
MOST = 8192  # bytes of one
MEMORY = Path("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())
HOSTILE = Path(__file__).parent / "hostile"

with atheris.instrument_imports(include=["fastlora"]):
    import tiny_models as tiny
    import torch
    from hostile_adapters import CONFIG, SHAPES, WEIGHTS, config, weights

    import fastlora
    from fastlora.commands.data import read_examples
    from fastlora.commands.shared import UserError
    from fastlora.operator import measured
    from fastlora.peft import files
    from fastlora.peft.config import KNOWN


def adapter(name: str, folder: Path, data: bytes) -> None:
    """Load an adapter of which ``data`` is a file, or have it refused, the model as it was."""
    (folder / CONFIG).write_bytes(config())
    (folder / WEIGHTS).write_bytes(weights())
    (folder / name).write_bytes(data)
    before = tiny.bits(model := tiny.mlp())
    try:
        fastlora.load_adapter(model, folder)
    except (ValueError, TypeError) as error:
        if not tiny.same(before, tiny.bits(model)):
            raise AssertionError("a refused adapter has changed the model") from error


def measurements(folder: Path, data: bytes) -> None:
    path = folder / "cpu.json"
    path.write_bytes(data)
    try:
        found = measured._read(path)
    except Exception:  # `known` takes any for a file to warn of
        return
    for row in found.values():  # what is taken has to be whole
        row["configs"].get("shrink"), sum(row["forward"].values()), sum(row["backward"].values())


def jsonl(folder: Path, data: bytes) -> None:
    path = folder / "data.jsonl"
    path.write_bytes(data)
    try:
        found = read_examples(path)
    except UserError as error:
        assert str(path) in str(error)
        return
    for example in found:  # as a tokenizer takes it
        turns = [example] if isinstance(example, str) else [turn["content"] for turn in example]
        "".join(turns).encode()


def hostile(file: str) -> list[bytes]:
    return [path.read_bytes()[:MOST] for path in sorted(HOSTILE.glob(f"*/{file}"))]


def good_measurements() -> bytes:
    times = {"blocks": 1e-3, "triton": 2e-3}
    row = {"forward": times, "backward": times, "configs": {"shrink": {"block_m": 16}}}
    return json.dumps({str(measured.Problem(16, 64, 64, 16)): row}).encode()


# name: what takes an input, inputs to start from, and words of the format
TARGETS = {
    "config": (
        functools.partial(adapter, CONFIG),
        [config(), *hostile(CONFIG)],
        sorted(KNOWN),
    ),
    "weights": (
        functools.partial(adapter, WEIGHTS),
        [weights(), *hostile(WEIGHTS)],
        [*SHAPES, "F32", "BF16", "I64", "shape", "dtype", "data_offsets", "__metadata__"],
    ),
    "measurements": (
        measurements,
        [good_measurements()],
        ["forward", "backward", "configs", "blocks", "triton", "shrink", "block_m"],
    ),
    "jsonl": (
        jsonl,
        [b'{"prompt": "a", "response": "b"}\n\n{"text": "c"}\n', b"[[1, {}], null]"],
        ["prompt", "response", "text", "messages", "role", "content", "assistant", "\n"],
    ),
}
JSON = ['"', "{", "[", "]", "}", ":", ",", "null", "true", "NaN", "1e999", "-1", "\\ud800"]


def fuzz(name: str, minutes: float) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    files._PATTERN_SECONDS = 0.5  # what a regular expression may take; 10 for users
    work = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=MEMORY))
    (work / "corpus").mkdir()
    (work / "input").mkdir()
    take, seeds, words = TARGETS[name]
    for i, seed in enumerate([b"[" * 8000, *seeds]):
        (work / "corpus" / f"seed-{i}").write_bytes(seed)
    escaped = (json.dumps(word)[1:-1].replace("\\n", "\\x0a") for word in JSON + words)
    (work / "words").write_text("".join(f'"{word}"\n' for word in escaped), encoding="utf-8")
    options = [
        f"-dict={work / 'words'}",
        f"-timeout={SECONDS}",
        f"-artifact_prefix={work}/",
        f"-max_total_time={round(minutes * 60)}",
        f"-max_len={MOST}",
        "-print_final_stats=1",
    ]
    atheris.Setup(
        [sys.argv[0], *options, str(work / "corpus")], functools.partial(take, work / "input")
    )
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "targets", nargs="*", choices=[*TARGETS, []], help="all where none is named"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for each target")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        fuzz(options.targets[0], options.minutes)
    escaped = []
    for name in options.targets or TARGETS:
        command = [sys.executable, __file__, name, "--here", "--minutes", str(options.minutes)]
        print(f"{name}: {options.minutes:g} min", flush=True)
        if subprocess.run(command).returncode:
            escaped.append(name)  # its folder stays, with the input
            continue
        for work in MEMORY.glob(f"fuzz-{name}-*"):
            shutil.rmtree(work, ignore_errors=True)
    print(f"escapes: {', '.join(escaped) or 'none'}")
    sys.exit(bool(escaped))


if __name__ == "__main__":
    main()
