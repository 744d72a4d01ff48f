# SPDX-License-Identifier: Apache-2.0
"""Lines of JSON into tokens and labels: what is learnt, what is held out, what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_chat
import transformers
from tokenizers import normalizers

from fastlora.__main__ import main
from fastlora.commands import data, trainer
from fastlora.commands.shared import UserError

ONE = [{"role": "user", "content": "what is one"}, {"role": "assistant", "content": "two"}]
MORE = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "the sum of two"}]
OTHER = {"prompt": "six", "response": "ten"}
TALK = "<user> what is one <eos> <assistant> two <eos>"
LAST = "<assistant> the sum of two <eos>"
# As Qwen3, it leaves out later what was said at first; and its history names nobody.
THINKS = (
    "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else 'ten' }} <eos> "
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
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
                (f"what is one <eos> ten <eos> what <eos> {LAST}", "the sum of two <eos>"),
            ],
        ),
        (
            *({"messages": ONE + MORE}, ""),
            [
                ("what is one two <eos>", "two <eos>"),
                ("what is one two <eos> what the sum of two <eos>", "the sum of two <eos>"),
            ],
        ),
        ({"text": "one two three"}, tiny_chat.CHAT, [("one two three <eos>", "two three <eos>")]),
        (
            {"text": "one two " * 9},
            "",
            [("one two " * 8 + "one", "two one " * 7 + "two one")],
        ),  # cut
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
    assert "no checkpoint is written yet" in capsys.readouterr().out
    assert sorted(pair for pair in found if "six" not in pair[0].split()[:2]) == sorted(expected)


@pytest.mark.parametrize(
    ("change", "begin", "expected"),
    [  # A newline ends a turn; where a text begins, a tokenizer may add something; one token joins.
        (normalizers.Replace("\n", " is "), " ", TALK.replace("<a", "is <a")),
        (normalizers.Prepend("ten "), " ", f"ten {TALK}".replace("<a", "ten <a")),
        (None, "", TALK),
    ],
)
def test_an_answer_is_what_generation_would_give(tiny, change, begin, expected):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.model)
    tokenizer.backend_tokenizer.normalizer = change
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<assistant>BEGIN' }}"
        "{{ m.content }} <eos>\n{% endfor %}{{ '<assistant>BEGIN' if add_generation_prompt }}"
    ).replace("BEGIN", begin)
    found = data.encode(tokenizer, {"prompt": ONE[:1], "completion": ONE[1:]})
    learnt = tokenizer.decode([label for label in found["labels"] if label != -100])
    assert (tokenizer.decode(found["input_ids"]), learnt) == (expected, "two <eos>")


def test_the_seed_decides_the_order(tiny, tmp_path, monkeypatch):
    made, halves = [], data.split(data.read_examples(tiny.data), 0.1, seed=0)

    def train(self, **_):
        made.append(next(iter(self.get_train_dataloader()))["input_ids"].tolist())
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "train", train)
    monkeypatch.setattr(data, "split", lambda *_: halves)
    own = {"model": tiny.model, "data": tiny.data, "output": tmp_path}
    for seed in (0, 1, 0):
        assert main(tiny_chat.command("finetune", seed=seed, **own)) == 130
    assert made[0] == made[2] != made[1]


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
    ("line", "problem"),
    [
        ('{"prompt": "a", "response": ', "Expecting value: line 1 column 29"),
        ('["a"]', "'list' object has no attribute"),
        ('["a"]\r\x1b[2J', "Extra data: line 1 column 7"),
        ('{"prompt": "a"}', "the keys ['prompt']"),
        ('{"a": 1}', "the keys []"),
        ('{"text": "a", "prompt": "b"}', "the keys ['prompt', 'text']"),
        (f'{{"prompt": {[ONE[0]]}}}'.replace("'", '"'), "the keys ['prompt']"),
        ('{"prompt": "a", "response": 3}', '"response" is 3'),
        ('{"prompt": "a", "response": " "}', "\"response\" is ' '"),
        (r'{"prompt": "\ud800", "response": "a"}', r"can't encode character '\ud800'"),
        ('{"messages": "a"}', "'str' object has no attribute"),
        ('{"messages": [{"role": "user"}]}', '"content" is None'),
        ('{"messages": [{"role": "user", "content": "a"}]}', 'no answer of "assistant", or one'),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "or one to nobody"),
        ('{"messages": []}', 'no answer of "assistant"'),
        (b'{"text": "\xff"}', "can't decode byte 0xff"),
        ("[" * 100_000, ""),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = tmp_path / "bad.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"prompt": "one", "response": "two"}\n\n' + line)
    with pytest.raises(UserError) as error:
        data.read_examples(path)
    said = str(error.value)
    got = f"got {line[:60].decode(errors='replace')!r}: "
    assert said.startswith(f'{path}, line 3: expected {{"prompt": "…", ') and len(said) < 450
    assert problem in said.partition(got)[2] and said.isprintable()
    path.write_text('{"prompt": "one", "response": "two"}\n{"text": "one"}')
    with pytest.raises(UserError, match="line 2: texts and conversations need a file each"):
        data.read_examples(path)
