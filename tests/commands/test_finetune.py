# SPDX-License-Identifier: Apache-2.0
"""The command line that fine-tunes: losses, files, going on after a kill, and refusals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import peft
import pytest
import tiny_chat
import torch
import transformers
import trl

from fastlora.__main__ import main
from fastlora.commands import data, models, trainer

# A run in another process, or of a fixture of the module, is to give the same numbers.
pytestmark = pytest.mark.usefixtures("few")


@pytest.fixture(scope="module")
def words(tiny):
    """Return the words of a run's command."""
    own = {"model": tiny.model, "data": tiny.data, "steps": 60, "r": 4, "save-every": 8}
    own |= {"dropout": 0.1, "ask": "what is one plus two"}
    return lambda output, **changes: tiny_chat.command(
        "finetune", **own | {"output": output} | changes
    )


@pytest.fixture(scope="module")
def run(words):
    return lambda output, *more, **changes: main([*words(output, **changes), *more])


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory) -> Path:
    """The output of one uninterrupted run, which other runs must equal."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert run(output) == 0
    return output


def test_a_run_learns_and_leaves_its_files(finished):
    found = tiny_chat.numbers(finished)
    assert found["held_out_after"] < 0.5 * found["held_out_before"]
    assert found["trainable"] == 2 * 4 * (64 + 48 + 48 + 64 + 3 * 96)
    assert len(found["losses"]) == len(found["gradient_norms"]) == 60
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    assert found["answer_before"] != found["answer_after"]
    names = ["adapter", "loss_curve.png", "metrics.json"]
    assert sorted(path.name for path in finished.iterdir()) == names
    config = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["r"] == 4
    assert (finished / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_learns(run, bits, tmp_path, capsys):
    """As bitsandbytes keeps it, fused, under float32 adapters that are the same once loaded."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    assert run(tmp_path / "run", f"--load-in-{bits}bit") == 0
    found, said = tiny_chat.numbers(tmp_path / "run"), capsys.readouterr().out
    assert found["held_out_after"] < 0.6 * found["held_out_before"]
    assert f"{bits} bits" in said and "14 of 14 LoRA layers fused" in said
    assert "loaded again, its outputs differ by at most 0\n" in said
    assert run(tmp_path / "both", "--load-in-4bit", "--load-in-8bit") == 2
    assert "exclude each other" in capsys.readouterr().err


def test_the_speed_is_that_of_all_steps_and_of_nothing_else(run, tmp_path, monkeypatch, capsys):
    spent, step, measure = [], trainer.Trainer.training_step, trainer.Trainer.measure

    def slow(*of):
        began, loss = time.monotonic(), time.sleep(0.5) or step(*of)
        spent.append(time.monotonic() - began)
        return loss

    monkeypatch.setattr(trainer.Trainer, "training_step", slow)
    monkeypatch.setattr(trainer.Trainer, "measure", lambda *of: time.sleep(2) or measure(*of))
    with tiny_chat.interrupted(4):
        assert run(tmp_path, steps=4, **{"save-every": 2}) == 130
    assert run(tmp_path, steps=4, **{"save-every": 2}) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 < found["seconds"] - sum(spent[:2] + spent[-2:]) < 2  # what is between was lost
    assert f" {found['tokens'] / found['seconds']:.0f} tokens/s" in capsys.readouterr().out


def test_peft_loads_the_adapter_with_the_loss_that_was_measured(tiny, finished):
    model, tokenizer = models.load_model(str(tiny.model), torch.float32)
    model = peft.PeftModel.from_pretrained(model, finished / "adapter").eval()
    total = count = 0
    for example in data.split(data.read_examples(tiny.data), 0.1, seed=0)[1]:
        talk = example["prompt"], example["prompt"] + example["completion"]
        asked, whole = (tokenizer.apply_chat_template(t, return_dict=False) for t in talk)
        start = len(asked) + 1  # behind "<assistant>"
        labels = torch.tensor([[-100] * start + whole[start:]])
        with torch.no_grad():  # of transformers: the mean of what is labelled
            loss = model(input_ids=torch.tensor([whole]), labels=labels).loss.item()
        total, count = total + loss * len(whole[start:]), count + len(whole[start:])
    found = tiny_chat.numbers(finished)
    assert total / count == pytest.approx(found["held_out_after"], rel=1e-5)
    assert models.answer(model, tokenizer, "what is one plus two") == found["answer_after"]


