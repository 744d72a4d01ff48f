# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing of everything that reads a file somebody else may have written.

python tests/tools/fuzz_files.py [--minutes 10] [TARGET ...]    # make fuzz

Targets: the adapter's config, its weights, the tuner's measurements, and JSONL data. An escape is
any exception but the documented ones, a model that a refused adapter has changed, or an input
that takes longer than a second. It ends the run, and the input is kept in the folder it names.
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

with atheris.instrument_imports(include=["fastlora"]):
    import tiny_models as tiny
    import torch

    import fastlora
    from fastlora import LoRAConfig
    from fastlora.commands.finetune_data import UserError, read_examples
    from fastlora.operator import measured
    from fastlora.operator.measured import Timing
    from fastlora.operator.plans import Problem
    from fastlora.peft import adapters

CPU = torch.device("cpu")


def good_adapter(folder: Path) -> None:
    """Write an adapter that loads into `tiny.mlp`."""
    model = tiny.mlp()
    config = LoRAConfig(r=3, target_modules=["2", "head"], modules_to_save=["1"])
    fastlora.inject(model, config)
    fastlora.save_adapter(tiny.train_a_little(model), folder)


def load(model: torch.nn.Module, folder: Path) -> None:
    """Load an adapter or have it refused, the model then as it was."""
    before = tiny.bits(model)
    try:
        fastlora.load_adapter(model, folder)
    except (ValueError, TypeError) as error:
        if not tiny.same(before, tiny.bits(model)):
            raise AssertionError("a refused adapter has changed the model") from error


def config(folder: Path, data: bytes) -> None:
    (folder / adapters.CONFIG_FILE).write_bytes(data)
    load(tiny.mlp(), folder)


def weights(folder: Path, data: bytes) -> None:
    (folder / adapters.WEIGHTS_FILE).write_bytes(data)
    load(tiny.mlp(), folder)


def measurements(folder: Path, data: bytes) -> None:
    path = folder / "cpu.json"
    path.write_bytes(data)
    found = measured._read(path, CPU)
    if found is not None:  # what is taken has to be whole
        for problem, timings in found.items():
            assert timings.keys() == set(measured.OPS)
            problem.bucketed(), str(problem)


def jsonl(folder: Path, data: bytes) -> None:
    path = folder / "data.jsonl"
    path.write_bytes(data)
    try:
        found = read_examples(path)
    except UserError as error:
        assert str(path) in str(error)
        return
    for example in found:  # as a tokenizer takes it
        ((example.prompt or "") + example.response).encode()


TARGETS = {"config": config, "weights": weights, "measurements": measurements, "jsonl": jsonl}


def seeds(name: str, folder: Path) -> list[bytes]:
    """Return inputs to start from: good ones, and for adapters the hostile ones of the suite."""
    good_adapter(folder)
    deep = b"[" * 8000
    if name in ("config", "weights"):
        file = {"config": adapters.CONFIG_FILE, "weights": adapters.WEIGHTS_FILE}[name]
        hostile = Path(__file__).parent / "hostile"
        paths = (folder / file, *sorted(hostile.glob(f"*/{file}")))
        return [deep, *(path.read_bytes()[:MOST] for path in paths)]
    if name == "measurements":
        problem = Problem(16, 64, 64, 16, others=((32, 16), (32, 0)))
        timing = Timing({"blocks": 1e-3, "triton": 2e-3}, {})
        known = {problem: dict.fromkeys(measured.OPS, timing)}
        return [deep, json.dumps(measured._to_json(known, CPU)).encode()]
    return [deep, b'{"prompt": "a", "response": "b"}\n\n{"text": "c"}\n', b"[[1, {}], null]"]


def words(name: str) -> str:
    """Return libFuzzer's dictionary for a target: keys and values of the format."""
    found = ['"', "{", "[", "]", "}", ":", ",", "null", "true", "NaN", "1e999", "-1", "\\ud800"]
    if name == "config":
        found += LoRAConfig(target_modules=["2"]).to_dict()
    if name == "weights":
        found += ["F32", "BF16", "I64", "shape", "dtype", "data_offsets", "__metadata__"]
        found += [f"{adapters.PREFIX}{n}.lora_{m}.weight" for n in ("2", "head") for m in "AB"]
    if name == "measurements":
        found += [*Problem._fields, *measured.OPS, "seconds", "configs", "blocks", "bfloat16"]
    if name == "jsonl":
        found += ["prompt", "response", "text", "\n"]
    escaped = (
        word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\x0a") for word in found
    )
    return "".join(f'"{word}"\n' for word in escaped)


def fuzz(name: str, minutes: float) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    adapters._PATTERN_SECONDS = 0.5  # what a regular expression may take; 10 for users
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    work = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=memory))
    corpus, folder = work / "corpus", work / "input"
    for path in (corpus, folder):
        path.mkdir()
    for i, seed in enumerate(seeds(name, folder)):
        (corpus / f"seed-{i}").write_bytes(seed)
    (work / "words").write_text(words(name), encoding="utf-8")
    options = [f"-dict={work / 'words'}", f"-timeout={SECONDS}", f"-artifact_prefix={work}/"]
    options += [
        f"-max_total_time={round(minutes * 60)}",
        f"-max_len={MOST}",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], functools.partial(TARGETS[name], folder))
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
    escaped, memory = [], Path("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())
    for name in options.targets or TARGETS:
        command = [sys.executable, __file__, name, "--here", "--minutes", str(options.minutes)]
        print(f"{name}: {options.minutes:g} min", flush=True)
        if subprocess.run(command).returncode:
            escaped.append(name)  # its folder stays, with the input
            continue
        for work in memory.glob(f"fuzz-{name}-*"):
            shutil.rmtree(work, ignore_errors=True)
    print(f"escapes: {', '.join(escaped) or 'none'}")
    sys.exit(bool(escaped))


if __name__ == "__main__":
    main()
