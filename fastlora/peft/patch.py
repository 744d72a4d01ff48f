# SPDX-License-Identifier: Apache-2.0
"""Under models that PEFT has wrapped: `patch_peft`, `unpatch_peft`, and `register` for new ones.

PEFT itself is imported when one of them is called.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import nn

from fastlora.layers import siblings
from fastlora.layers.classes import rebased, unwrapped
from fastlora.layers.report import PatchReport
from fastlora.peft.require import check_not_compiled, check_release

if TYPE_CHECKING:
    from peft import LoraConfig


def patch_peft(model: nn.Module, *, fuse_siblings: siblings.How = False) -> PatchReport:
    """Give the LoRA layers that PEFT put into ``model`` the fused forward, in place.

    Nothing else changes: parameters, keys, merging, saving and every call of PEFT's stay as they
    were. Adapters that a ``PeftModel`` or ``PeftMixedModel`` gets later are picked up; new layers
    in models that are wrapped otherwise are not. What cannot be fused runs PEFT's own code and is
    listed with the reason; a second patch finds what has come and lists it all again.

    With ``fuse_siblings`` layers that are called with the same tensor, such as q, k and v, run as
    one operator (`lora_linears`); a plain ``nn.Linear`` between them takes part, by a class of its
    own. True finds them by a forward on the small input that models of transformers bring along;
    for other models give an example input (a tensor, or a mapping of keyword arguments), or the
    names of children in the order of their calls: ``[("q", "k", "v"), ("gate", "up")]``.
    Raises ImportError without PEFT and RuntimeError for a release that was not tested; ValueError
    for a model that has no LoRA layer of PEFT's or that has been compiled, and ValueError or
    TypeError for a wrong ``fuse_siblings``. The model is then as it was.
    """
    check_release()
    from peft.tuners.lora import LoraLayer

    from fastlora.peft.linear import STAND_INS, fuse, why_not

    model = check_not_compiled(model)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layer of PEFT's; patch_peft() comes after "
            "get_peft_model() or PeftModel.from_pretrained()"
        )
    reasons = [(name or "the layer", why_not(layer)) for name, layer in layers]
    report = PatchReport(
        [name for name, why in reasons if why is None],
        [(name, why) for name, why in reasons if why is not None],
    )
    groups = []
    if fuse_siblings is not False:
        fused = [layer for (_, layer), (_, why) in zip(layers, reasons, strict=True) if why is None]
        groups = siblings.find(model, fuse_siblings, fused)
    if not report.fused:  # before anything is changed, as a warning may be an error
        warnings.warn(f"patch_peft() fused nothing\n{report}", stacklevel=2)
    for _, layer in layers:
        fuse(layer)
    for module in model.modules():  # the tuners that hold them
        if type(module) in STAND_INS:
            module.__class__ = STAND_INS[type(module)]
    siblings.make(groups, report)
    return report


def unpatch_peft(model: nn.Module) -> None:
    """Give the layers of a model that `patch_peft` has changed their own classes again.

    A model that was not patched stays as it is. Where FSDP2 or a parametrization has since given a
    layer a class of its own, it gets the one that they would have given PEFT's.
    """
    check_release()
    from fastlora.peft.linear import STAND_INS

    model = unwrapped(model)
    kinds = {
        kind: rebased(kind, fused, own)
        for kind in {type(module) for module in model.modules()}
        for own, fused in STAND_INS.items()
        if issubclass(kind, fused)
    }
    siblings.separate(model)
    for module in model.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]


def register(config: LoraConfig) -> LoraConfig:
    """Have ``get_peft_model(model, config)`` build fused layers from the start; return ``config``.

    For each ``nn.Linear`` and transformers ``Conv1D`` that the config selects. What is not a plain
    one, such as a quantised layer, is left to PEFT. The registration is not saved with the config.
    Raises as `patch_peft`, and TypeError for anything but PEFT's ``LoraConfig``.
    """
    check_release()
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    from fastlora.peft.linear import registered_layer

    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a peft.LoraConfig, got {type(config).__name__}")
    config._register_custom_module(dict.fromkeys((nn.Linear, Conv1D), registered_layer))
    return config
