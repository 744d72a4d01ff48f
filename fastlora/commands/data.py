# SPDX-License-Identifier: Apache-2.0
"""The data of a fine-tuning run: JSONL lines into tokens and labels, and the order they come in."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from random import Random

from fastlora.commands.shared import UserError, first_line

IGNORED = -100  # the label of a token that has no part in the loss
_EXPECTED = 'expected {"prompt": "…", "response": "…"}, {"messages": […]} or {"text": "…"}'
_ROLES = {"prompt": "user", "response": "assistant"}

Messages = list[dict[str, str]]
Example = Messages | str  # a talk, whose answers are learnt, or a text that is learnt whole
Encoded = dict[str, list[int]]  # input_ids and labels


def read_examples(path: str | Path) -> list[Example]:
    """Read one example a line; blank lines are skipped. UserError names the line that is wrong."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"--data {path}: {error.strerror}") from error
    numbered = [(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--data {path} holds no examples; expected one JSON object a line")
    return [_parse(*each) for each in numbered]


def _parse(line: bytes, where: str) -> Example:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {first_line(error)}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: got a {type(row).__name__}; {_EXPECTED}")
    keys = sorted({"text", "messages", *_ROLES} & row.keys())
    if keys == ["text"]:
        return _text(row, "text", where)
    if keys == list(_ROLES):
        return [{"role": _ROLES[key], "content": _text(row, key, where)} for key in keys]
    if keys != ["messages"]:
        raise UserError(f"{where}: got {' and '.join(keys) or 'none of the keys'}; {_EXPECTED}")
    turns = row["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f'{where}: "messages" must be a list of {{"role": "…", "content": "…"}}')
    talk = [{key: _text(turn, key, where) for key in ("role", "content")} for turn in turns]
    roles = [turn["role"] for turn in talk]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        raise UserError(f'{where}: "messages" must hold an answer of "assistant" to another role')
    return talk


def _text(row: dict, key: str, where: str) -> str:
    value = row.get(key)
    with contextlib.suppress(UnicodeEncodeError):  # JSON has \ud800, and no text has
        if isinstance(value, str) and value.strip() and value.encode():
            return value
    raise UserError(f'{where}: "{key}" must be a text that is not empty, got {value!r:.60}')


def split(
    examples: list[Example], fraction: float, seed: int, at_most: int
) -> tuple[list[Example], list[Example]]:
    """Return (training, held-out) examples; all the answers to one prompt are on the same side.

    The held-out side has at least one example, and stops growing at ``at_most``.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        asked = example
        if not isinstance(example, str):
            asked = json.dumps(example[: [t["role"] for t in example].index("assistant")])
        groups.setdefault(asked, []).append(example)
    if len(groups) < 2:
        raise UserError("--data must hold two different prompts or texts: one will be held out")
    wanted = min(max(1, round(fraction * len(examples))), at_most)
    keys = list(groups)
    Random(f"split {seed}").shuffle(keys)
    held_out: list[Example] = []
    while len(held_out) < wanted and len(groups) > 1:
        held_out += groups.pop(keys.pop())
    return [example for group in groups.values() for example in group], held_out


def order(count: int, length: int, seed: int) -> list[int]:
    """Return which of ``count`` examples come, ``length`` in all; every epoch is shuffled anew."""
    epochs = range(-(-length // count))
    shuffled = (Random(f"epoch {seed} {e}").sample(range(count), count) for e in epochs)
    return [index for epoch in shuffled for index in epoch][:length]


def encode(tokenizer, example: Example, seq_len: int) -> Encoded | None:
    """Tokenize ``example``, cut after ``seq_len`` tokens; None when nothing is left to learn.

    Labels are the tokens themselves where an answer or a text is learnt, and IGNORED elsewhere.
    """
    ids: list[int] = []
    labels: list[int] = []
    whole = isinstance(example, str)
    template = tokenizer.chat_template and not whole  # which writes special tokens of its own
    for text, learnt in [(example, True)] if whole else _parts(tokenizer, example):
        part = tokenizer(text, add_special_tokens=not template and not ids)["input_ids"]
        if learnt and not template and tokenizer.eos_token_id is not None:
            part.append(tokenizer.eos_token_id)
        ids += part
        labels += part if learnt else [IGNORED] * len(part)
    # The first token is predicted from nothing, so it is never a target.
    labels = [IGNORED, *labels[1:seq_len]]
    return {"input_ids": ids[:seq_len], "labels": labels} if set(labels) != {IGNORED} else None


def prompt_ids(tokenizer, question: str) -> list[int]:
    """Return the tokens that the model reads before it answers."""
    text = _chat(tokenizer, [{"role": "user", "content": question}], True)
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]


def _parts(tokenizer, talk: Messages) -> list[tuple[str, bool]]:
    """Return a talk cut where answers begin and end, and whether a part is an answer.

    No template has to mark its answers: they are what it adds to the prompt that it writes.
    """
    parts: list[tuple[str, bool]] = []
    done = ""
    for i in (i for i, turn in enumerate(talk) if turn["role"] == "assistant"):
        before, after = _chat(tokenizer, talk[:i], True), _chat(tokenizer, talk[: i + 1], False)
        # Generation stops at the end-of-turn token: the newline after it is not learnt.
        answer = after[len(before) :].rstrip()
        if not after.startswith(before):
            answer = talk[i]["content"] + (tokenizer.eos_token or "")
        if not before.startswith(done):  # earlier answers are written otherwise now, as by Qwen3
            parts, done = [], ""  # and those that follow are learnt
        parts += [(before[len(done) :], False), (answer, True)]
        done = before + answer
    return parts


def _chat(tokenizer, talk: Messages, answer_follows: bool) -> str:
    """Return the chat template's text, which has its own special tokens; else prompt and answer."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template and len(talk) <= 2:
        return "\n".join(turn["content"] for turn in talk) + "\n" * answer_follows
    try:
        return tokenizer.apply_chat_template(
            talk, tokenize=False, add_generation_prompt=answer_follows
        )
    except (TemplateError, ValueError) as error:  # ValueError: there is none
        raise UserError(f"the model's chat template: {first_line(error)}") from error
