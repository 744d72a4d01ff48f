# SPDX-License-Identifier: Apache-2.0
"""Lines of JSON into tokens and labels: what is learnt, what is held out, what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_chat

from fastlora.__main__ import main
from fastlora.commands import data, trainer
from fastlora.commands.shared import UserError

ONE = [{"role": "user", "content": "what is one"}, {"role": "assistant", "content": "two"}]
MORE = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "the sum of two"}]
OTHER = {"prompt": "six", "response": "ten"}
TALK = "<user> what is one <eos> <assistant> two <eos>"
LAST = "<assistant> the sum of two <eos>"
# As Qwen3, it leaves out later what was said at first.
THINKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant> {% endif %}"
    "{{ m.content if loop.last or m.role == 'user' else 'ten' }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
REFUSES = "{{ raise_exception('roles must alternate') }}"


@pytest.mark.parametrize(
    ("row", "template", "expected"),
    [
        ({"prompt": "what is one", "response": "two"}, tiny_chat.CHAT, [(TALK, "two <eos>")]),
        (
            *({"messages": [*ONE, *MORE, MORE[0]]}, tiny_chat.CHAT),
            [(TALK, "two <eos>"), (f"{TALK} <user> what <eos> {LAST}", "the sum of two <eos>")],
        ),
        (
            *({"messages": ONE + MORE}, THINKS),
            [
                ("what is one <eos> <assistant> two <eos>", "two <eos>"),
                (
                    f"what is one <eos> <assistant> ten <eos> what <eos> {LAST}",
                    "the sum of two <eos>",
                ),
            ],
        ),
        (
            *({"messages": ONE + MORE}, ""),
            [
                ("what is one two <eos>", "two <eos>"),
                ("what is one two <eos> what the sum of two <eos>", "the sum of two <eos>"),
            ],
        ),
        ({"text": "one two three"}, tiny_chat.CHAT, [("one two three <eos>",) * 2]),
        ({"text": "one two " * 9}, "", [("one two " * 8 + "one",) * 2]),  # cut at the length
        ({"messages": ONE}, REFUSES, "the model's chat template: roles must alternate"),
    ],
)
def test_answers_and_whole_texts_are_learnt(
    tiny, tmp_path, monkeypatch, capsys, row, template, expected
):
    made, path, model = [], tmp_path / "data.jsonl", tmp_path / "model"
    shutil.copytree(tiny.model, model)
    (model / "chat_template.jinja").write_text(template)

    def train(self, **_):
        made.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "train", train)
    other = {"text": "six"} if "text" in row else OTHER
    path.write_text("\n".join(map(json.dumps, [row, other])))
    own = {"model": model, "data": path, "output": tmp_path, "seq-len": 17, "held-out": 0.5}
    code = main(tiny_chat.command("finetune", **own))
    if isinstance(expected, str):
        assert code == 2 and f"error: {expected}" in capsys.readouterr().err
        return
    decode, found = made[0].processing_class.decode, []
    for example in [*made[0].train_dataset, *made[0].eval_dataset]:
        ids, labels = example["input_ids"], example["labels"]
        assert all(label in (i, -100) for i, label in zip(ids, labels, strict=True))
        found.append((decode(ids), decode([label for label in labels if label != -100])))
    assert sorted(pair for pair in found if "six" not in pair[0].split()[:2]) == sorted(expected)


def test_answers_to_one_prompt_stay_on_one_side():
    """And the answers of one conversation, of which one holds the other."""
    examples = [{"text": f"q{i // 3}"} for i in range(30)]
    for i in range(15):
        asked = [{"role": "user", "content": f"q{i}"}]
        examples += [{"prompt": asked}, {"prompt": [*asked, ONE[1], *MORE]}]
    training, held_out = data.split(examples, 0.1, seed=0)
    assert 6 <= len(held_out) <= 8 and len(training) + len(held_out) == 60
    for example in held_out:
        own = example.get("text") or example["prompt"][0]
        assert not any(own == (e.get("text") or e["prompt"][0]) for e in training)
    assert data.split(examples, 0.1, seed=1)[1] != held_out == data.split(examples, 0.1, 0)[1]
    assert len(data.split([{"text": str(i)} for i in range(3000)], 0.5, 0)[1]) == 256


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a", "response": ',
        '["a"]',
        '{"prompt": "a"}',
        '{"a": 1}',
        '{"text": "a", "prompt": "b"}',
        '{"prompt": "a", "response": 3}',
        '{"prompt": "a", "response": " "}',
        r'{"prompt": "\ud800", "response": "a"}',
        '{"messages": "a"}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "assistant", "content": "a"}]}',
        '{"messages": []}',
        b'{"text": "\xff"}',
        "[" * 100_000,
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"prompt": "one", "response": "two"}\n\n' + line)
    with pytest.raises(UserError) as error:
        data.read_examples(path)
    said = str(error.value)
    assert said.startswith(f'{path}, line 3: expected {{"prompt": "…", ') and len(said) < 400
    assert said.endswith(f"got {line[:60].decode(errors='replace')}")
    path.write_text('{"prompt": "one", "response": "two"}\n{"text": "one"}')
    with pytest.raises(UserError, match="line 2: texts and conversations need a file each"):
        data.read_examples(path)
