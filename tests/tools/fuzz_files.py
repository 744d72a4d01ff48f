# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing of everything that reads a file somebody else may have written.

python tests/tools/fuzz_files.py [--minutes 10] [TARGET ...]    # make fuzz

An escape is any exception but the documented ones, a model that a refused adapter has changed, or
an input that takes longer than a second. It ends the run; the input is kept in the folder it names.
"""

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

with atheris.instrument_imports(include=["fastlora"]):
    import tiny_models as tiny
    import torch
    from hostile_adapters import ATTACKS, CONFIG, SHAPES, WEIGHTS, config, weights

    import fastlora
    from fastlora.commands.data import read_examples
    from fastlora.commands.shared import UserError
    from fastlora.operator import measured
    from fastlora.peft import files
    from fastlora.peft.config import KNOWN


def adapter(name: str, folder: Path, data: bytes) -> None:
    """Load an adapter of which ``data`` is a file, or have it refused, the model as it was."""
    for file, content in ((CONFIG, config()), (WEIGHTS, weights()), (name, data)):
        (folder / file).write_bytes(content)
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


def hostile(name: str) -> list[bytes]:
    return [content[:MOST] for file, content, _ in ATTACKS if file == name]


def good_measurements() -> bytes:
    times = {"blocks": 1e-3, "triton": 2e-3}
    row = {"forward": times, "backward": times, "configs": {"shrink": {"block_m": 16}}}
    return json.dumps({str(measured.Problem(16, 64, 64, 16)): row}).encode()


# What takes an input, inputs to start from, and words of the format.
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


def fuzz(name: str, minutes: float, work: Path) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    files._PATTERN_SECONDS = 0.5  # what a regular expression may take; 10 for users
    (work / "corpus").mkdir()
    (work / "input").mkdir()
    take, seeds, words = TARGETS[name]
    for i, seed in enumerate([b"[" * 8000, *seeds]):
        (work / "corpus" / f"seed-{i}").write_bytes(seed)
    escaped = (json.dumps(word)[1:-1].replace("\\n", "\\x0a") for word in JSON + words)
    (work / "words").write_text("".join(f'"{word}"\n' for word in escaped), encoding="utf-8")
    limits = [f"-timeout={SECONDS}", f"-max_total_time={round(minutes * 60)}", f"-max_len={MOST}"]
    folders = [f"-dict={work / 'words'}", f"-artifact_prefix={work}/", str(work / "corpus")]
    options = [sys.argv[0], *limits, "-print_final_stats=1", *folders]
    atheris.Setup(options, functools.partial(take, work / "input"))
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("targets", nargs="*", choices=[*TARGETS, []], help="all where none is named")
    add("--minutes", type=float, default=10.0, help="for each target")
    add("--work", type=Path, help=argparse.SUPPRESS)  # of the process that fuzzes
    options = parser.parse_args()
    if options.work:
        fuzz(options.targets[0], options.minutes, options.work)
    escaped, memory = [], "/dev/shm" if os.path.isdir("/dev/shm") else None
    for name in options.targets or TARGETS:
        work = tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=memory)
        print(f"{name}: {options.minutes:g} min", flush=True)
        minutes = ["--minutes", str(options.minutes)]
        if subprocess.run([sys.executable, __file__, name, *minutes, "--work", work]).returncode:
            escaped.append(name)  # its folder stays, with the input
        else:
            shutil.rmtree(work, ignore_errors=True)
    print(f"escapes: {', '.join(escaped) or 'none'}")
    sys.exit(bool(escaped))


if __name__ == "__main__":
    main()
