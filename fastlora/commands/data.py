# SPDX-License-Identifier: Apache-2.0
"""The data of a fine-tuning run: lines of JSON as examples, which are held out, and tokens."""

import json
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any

from fastlora.commands.shared import UserError, first_line

HELD_OUT_AT_MOST = 256
IGNORED = -100  # the label of a token that has no part in the loss, and is cross_entropy's
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
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"--data {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            examples += _examples(json.loads(line)) if line.strip() else []
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            got = f"{line[:60].decode(errors='replace')!r}: {first_line(error)}"
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
        return [{"text": _text(row, "text")}]
    if keys == ["prompt", "response"]:
        roles = {"prompt": "user", "response": "assistant"}
        talk = [{"role": role, "content": _text(row, key)} for key, role in roles.items()]
    elif keys == ["messages"]:
        talk = [{key: _text(turn, key) for key in ("role", "content")} for turn in row["messages"]]
    else:
        raise ValueError(f"the keys {keys}")
    answers = [i for i, turn in enumerate(talk) if turn["role"] == "assistant"]
    if not answers or answers[0] == 0:
        raise ValueError('no answer of "assistant", or one to nobody')
    return [{"prompt": talk[:i], "completion": [talk[i]]} for i in answers]


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'"{key}" is {value!r:.60}')
    value.encode()  # JSON has \ud800, and no text has
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


def encode(tokenizer, example: Example) -> dict[str, list[int]]:
    """Return an example's tokens, and as labels those of the text, or of the answer and its end.

    An answer follows what generation begins with, however the template writes it in a history.
    """
    end = tokenizer.eos_token or ""
    if "text" in example:
        start = 1  # the first token is predicted from nothing
        ids = tokenizer(example["text"].removesuffix(end) + end)["input_ids"]
    else:
        talk = example["prompt"] + example["completion"]
        asked = tokenizer.apply_chat_template(talk[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(talk, tokenize=False)
        # Generation stops at the end-of-turn token: the newline after it is not learnt.
        answer = whole[len(asked) :].rstrip()
        if not whole.startswith(asked):
            answer = talk[-1]["content"] + end
        texts = [asked, answer, asked + answer]
        prompt, answer, ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        start = len(prompt)
        if ids[:start] != prompt:  # tokens over the joint, which generation never has
            ids = prompt + answer
    return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}
