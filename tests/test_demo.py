# SPDX-License-Identifier: Apache-2.0
"""The demo: a corpus as question-answer lines, and the run on a .gguf that Trainer takes."""

import importlib.util
import json
import sys

import demo
import pytest
import tiny_chat

from fastlora.commands import models

INSTALLED = all(map(importlib.util.find_spec, (demo.MODEL, demo.CORPUS, "gguf", "yaml")))


@pytest.mark.skipif(not INSTALLED, reason="the demo's model and corpus are not installed")
def test_the_demo_fine_tunes_the_installed_model(tmp_path, monkeypatch, capsys):
    """Of a .gguf that transformers reads into dense weights, which it may mark as quantised."""
    (tmp_path / "talk.yml").write_text(
        "conversations:\n- [Hello, Hi there., Bye]\n- [Hello, Hi there.]\n- ['Is it 4?', 4]\n"
        f"- [Write a program, {'x' * 121}]\n"
    )
    pairs = [("Hello", "Hi there."), ("Is it 4?", "4")]  # each conversation's first two turns
    assert demo.corpus_pairs(tmp_path) == [{"prompt": q, "response": a} for q, a in pairs]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "ANSWER_TOKENS", 3)
    small = "--steps 1 --batch-size 1 --held-out 0.001 --target-modules q_proj v_proj"
    monkeypatch.setattr(sys, "argv", ["demo", *small.split()])
    assert demo.main() == 0
    lines = (demo.OUTPUT / "data.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) > 600 and all(row["prompt"] and row["response"] for row in rows)
    said = capsys.readouterr().out
    assert "60 of 60 LoRA layers fused" in said and "its outputs differ by at most 0\n" in said
    assert tiny_chat.numbers(demo.OUTPUT)["answer_before"] == "I'm sorry…"


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(demo, "MODEL", "no_such_package")
    assert demo.main() == 2
    assert "no_such_package is not installed" in capsys.readouterr().err
