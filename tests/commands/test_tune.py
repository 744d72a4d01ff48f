# SPDX-License-Identifier: Apache-2.0
"""`fastlora tune` and `fastlora info`: what they measure, say and refuse."""

from importlib.util import find_spec

import pytest
from measuring import CPU, PROBLEM, timings
from tiny_models import llama

from fastlora.__main__ import main
from fastlora.operator import measured, plans, tuning

pytestmark = pytest.mark.usefixtures("empty_cache")


def run_tune(*options):
    return main(["tune", *options, "--seconds", "0.001", "--tokens", "16", "--r", "4"])


def test_the_command_measures_shapes(capsys):
    assert run_tune("--shapes", "48x32", "--dropout", "off") == 0
    printed = capsys.readouterr().out
    problem = PROBLEM._replace(M=16)
    assert f"{problem}, on cpu\n  forward   blocks    measured on this machine: " in printed
    assert f"kept in {measured.path_of(CPU)}" in printed
    assert "\n4 bits made dense, 48 x 32: library " in printed or not find_spec("bitsandbytes")
    assert measured.find(problem, CPU) is not None


Q, K, GATE, DOWN = (16, 16, ()), (8, 16, ()), (24, 16, ()), (16, 24, ())
QKV, GATE_UP = (16, 16, ((8, 16), (8, 16))), (24, 16, ((24, 16),))
MODELS = [
    ("all-linear", {Q, K, GATE, DOWN, QKV, GATE_UP}),
    # Names as in finetune's model; v is frozen.
    (r"model\.layers\.\d+\.self_attn\.[qk]_proj", {Q, K, (16, 16, ((8, 16), (8, 0)))}),
]


@pytest.mark.parametrize(("targets", "expected"), MODELS)
def test_a_models_weights_are_measured_alone_and_with_those_that_read_the_same(
    targets, expected, monkeypatch, tmp_path
):
    llama().config.save_pretrained(tmp_path)
    known = []
    monkeypatch.setattr(tuning, "_measure", lambda problem, *_: known.append(problem) or timings())
    assert run_tune("--model", str(tmp_path), "--target-modules", targets) == 0
    assert {(p.N, p.K, p.others) for p in known} == expected
    assert len(known) == 2 * len(expected)  # with dropout and without
    assert {(p.M, p.R, p.dtype, p.adapter) for p in known} == {(16, 16, *PROBLEM[4:6])}


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "give either --model or --shapes"),
        (["--model", "a", "--shapes", "8x8"], "give either --model or --shapes"),
        (["--shapes", "48"], "--shapes takes NxK, such as 14336x4096, got '48'"),
        (["--shapes", "8x8", "--r", "0"], "argument --r: must be at least 1, got 0"),
        (["--shapes", "8x8", "--seconds", "0"], "argument --seconds: must be above 0, got 0"),
        (["--shapes", "8x8", "--adapter-dtype", "fp16"], "--adapter-dtype must be bf16 or fp32"),
        (["--shapes", "8x8", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--model", "no/such/folder"], "--model no/such/folder cannot be read"),
        (["--model", "FOLDER"], "--model FOLDER cannot be read"),
        (["--model", "GGUF"], "--model GGUF cannot be read"),
    ],
)
def test_the_command_names_what_is_wrong(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    folders = {"FOLDER": str(tmp_path), "GGUF": str(tmp_path / "gguf")}
    assert main(["tune", *(folders.get(option, option) for option in options)]) == 2
    for name, folder in folders.items():
        message = message.replace(name, folder)
    assert f"error: {message}" in capsys.readouterr().err


def test_where_there_is_nothing_to_choose_or_measure(capsys, monkeypatch):
    monkeypatch.setattr(tuning, "_measure", lambda *_: None)
    assert run_tune("--shapes", "48x32") == 2
    assert "nothing could be measured on cpu" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(plans, "triton_unusable", lambda device: "no GPU.")
        assert run_tune("--shapes", "48x32") == 0
        said = capsys.readouterr().out
        assert said == "nothing to choose on cpu: only 'blocks' runs there. no GPU.\n"
    monkeypatch.setattr(plans, "FORCED", "reference")
    assert run_tune("--shapes", "48x32") == 2
    assert "FASTLORA_IMPL=reference leaves nothing to choose" in capsys.readouterr().err


def test_what_is_chosen_is_said_even_where_it_is_not_kept(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tuning, "_measure", lambda *_: timings())
    with pytest.warns(UserWarning, match="cannot be kept in"):
        assert run_tune("--shapes", "48x32", "--dropout", "both") == 0
    printed = capsys.readouterr().out
    chosen = "triton    measured on this machine: triton 1 ms, library 2 ms, blocks 3 ms"
    assert printed.count(chosen) == 4
    assert "not kept: it held for this process only" in printed


def test_info_ends_in_ok(capsys):
    """Without the interpreter as well: test_package.py asks an installation."""
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "OK" and "impl='auto' takes blocks" in out
    for impl in ("blocks", "library", "triton", "auto"):
        assert f"{impl} on cpu, bfloat16: forward and backward right" in out


def test_info_says_what_failed(monkeypatch, capsys):
    from fastlora.operator import blocks

    def wrong(*args):
        dx, das = right(*args)
        return -dx, das

    right = blocks.input_grad_and_da
    monkeypatch.setattr(blocks, "input_grad_and_da", wrong)
    assert main(["info"]) == 1
    out = capsys.readouterr().out
    assert "blocks on cpu, float32: forward and backward WRONG" in out and "FAILED" in out


@pytest.mark.parametrize(("value", "said"), [("nonsense", "must be one of"), ("triton", "usable")])
def test_info_refuses_what_layers_refuse(value, said, monkeypatch, capsys):
    monkeypatch.setattr(plans, "FORCED", value)
    monkeypatch.setattr(plans, "triton_unusable", lambda device: "for a reason")
    assert main(["info"]) == (1 if value == "nonsense" else 0)
    assert said in capsys.readouterr().out.splitlines()[-2]