def test_a_killed_run_goes_on_to_the_same_numbers(words, finished, tmp_path):
    command = [sys.executable, "-m", "fastlora", *words(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    saved, deadline = tmp_path / "checkpoints" / "checkpoint-8", time.monotonic() + 120
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0].decode()
    assert "tokens/s" in said and "Warning" not in said
    assert saved.exists() and not (tmp_path / "metrics.json").exists()
    assert main(words(tmp_path)) == 0
    assert tiny_chat.numbers(tmp_path) == tiny_chat.numbers(finished)
    assert not (tmp_path / "checkpoints").exists()


@pytest.fixture
def stopped(run, tmp_path, capsys) -> Path:
    """The output of a run that Ctrl-C has stopped in its 22nd step."""
    with tiny_chat.interrupted(22):
        assert run(tmp_path) == 130
    assert "checkpoint-16 is kept, and the same command goes on" in capsys.readouterr().out
    return tmp_path


def test_what_fails_in_a_step_is_no_damaged_checkpoint(run, stopped, monkeypatch):
    """Nor a user's mistake: it is shown as it is."""
    for error in (RuntimeError("out of memory"), OSError("no source"), ImportError("of ours")):
        monkeypatch.setattr(trainer.Trainer, "training_step", Mock(side_effect=error))
        with pytest.raises(type(error), match=str(error)):
            run(stopped)


def test_prompts_that_are_too_long_leave_fewer_examples_than_a_step_has(run, tmp_path, capsys):
    own = tmp_path / "long.jsonl"
    prompts = ["what " * (20 if i < 10 else 1) + str(i) for i in range(16)]
    own.write_text("\n".join(json.dumps({"prompt": p, "response": "two"}) for p in prompts))
    small = {"data": own, "steps": 2, "seq-len": 16, "batch-size": 8}
    assert run(tmp_path / "out", **small) == 0
    assert "10 left out (prompt longer than --seq-len)" in capsys.readouterr().out


def test_a_tokenizer_without_a_token_for_padding_or_the_end(tiny, run, tmp_path):
    shutil.copytree(tiny.model, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"eos_token": None, "pad_token": None}
    path.write_text(json.dumps(config))
    (tmp_path / "data.jsonl").write_text('{"text": "one two"}\n{"text": "two three"}')
    for lines in (tiny.data, tmp_path / "data.jsonl"):
        assert run(tmp_path / lines.stem, model=tmp_path / "model", data=lines, steps=1) == 0


def test_ctrl_c_leaves_a_run_that_goes_on(run, finished, stopped, capsys):
    assert [path.name for path in stopped.glob("checkpoints/checkpoint*")] == ["checkpoint-16"]
    # Killed while it wrote the next one: the state comes last.
    half = stopped / "checkpoints" / "checkpoint-24"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step": 2')
    torch.manual_seed(123)
    assert run(stopped) == 0
    assert "resumed   after step 16 of 60" in capsys.readouterr().out
    assert tiny_chat.numbers(stopped) == tiny_chat.numbers(finished)


def test_a_run_that_is_stopped_at_its_end_makes_no_step_too_many(
    run, finished, tmp_path, monkeypatch
):
    def measure(self, when, own=trainer.Trainer.measure):
        if when == "after":
            raise KeyboardInterrupt
        return own(self, when)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "measure", measure)
        assert run(tmp_path, **{"save-every": 15}) == 130
    assert run(tmp_path, **{"save-every": 15}) == 0
    assert tiny_chat.numbers(tmp_path) == tiny_chat.numbers(finished)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_refused_until_restart(run, stopped, capsys, file):
    (stopped / "checkpoints" / "checkpoint-16" / file).write_bytes(b"half a file")
    assert run(stopped) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: cannot go on from .*checkpoint-16: .*; --restart begins again", error)
    assert run(stopped, "--restart", steps=2) == 0
    assert len(tiny_chat.numbers(stopped)["losses"]) == 2


def test_other_settings_and_other_data_are_refused(tiny, run, stopped, capsys):
    other = stopped / "data"
    other.write_text(tiny.data.read_text() + '{"prompt": "one", "response": "two"}')
    assert run(stopped, lr=0.02, seed=3, data=other) == 2
    error = capsys.readouterr().err
    assert "checkpoint-16 comes from other settings (" in error and "data sha256: " in error
    assert "seed: 0 there, 3 asked for" in error and "lr: 0.01 there, 0.02 asked for" in error


