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
    layer.merge(safe=True)
    merged: bool = layer.merged
    layer.unmerge()
    delta: Tensor = layer.delta_weight() + layer.scaling * layer.lora_B @ layer.lora_A
    y: Tensor = layer(x)
    return y if merged else y + delta.sum()


def models(model: nn.Module, folder: Path) -> str:
    report: fastlora.PatchReport = fastlora.replace_linears(
        model, ["q_proj", "v_proj"], fuse_siblings=True, r=8, lora_dropout=0.05
    )
    fastlora.replace_linears(model, lambda name, module: "_proj" in name and len(name) < 9)
    state: dict[str, Tensor] = fastlora.lora_state_dict(model)
    fastlora.save_adapter(model, folder, "default")
    fastlora.load_adapter(model, str(folder), "b", is_trainable=True)
    patched: fastlora.PatchReport = fastlora.patch_peft(model, fuse_siblings=[("q", "k")])
    fastlora.unpatch_peft(model)
    explained: fastlora.Explanation = fastlora.explain(model, 512)
    return f"{report}{sorted(state)}{patched}{explained}"
