# SPDX-License-Identifier: Apache-2.0
"""The command line that fine-tunes: losses, files, going on after a kill, and refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import tiny_chat
import torch
import transformers

from fastlora.__main__ import main
from fastlora.commands import data, finetune, models, trainer

# A run in another process, or of a fixture of the module, is to give the same numbers.
pytestmark = pytest.mark.usefixtures("few")


@pytest.fixture(scope="module")
def run(tiny):
    """Run the command in this process, or return its words."""

    def words(output, *more, **changes):
        own = {"model": tiny.model, "data": tiny.data, "output": output, "steps": 60, "r": 4}
        own |= {"save-every": 8, "dropout": 0.1, "ask": "what is one plus two"} | changes
        return [*tiny_chat.command("finetune", **own), *more]

    def run(output, *more, **changes):
        return main(words(output, *more, **changes))

    run.words = words
    return run


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


def test_peft_loads_the_adapter_with_the_loss_that_was_measured(tiny, finished):
    model, tokenizer = models.load_model(str(tiny.model), torch.float32)
    model = peft.PeftModel.from_pretrained(model, finished / "adapter").eval()
    examples = data.split(data.read_examples(tiny.data), 0.1, seed=0, at_most=256)[1]
    total = count = 0
    for example in examples:
        rows = data.encode(tokenizer, example, 512)
        batch = {name: torch.tensor([row]) for name, row in rows.items()}
        with torch.no_grad():
            loss = model(**batch).loss.item()  # of transformers: the mean of what is labelled
        labelled = (batch["labels"][:, 1:] != data.IGNORED).sum().item()
        total, count = total + loss * labelled, count + labelled
    found = tiny_chat.numbers(finished)
    assert total / count == pytest.approx(found["held_out_after"], rel=1e-5)
    assert models.answer(model, tokenizer, "what is one plus two") == found["answer_after"]


def test_the_first_loss_is_that_of_the_batch(tiny, finished):
    """Without an adapter's part, which begins at zero."""
    model, tokenizer = models.load_model(str(tiny.model), torch.float32)
    examples = data.split(data.read_examples(tiny.data), 0.1, seed=0, at_most=256)[0]
    batch = [data.encode(tokenizer, examples[i], 512) for i in data.order(len(examples), 4, 0)]
    assert len({len(row["input_ids"]) for row in batch}) == 1
    batch = {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}
    loss = tiny_chat.numbers(finished)["losses"][0]
    assert loss == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_a_killed_run_goes_on_to_the_same_numbers(run, finished, tmp_path, capsys):
    words = run.words(tmp_path)
    command = [sys.executable, "-m", "fastlora", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    saved, deadline = tmp_path / "checkpoints" / "checkpoint-8", time.monotonic() + 120
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert saved.exists() and not (tmp_path / "metrics.json").exists()
    assert main(words) == 0
    assert tiny_chat.numbers(tmp_path) == tiny_chat.numbers(finished)
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "run.json").exists()


@pytest.fixture
def stopped(run, tmp_path, monkeypatch, capsys) -> Path:
    """The output of a run that Ctrl-C has stopped in its 22nd step."""
    whole = trainer.Trainer.compute_loss

    def compute_loss(self, *arguments, **options):
        if self.state.global_step == 21:
            raise KeyboardInterrupt
        return whole(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "compute_loss", compute_loss)
        assert run(tmp_path) == 130
    assert "checkpoint-16; the same command goes on from there" in capsys.readouterr().out
    return tmp_path


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


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_refused_until_restart(run, stopped, capsys, file):
    (stopped / "checkpoints" / "checkpoint-16" / file).write_bytes(b"half a file")
    assert run(stopped) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: .*checkpoint-16 is damaged: .*; --restart begins again", error)
    assert run(stopped, "--restart", steps=2) == 0
    assert len(tiny_chat.numbers(stopped)["losses"]) == 2


def test_other_settings_and_other_data_are_refused(run, stopped, capsys):
    assert run(stopped, lr=0.02, seed=3) == 2
    error = capsys.readouterr().err
    assert "run.json comes from other settings (" in error
    assert "seed: 0 there, 3 asked for" in error and "lr: 0.01 there, 0.02 asked for" in error
    data = stopped / "data"
    settings = finetune.Settings(model="a", data=str(data))
    data.write_text("one")
    before = settings.fingerprint(torch.device("cpu"))
    data.write_text("two")
    after = settings.fingerprint(torch.device("cpu"))
    assert [name for name in before if before[name] != after[name]] == ["data sha256"]


def test_a_finished_run_says_so_and_refuses_other_settings(run, finished, capsys):
    before = (finished / "metrics.json").stat().st_mtime_ns
    assert run(finished) == 0
    assert "holds this run already; --restart" in capsys.readouterr().out
    assert run(finished, lr=0.02) == 2
    assert "metrics.json comes from other settings (lr: 0.01 there" in capsys.readouterr().err
    assert (finished / "metrics.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("file", ["metrics.json", "run.json"])
@pytest.mark.parametrize("held", ["{", "[]", "{}"])
def test_damaged_files_are_refused(run, tmp_path, capsys, file, held):
    (tmp_path / file).write_text(held)
    assert run(tmp_path) == 2
    assert f"{file} is damaged; --restart begins again" in capsys.readouterr().err


def test_a_run_that_diverges_says_so(run, tmp_path, capsys):
    assert run(tmp_path, lr=1e30, steps=8) == 2
    error = capsys.readouterr().err
    assert re.search(r"error: the loss is nan at step \d: --lr 1e\+30 is too high; --rest", error)
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"batch-size": -1}, "--batch-size must be at least 1"),
        ({"held-out": 1.0}, "--held-out must be between 0 and 1"),
        ({"lr": "nan"}, "--lr must be above 0, got nan"),
        ({"dropout": 1}, "--dropout must be at least 0 and below 1"),
        ({"data": "nowhere.jsonl"}, "--data nowhere.jsonl: No such file"),
        ({"data": os.devnull}, "holds no examples"),
        ({"device": "abacus"}, "--device abacus cannot be used"),
        ({"model": "nowhere/at/all"}, "--model nowhere/at/all cannot be loaded"),
        ({"target-modules": "q_proy"}, "q_proy"),
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
    assert error == 'error: trl not installed: pip install "fastlora-kernels[finetune]"\n'


def test_a_hub_id_is_taken_from_the_cache(run, tiny, tmp_path):
    """As after a download: the hub's folders, and no network."""
    cached = tmp_path / "hub" / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123abc")
    shutil.copytree(tiny.model, cached / "snapshots" / "0123abc")
    words = run.words(tmp_path / "out", model="someone/tiny", steps=2)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "fastlora", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr and "tokens/s" in done.stderr
    assert len(tiny_chat.numbers(tmp_path / "out")["losses"]) == 2
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny"


def test_a_model_without_logits_to_keep_has_the_same_loss(tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.model)
    ids = torch.tensor([[4, 5, 6, 7], [7, 6, 5, 4]])
    labels = torch.tensor([[-100, 5, -100, 7], [-100, -100, -100, 4]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with_adapter = models.adapted(model, "all-linear")
    loss, count = models.response_loss(with_adapter, batch)
    assert count == 3
    torch.testing.assert_close(loss / count, with_adapter(**batch).loss)

    class Plain(type(model)):
        def forward(self, input_ids, **rest):
            return super().forward(input_ids, **rest)

    model.__class__ = Plain
    torch.testing.assert_close(models.response_loss(with_adapter, batch)[0], loss)
