# SPDX-License-Identifier: Apache-2.0
"""The code blocks of the documents run as they stand."""

import re
from pathlib import Path

import peft
import tiny_models as tiny
import torch
from torch import nn

import fastlora

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(document, language="python"):
    text = (ROOT / document).read_text()
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


def given():
    """What a reader has before the first line."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 24)
    return {
        "model": tiny.llama(hidden_size=32),
        "linear": linear,
        "x": torch.randn(5, 16),
        "weight": linear.weight.detach(),
        "bias": linear.bias.detach(),
        "lora_A": torch.randn(4, 16, requires_grad=True),
        "lora_B": torch.randn(24, 4, requires_grad=True),
    }


def test_under_peft(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = given() | {"get_peft_model": peft.get_peft_model}
    names["LoraConfig"] = lambda _: peft.LoraConfig(target_modules="all-linear")
    exec(blocks("README.md")[0], names)
    assert capsys.readouterr().out.startswith("14 of 14 LoRA layers fused")
    (table,) = re.findall(r"^\| to \| write \|\n(.*?)\n\n", README, re.DOTALL | re.MULTILINE)
    words = set(re.findall(r"(model|fastlora)\.(\w+)\(", table))
    assert len(words) > 8 and all(hasattr(names[of], word) for of, word in words)
    names = given()
    patch, registered, mixed = blocks("docs/peft.md")
    exec(patch, names)
    assert [capsys.readouterr().out] == blocks("docs/peft.md", "")
    table = (ROOT / "docs/peft.md").read_text().partition("| PEFT's call |")[2]
    save, load, load_second = re.findall(r"\| `([^`]*)` \|\n", table)
    fastlora.save_adapter(names["model"], "other")
    exec(save, names)
    names["model"] = given()["model"]
    exec(f"{load}\n{load_second}", names)
    assert names["model"].peft_config.keys() == {"default", "second"}
    exec(f"from peft import LoraConfig, get_peft_model\n{registered}", names)
    again = names["get_peft_model"](given()["model"], names["config"])
    assert len(fastlora.patch_peft(again).fused) == 4
    ids = torch.arange(20).view(4, 5)
    again = peft.get_peft_model(given()["model"], names["config"], adapter_name="support")
    again.add_adapter("sales", names["config"])
    exec(mixed, {"fastlora": fastlora, "model": again, "input_ids": ids, "labels": ids})
    assert all(p.grad is not None for p in again.parameters() if p.requires_grad)


def test_layers_and_the_operator(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = given()
    for block in ("import fastlora, torch", *blocks("README.md")[1:]):
        exec(block, names)
    assert str(names["report"]).startswith("4 of 4 LoRA layers fused")
    trained = {n for n, p in names["model"].named_parameters() if p.requires_grad}
    assert trained == torch.load("my-adapter.pt").keys() and len(trained) == 8
    assert names["layer"].weight is names["linear"].weight and names["y"].shape == (5, 24)
    names["y"].sum().backward()
    assert names["lora_A"].grad.shape == (4, 16)


def test_shared_inputs(capsys):
    exec(blocks("docs/siblings.md")[0], given())
    assert [capsys.readouterr().out] == blocks("docs/siblings.md", "")


def test_experts(capsys):
    sizes = {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 4}
    exec(blocks("docs/experts.md")[0], {"model": tiny.decoder("Qwen3Moe", **sizes)})
    assert [capsys.readouterr().out] == blocks("docs/experts.md", "")


def test_the_kernels_alone():
    names = {k: v for k, v in given().items() if k in ("x", "bias")}
    names |= {"w": torch.randn(24, 16), "a": torch.randn(4, 16), "b": torch.randn(24, 4)}
    names["dy"] = torch.randn(5, 24)
    for block in blocks("kernels/README.md"):
        exec(block, names)
    found = names["dx"], *names["das"], *names["dbs"]
    assert [t.shape for t in found] == [(5, 16), (4, 16), (24, 4)]


def test_what_is_named_exists():
    """Targets of the Makefile, and files that are named with their folder."""
    documents = ["README.md", "CONTRIBUTING.md", "kernels/README.md", "examples/README.md"]
    documents += [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
    text = "\n".join((ROOT / name).read_text() for name in documents)
    targets = set(re.findall(r"(?m)(?:^|`)make ([a-z]+)", text))
    assert {"demo", "test", "gpu"} <= targets
    assert targets <= set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text()))
    paths = set(re.findall(r"(?:tests|docs|kernels|benchmarks)/[\w/]+\.\w+", text))
    assert "docs/loss_curve.png" in paths
    installed = re.findall(r"pip install +['\"]?([\w-]+)", text)
    assert installed and "fastlora" not in installed  # that one is somebody else's
    assert [path for path in paths if not (ROOT / path).exists()] == []
