# SPDX-License-Identifier: Apache-2.0
"""The data of a fine-tuning run: lines of JSON as TRL's examples, and which are held out."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any

from fastlora.commands.shared import UserError

HELD_OUT_AT_MOST = 256
_EXPECTED = (
    '{"prompt": "…", "response": "…"}, {"messages": [{"role": "…", "content": "…"}, …]} with an '
    'answer of "assistant" to another role, or {"text": "…"}, each a text that is not empty'
)

# {"prompt": turns, "completion": [answer]}, or {"text": what is learnt whole}
Example = dict[str, Any]


def read_examples(path: str | Path) -> list[Example]:
    """Read a file's examples: one a line, of a conversation one for each answer.

    UserError names the line that is wrong.
    """
    examples: list[Example] = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        try:
            examples += _examples(json.loads(line)) if line.strip() else []
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            got = line[:60].decode(errors="replace")
            where = f"{path}, line {number}"
            raise UserError(f"{where}: expected {_EXPECTED}, got {got}") from error
        if len({"text" in example for example in (*examples[:1], *examples[-1:])}) > 1:
            raise UserError(f"{path}, line {number}: texts and conversations need a file each")
    if not examples:
        raise UserError(f"--data {path} holds no examples; expected one JSON object a line")
    return examples


def _examples(row: dict[str, Any]) -> list[Example]:
    """Return what a line holds; some error where it is not as expected."""
    keys = sorted(row.keys() & {"text", "messages", "prompt", "response"})
    if keys == ["text"]:
        return [{"text": _text(row["text"])}]
    if keys == ["prompt", "response"]:
        turns = [("user", row["prompt"]), ("assistant", row["response"])]
    else:
        (turns,) = (row[key] for key in keys)
        turns = [(turn["role"], turn["content"]) for turn in turns]
    talk = [{"role": _text(role), "content": _text(content)} for role, content in turns]
    answers = [i for i, turn in enumerate(talk) if turn["role"] == "assistant"]
    if answers[0] == 0:
        raise ValueError("an answer to nobody")
    return [{"prompt": talk[:i], "completion": [talk[i]]} for i in answers]


def _text(value: str) -> str:
    value.encode()  # JSON has \ud800, and no text has
    if not value.strip():
        raise ValueError("empty")
    return value


def split(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return (training, held-out) examples; what begins with one question is on the same side.

    The held-out side has at least one example, and stops growing at HELD_OUT_AT_MOST.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        asked = takewhile(lambda turn: turn["role"] != "assistant", example.get("prompt", []))
        groups.setdefault(example.get("text") or json.dumps(list(asked)), []).append(example)
    if len(groups) < 2:
        raise UserError("--data must hold two different prompts or texts: one will be held out")
    wanted = min(max(1, round(fraction * len(examples))), HELD_OUT_AT_MOST)
    shuffled, held_out = list(groups.values()), []
    Random(f"split {seed}").shuffle(shuffled)
    while len(held_out) < wanted and len(shuffled) > 1:
        held_out += shuffled.pop()
    return [example for group in shuffled for example in group], held_out
