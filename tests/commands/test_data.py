# SPDX-License-Identifier: Apache-2.0
"""Lines of text into tokens and labels: what is learnt, what is held out, in which order."""

from __future__ import annotations

import pytest
import transformers

from fastlora.commands import data
from fastlora.commands.shared import UserError

ASKED = [{"role": "user", "content": "what is one"}, {"role": "assistant", "content": "two"}]
AGAIN = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "the sum of two"}]


@pytest.fixture
def tokenizer(tiny):
    return transformers.AutoTokenizer.from_pretrained(tiny.model)


def learnt(tokenizer, example, seq_len=100):
    """Return what an example becomes, and its tokens that are learnt."""
    encoded = data.encode(tokenizer, example, seq_len)
    ids, labels = encoded["input_ids"], encoded["labels"]
    assert len(ids) == len(labels)
    assert all(label in (token, data.IGNORED) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode(ids), tokenizer.decode([x for x in labels if x != data.IGNORED])


def test_only_answers_are_learnt(tokenizer):
    one = "<user> what is one <eos> <assistant> two <eos>"
    assert learnt(tokenizer, ASKED) == (one, "two <eos>")
    two = f"{one} <user> what <eos> <assistant> the sum of two <eos>"
    assert learnt(tokenizer, ASKED + AGAIN) == (two, "two <eos> the sum of two <eos>")
    assert learnt(tokenizer, [*ASKED, AGAIN[0]]) == (one, "two <eos>")


def test_an_answer_that_a_template_writes_otherwise_later_is_context(tokenizer):
    """As by Qwen3, which leaves out what was thought."""
    last = "{% set last = loop.last %}{% if m.role == 'user' or loop.last %}{{ m.content }}"
    tokenizer.chat_template = (
        "{% for m in messages %}" + last + "{% else %}ten{% endif %} <eos> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    _, answers = learnt(tokenizer, ASKED + AGAIN)
    assert answers == "the sum of two <eos>"


def test_without_a_chat_template_prompt_and_newline_come_first(tokenizer):
    """Of a talk of two turns; a longer one is refused, as is what a template refuses."""
    tokenizer.chat_template = None
    assert learnt(tokenizer, ASKED) == ("what is one two <eos>", "two <eos>")
    with pytest.raises(UserError, match="the model's chat template: "):
        data.encode(tokenizer, ASKED + AGAIN, 100)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"^the model's chat template: roles must alternate$"):
        data.encode(tokenizer, ASKED, 100)


def test_a_text_is_learnt_whole_and_cut_at_the_length(tokenizer):
    """But for its first token, which nothing predicts."""
    assert learnt(tokenizer, "one two three") == ("one two three <eos>", "two three <eos>")
    assert learnt(tokenizer, "one two three four", 3) == ("one two three", "two three")
    assert data.encode(tokenizer, ASKED, 6) is None


def test_the_order_is_a_function_of_the_seed():
    flat = data.order(10, 25, seed=1)
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10))
    assert flat[:10] != flat[10:20] and len(flat) == 25
    assert data.order(10, 12, seed=1) == flat[:12] != data.order(10, 12, seed=2)


@pytest.mark.parametrize("talk", [False, True])
def test_answers_to_one_prompt_stay_on_one_side(talk):
    examples = [f"q{i // 3}" for i in range(60)]
    if talk:
        asked = [[{"role": "user", "content": text}] for text in examples]
        examples = [[*one, ASKED[1], *AGAIN] for one in asked]
    training, held_out = data.split(examples, 0.1, seed=0, at_most=256)
    assert len(held_out) == 6 and len(training) == 54
    assert not any(example in held_out for example in training)
    assert len(data.split(examples, 0.5, seed=0, at_most=3)[1]) == 3


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a", "response": ', "not JSON"),
        ('["a"]', "got a list; expected"),
        ('{"prompt": "a"}', "got prompt; expected"),
        ('{"a": 1}', "got none of the keys; expected"),
        ('{"text": "a", "prompt": "b"}', "got prompt and text; expected"),
        ('{"prompt": "a", "response": 3}', '"response" must be a text that is not empty, got 3'),
        ('{"prompt": "a", "response": " "}', "got ' '"),
        (r'{"prompt": "\ud800", "response": "a"}', r"got '\ud800'"),
        ('{"messages": "a"}', '"messages" must be a list of {"role": "…", "content": "…"}'),
        ('{"messages": [{"role": "user"}]}', '"content" must be a text that is not empty, got'),
        ('{"messages": [{"role": "user", "content": "a"}]}', 'must hold an answer of "assistant"'),
        ('{"messages": []}', 'must hold an answer of "assistant"'),
        (b'{"text": "\xff"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + (line.encode() if isinstance(line, str) else line))
    with pytest.raises(UserError) as error:
        data.read_examples(path)
    said = str(error.value)
    assert said.startswith(f"{path}, line 3: ") and problem in said and len(said.splitlines()) == 1
