# SPDX-License-Identifier: Apache-2.0
"""The demo's data: the corpus as question-answer lines."""

from __future__ import annotations

import json

import pytest

from fastlora.commands import demo

pytest.importorskip("yaml", reason="PyYAML is not installed")


def test_each_conversations_first_two_turns_become_a_pair(tmp_path):
    (tmp_path / "talk.yml").write_text(
        "conversations:\n- [Hello, Hi there., Bye]\n- [Hello, Hi there.]\n- ['Is it 4?', 4]\n"
        f"- [Write a program, {'x' * 121}]\n"
    )
    assert demo.corpus_pairs(tmp_path) == [("Hello", "Hi there."), ("Is it 4?", "4")]


def test_the_installed_corpus_becomes_jsonl(tmp_path):
    pytest.importorskip("chatterbot_corpus", reason="chatterbot-corpus is not installed")
    path = tmp_path / "made" / "data.jsonl"
    count = demo.write_data(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == count > 600
    assert all(row.keys() == {"prompt", "response"} for row in rows)
    assert all(row["prompt"] and row["response"] for row in rows)


def test_a_missing_package_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "MODEL", "no_such_package")
    assert demo.main() == 2
    assert "no_such_package is not installed" in capsys.readouterr().err