def test_a_finished_run_says_so_and_refuses_other_settings(run, finished, capsys):
    before = (finished / "metrics.json").stat().st_mtime_ns
    assert run(finished) == 0
    assert "holds this run already; --restart" in capsys.readouterr().out
    assert run(finished, lr=0.02) == 2
    assert "metrics.json comes from other settings (lr: 0.01 there" in capsys.readouterr().err
    assert (finished / "metrics.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("held", ["{", "[]", "{}"])
def test_a_damaged_file_is_refused(run, tmp_path, capsys, held):
    (tmp_path / "metrics.json").write_text(held)
    assert run(tmp_path) == 2
    assert "metrics.json is damaged; --restart begins again" in capsys.readouterr().err


def test_a_run_that_diverges_says_so(run, tmp_path, capsys):
    assert run(tmp_path, lr=1e30, steps=8) == 2
    error = capsys.readouterr().err
    assert re.search(r"error: the loss is nan at step \d: --lr 1e\+30 is too high; --rest", error)
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"steps": 0}, "argument --steps: must be at least 1, got 0"),
        ({"batch-size": "two"}, "argument --batch-size: invalid int value: 'two'"),
        ({"held-out": 1.0}, "argument --held-out: must be above 0 and below 1, got 1.0"),
        ({"dropout": 1}, "argument --dropout: must be at least 0 and below 1, got 1"),
        ({"lr": "nan"}, "argument --lr: must be above 0, got nan"),
        ({"data": "nowhere.jsonl"}, "--data nowhere.jsonl: No such file or directory"),
        ({"data": os.devnull}, "holds no examples"),
        ({"device": "abacus"}, "--device abacus cannot be used"),
        ({"model": "nowhere/at/all"}, "--model nowhere/at/all cannot be loaded"),
        ({"target-modules": "q_proy"}, "--target-modules: Target modules {'q_proy'} not found"),
        ({"target-modules": "(q"}, "--target-modules: "),
        ({"seq-len": 3}, "--seq-len 3 leaves no token of any response"),
        ({"output": "/dev/null/out"}, "--output /dev/null/out cannot be made: Not a directory"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(run, tmp_path, capsys, change, problem):
    assert run(change.pop("output", tmp_path / "out"), **change) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and problem in error and len(error.splitlines()) == 1


def test_a_missing_dependency_says_what_to_install(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    assert run(tmp_path) == 2
    error = capsys.readouterr().err
    assert re.match(r'error: .*\btrl\b.*: pip install "fastlora-kernels\[finetune\]"\n$', error)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trl", trl)
        load = Mock(side_effect=ImportError("needs gguf"))
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
        assert run(tmp_path) == 2
        assert "/model cannot be loaded: needs gguf" in capsys.readouterr().err
    # Of the package itself nothing can be missing but by its own fault.
    monkeypatch.setitem(sys.modules, "fastlora.commands.trainer", None)
    monkeypatch.delitem(sys.modules, "trl")
    with pytest.raises(ModuleNotFoundError, match=r"fastlora\.commands\.trainer"):
        run(tmp_path)


def test_a_hub_id_is_taken_from_the_cache(words, tiny, tmp_path):
    """As after a download: the hub's folders, and no network."""
    cached = tmp_path / "hub" / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123abc")
    shutil.copytree(tiny.model, cached / "snapshots" / "0123abc")
    command = [sys.executable, "-m", "fastlora"]
    command += words(tmp_path / "out", model="someone/tiny", steps=2)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr and "tokens/s" in done.stderr
    assert len(tiny_chat.numbers(tmp_path / "out")["losses"]) == 2
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny"


def test_a_model_without_logits_to_keep_has_the_same_losses(run, tmp_path, monkeypatch):
    kind = transformers.LlamaForCausalLM
    own = kind.forward

    def forward(self, input_ids=None, **rest):
        return own(self, input_ids, **rest)

    assert run(tmp_path / "with", steps=3) == 0
    monkeypatch.setattr(kind, "forward", forward)
    assert run(tmp_path / "without", steps=3) == 0
    found = [tiny_chat.numbers(tmp_path / name) for name in ("with", "without")]
    for name in ("losses", "gradient_norms", "held_out_after"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-4), name
