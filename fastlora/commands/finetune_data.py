# SPDX-License-Identifier: Apache-2.0
"""The data of a fine-tuning run: JSONL lines into token batches, in an order the step decides."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # the label of a token that has no part in the loss


class UserError(Exception):
    """Something the user can put right; the command line shows it as one line."""


class Example(NamedTuple):
    """A line of the data: a response to a prompt, or a text of its own (``prompt`` is None)."""

    prompt: str | None
    response: str


class Encoded(NamedTuple):
    """An example as tokens: ``ids`` and ``labels`` are int64 [T]."""

    ids: Tensor
    labels: Tensor


def read_examples(path: str | Path) -> list[Example]:
    """Read one example a line; blank lines are skipped. UserError names the line that is wrong."""
    examples = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    examples.append(_parse(line, f"{path}, line {number}"))
    except OSError as error:
        raise UserError(f"--data {path}: {error.strerror}") from error
    if not examples:
        raise UserError(f"--data {path} holds no examples; expected one JSON object a line")
    return examples


def _parse(line: bytes, where: str) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply") from error
    expected = 'expected {"prompt": "…", "response": "…"} or {"text": "…"}'
    if not isinstance(row, dict):
        raise UserError(f"{where}: got a {type(row).__name__}; {expected}")
    keys = ("text",) if "text" in row else ("prompt", "response")
    if keys == ("text",) and ("prompt" in row or "response" in row):
        raise UserError(f'{where}: "text" beside "prompt" or "response"; {expected}')
    for key in keys:
        if key not in row:
            raise UserError(f'{where}: no "{key}"; {expected}')
        if not isinstance(row[key], str):
            raise UserError(f'{where}: "{key}" must be a string, got {type(row[key]).__name__}')
        if not row[key].strip():
            raise UserError(f'{where}: "{key}" is empty')
        try:
            row[key].encode()
        except UnicodeEncodeError as error:  # JSON has \ud800, and no text has
            raise UserError(f'{where}: "{key}" is not Unicode text: {error.reason}') from error
    return Example(row.get("prompt"), row[keys[-1]])


def split(
    examples: list[Example], fraction: float, seed: int, at_most: int
) -> tuple[list[Example], list[Example]]:
    """Return (training, held-out) examples; all the answers to one prompt are on the same side.

    The held-out side has at least one example, and stops growing at ``at_most``.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.prompt or example.response, []).append(example)
    if len(groups) < 2:
        raise UserError("--data must hold two different prompts or texts: one will be held out")
    wanted = min(max(1, round(fraction * len(examples))), at_most)
    keys = list(groups)
    random.Random(f"split {seed}").shuffle(keys)
    held_out: list[Example] = []
    while len(held_out) < wanted and len(groups) > 1:
        held_out += groups.pop(keys.pop())
    return [example for group in groups.values() for example in group], held_out


def prompt_text(tokenizer, prompt: str) -> str:
    """Return what the model reads before it answers: the chat template's, or prompt and newline."""
    if not tokenizer.chat_template:
        return f"{prompt}\n"
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    # A chat template writes its own special tokens.
    special = not tokenizer.chat_template
    return tokenizer(prompt_text(tokenizer, prompt), add_special_tokens=special)["input_ids"]


def encode(tokenizer, example: Example, seq_len: int) -> Encoded | None:
    """Tokenize ``example``, cut after ``seq_len`` tokens; None when nothing is left to learn.

    Labels are the tokens themselves from the response on, and IGNORED before it.
    """
    if example.prompt is None:
        ids = tokenizer(example.response)["input_ids"] + _end(tokenizer)
        start = 0
    else:
        ids = prompt_ids(tokenizer, example.prompt)
        start = len(ids)
        ids = ids + _response_ids(tokenizer, example)
    ids = torch.tensor(ids[:seq_len])
    labels = ids.clone()
    labels[:start] = IGNORED
    # The first token is predicted from nothing, so it is never a target.
    return Encoded(ids, labels) if (labels[1:] != IGNORED).any() else None


def _response_ids(tokenizer, example: Example) -> list[int]:
    if tokenizer.chat_template:
        turns = [
            {"role": "user", "content": example.prompt},
            {"role": "assistant", "content": example.response},
        ]
        chat = tokenizer.apply_chat_template(turns, tokenize=False)
        before = prompt_text(tokenizer, example.prompt)
        if chat.startswith(before):
            # Generation stops at the end-of-turn token: the newline after it is not learnt.
            answer = chat[len(before) :].rstrip()
            return tokenizer(answer, add_special_tokens=False)["input_ids"]
    return tokenizer(example.response, add_special_tokens=False)["input_ids"] + _end(tokenizer)


def _end(tokenizer) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


@functools.lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"epoch {seed} {epoch}").sample(range(count), count)


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Return which of ``count`` examples ``step`` trains on; every epoch is shuffled anew."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_shuffled(count, seed, p // count)[p % count] for p in positions]


def step_seed(seed: int, step: int, process: int) -> int:
    """Return what torch's generators start a step with, in one of several processes."""
    return random.Random(f"step {seed} {step} {process}").getrandbits(63)


def collate(batch: list[Encoded], pad_id: int) -> dict[str, Tensor]:
    """Pad a batch on the right: ``input_ids``, ``attention_mask`` and ``labels``, int64 [B, T]."""
    pad = functools.partial(pad_sequence, batch_first=True)
    return {
        "input_ids": pad([e.ids for e in batch], padding_value=pad_id),
        "attention_mask": pad([torch.ones_like(e.ids) for e in batch]),
        "labels": pad([e.labels for e in batch], padding_value=IGNORED),
    }
