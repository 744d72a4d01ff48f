# SPDX-License-Identifier: Apache-2.0
"""A program that uses every public name, for the type checker: `make lint` reads it."""

from pathlib import Path

import torch
from torch import Tensor, nn

import fastlora


def functions(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y: Tensor = fastlora.lora_linear(x, w, a, b, None, scaling=2.0, dropout_p=0.1, training=True)
    q = fastlora.Projection(w, a, b)
    k = fastlora.Projection(w, None, None, bias=None, scaling=torch.tensor(1.0), dropout_p=0.0)
    ys: list[Tensor] = fastlora.lora_linears(x, [q, k], impl="blocks")
    return y + ys[0]


def layers(linear: nn.Linear, x: Tensor) -> Tensor:
    layer: fastlora.LoRALinear = fastlora.LoRALinear.from_linear(linear, r=8, lora_alpha=16)
    layer.add_adapter("other", r=4, init_lora_weights="gaussian", adapter_dtype=torch.float32)
    layer.set_adapter(["default", "other"])
    layer.merge(safe=True)
    merged: bool = layer.merged
    layer.unmerge()
    layer.delete_adapter("other")
    delta: Tensor = layer.delta_weight("default")
    y: Tensor = layer(x)
    return y if merged else y + delta.sum()


def models(model: nn.Module, folder: Path) -> str:
    config = fastlora.LoRAConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.05)
    report: fastlora.InjectReport = fastlora.inject(model, config, "a", fuse_siblings=True)
    fastlora.set_adapter(model, "a")
    fastlora.save_adapter(model, folder, "a")
    loaded: fastlora.InjectReport = fastlora.load_adapter(model, str(folder), "b")
    fastlora.merge(model)
    fastlora.unmerge(model)
    with fastlora.disable_adapters(model):
        model(torch.ones(1))
    fastlora.delete_adapter(model, "b")
    return f"{report}{loaded}"


def peft(model: nn.Module) -> str:
    report: fastlora.PatchReport = fastlora.patch_peft(model, fuse_siblings=[("q_proj", "k_proj")])
    fastlora.unpatch_peft(model)
    explained: fastlora.Explanation = fastlora.explain(model, 512)
    return f"{report}{explained}"
