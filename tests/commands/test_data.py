# SPDX-License-Identifier: Apache-2.0
"""Lines of JSON into tokens and labels: what is learnt, what is held out, what is refused."""

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
ASKED, TWO = "<user> what is one <eos> <assistant>", "two <eos>"
SUM = "the sum of two <eos>"
# As Qwen3, it leaves out later what was said at first; and its history names nobody.
THINKS = (
    "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else 'ten' }} <eos> "
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
LATER = "ten <eos> what <eos> "
REFUSES = "{{ raise_exception('roles must alternate') }}"


@pytest.fixture
def made(monkeypatch):
    """The trainers of runs that stop where training begins."""

    def train(self, **_):
        found.append(self)
        raise KeyboardInterrupt

    found = []
    monkeypatch.setattr(trainer.Trainer, "train", train)
    return found


@pytest.mark.parametrize(
    ("row", "template", "expected"),
    [  # for each example what comes first, and what is learnt
        ({"prompt": "what is one", "response": "two"}, tiny_chat.CHAT, [(ASKED, TWO)]),
        (
            *({"messages": [*ONE, *MORE, MORE[0]]}, tiny_chat.CHAT),
            [(ASKED, TWO), (f"{ASKED} {TWO} <user> what <eos> <assistant>", SUM)],
        ),
        (
            *({"messages": ONE + MORE}, THINKS),
            [(f"what is one <eos> {b}<assistant>", w) for b, w in (("", TWO), (LATER, SUM))],
        ),
        ({"messages": ONE + MORE}, "", [("what is one", TWO), (f"what is one {TWO} what", SUM)]),
        ({"text": "one two three"}, tiny_chat.CHAT, [("one", "two three <eos>")]),
        ({"text": "one two " * 9}, "", [("one", "two one " * 7 + "two one")]),  # cut at the length
        ({"messages": ONE}, REFUSES, "the model's chat template: roles must alternate"),
    ],
)
def test_answers_and_whole_texts_are_learnt(tiny, tmp_path, made, capsys, row, template, expected):
    path, model = tmp_path / "data.jsonl", tmp_path / "model"
    shutil.copytree(tiny.model, model)
    (model / "chat_template.jinja").write_text(template)
    other = {"text": "six"} if "text" in row else OTHER
    path.write_text("\n".join(map(json.dumps, [row, other])))
    own = {"model": model, "data": path, "output": tmp_path, "seq-len": 17, "held-out": 0.5}
    code, said = main(tiny_chat.command("finetune", **own)), capsys.readouterr()
    if isinstance(expected, str):
        assert code == 2 and f"error: {expected}" in said.err
        return
    assert code == 130 and "no checkpoint is written yet" in said.out
    examples = [*made[0].train_dataset, *made[0].eval_dataset]
    found = [parts(made[0].processing_class, example) for example in examples]
    assert sorted(pair for pair in found if "six" not in pair[0].split()[:2]) == sorted(expected)


def parts(tokenizer, example):
    """Return what comes first, and what is learnt."""
    ids, labels = example["input_ids"], example["labels"]
    first = labels.count(-100)
    assert labels == [-100] * first + ids[first:]
    return tokenizer.decode(ids[:first]), tokenizer.decode(ids[first:])


@pytest.mark.parametrize(
    ("normalizer", "template", "asked"),
    [  # A newline ends a turn; a tokenizer adds something where a text begins; a token would join.
        (
            *(normalizers.Replace("\n", " is "), tiny_chat.CHAT.replace("<eos> ", "<eos>\n")),
            ASKED.replace("<a", "is <a"),
        ),
        (normalizers.Prepend("ten "), tiny_chat.CHAT, f"ten {ASKED}".replace("<a", "ten <a")),
        (None, tiny_chat.CHAT.replace("> ", ">"), ASKED.replace("<user> what", "<unk>")),
    ],
)
def test_an_answer_is_what_generation_would_give(tiny, normalizer, template, asked):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.model, chat_template=template)
    tokenizer.backend_tokenizer.normalizer = normalizer
    found = data.encode(tokenizer, {"prompt": ONE[:1], "completion": ONE[1:]})
    assert parts(tokenizer, found) == (asked, TWO)


def test_the_seed_decides_the_order(tiny, tmp_path, made, monkeypatch):
    halves = data.split(data.read_examples(tiny.data), 0.1, seed=0)
    monkeypatch.setattr(data, "split", lambda *_: halves)
    own = {"model": tiny.model, "data": tiny.data, "output": tmp_path}
    for seed in (0, 1, 0):
        assert main(tiny_chat.command("finetune", seed=seed, **own)) == 130
    zero, one, again = (next(iter(t.get_train_dataloader()))["input_ids"].tolist() for t in made)
    assert zero == again != one


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
        (f'{{"prompt": {ONE}}}'.replace("'", '"'), "the keys ['prompt']"),
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
