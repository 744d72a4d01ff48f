# SPDX-License-Identifier: Apache-2.0
"""Under models that PEFT has wrapped: `patch_peft`, `unpatch_peft`, and `register` for new ones.

PEFT itself is imported when one of them is called.
"""

from __future__ import annotations

import re
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

from torch import nn

from fastlora import functional
from fastlora.layers import siblings
from fastlora.layers.classes import unwrapped
from fastlora.layers.report import PatchReport

if TYPE_CHECKING:
    from peft import LoraConfig

# The releases whose layers were tested: from the first to before the last.
TESTED = ((0, 19), (0, 22))


def patch_peft(
    model: nn.Module, *, fuse_siblings: siblings.How = False, expert_dropout: float | None = None
) -> PatchReport:
    """Give the LoRA layers that PEFT put into ``model`` the fused forward, in place.

    Nothing else changes: parameters, keys, merging, saving and every call of PEFT's stay as they
    were. Adapters that a ``PeftModel`` or ``PeftMixedModel`` gets later are picked up; new layers
    in models that are wrapped otherwise are not. What cannot be fused runs PEFT's own code and is
    listed with the reason; a second patch finds what has come and lists it all again.

    With ``fuse_siblings`` layers that are called with the same tensor, such as q, k and v, run as
    one operator (`lora_linears`), plain ``nn.Linear`` ones between them too. True finds them by a
    forward on a small input that models of transformers bring along; for others give an input (a
    tensor, or a mapping of keyword arguments) or children's names, in the order of their calls:
    ``[("q", "k", "v"), ("gate", "up")]``.

    Mixtures of experts whose weights are parameters (``target_parameters``) are fused without
    adding adapters to the weights. PEFT knows no dropout for them; ``expert_dropout`` is its
    probability, on the input of their low-rank paths in training. It stays until another is given.
    Raises ImportError without PEFT, RuntimeError for a release that was not tested, ValueError for
    a model that has no LoRA layer of PEFT's or is compiled, and ValueError or TypeError for a wrong
    ``fuse_siblings`` or ``expert_dropout``. The model is then as it was.
    """
    check_release()
    from peft.tuners.lora import LoraLayer, ParamWrapper

    from fastlora.peft.experts import name_of
    from fastlora.peft.linear import fuse, why_not

    if expert_dropout is not None:
        functional.check_dropout(expert_dropout, "expert_dropout")
    model = check_not_compiled(model)
    modules = model.named_modules()
    layers = {name_of(name, m): m for name, m in modules if isinstance(m, LoraLayer)}
    if not layers:
        cure = "patch_peft() comes after get_peft_model() or PeftModel.from_pretrained()"
        raise ValueError(f"{type(model).__name__} has no LoRA layer of PEFT's; {cure}")
    reasons = {name: why_not(layer) for name, layer in layers.items()}
    wrappers = [name for name, layer in layers.items() if isinstance(layer, ParamWrapper)]
    around = {layers[name]._modules["base_layer"]: name for name in wrappers}
    for name in wrappers:  # PEFT's code adds to weights that the one inside reads
        reasons[name] = reasons.get(around.get(layers[name])) or reasons[name]
    fused = [name for name, why in reasons.items() if why is None]
    report = PatchReport(fused, [(name, why) for name, why in reasons.items() if why is not None])
    groups = siblings.find(model, fuse_siblings, [layers[name] for name in fused])
    if not fused:  # before anything is changed, as a warning may be an error
        warnings.warn(f"patch_peft() fused nothing\n{report}", stacklevel=2)
    for module in model.modules():  # the layers, and the tuners that hold them
        fuse(module, expert_dropout)
    siblings.make(groups, report)
    return report


def unpatch_peft(model: nn.Module) -> None:
    """Give the layers of a model that `patch_peft` has changed their own classes again.

    A model that was not patched stays as it is. Where FSDP2 or a parametrization has since given a
    layer a class of its own, it gets the one that they would have given PEFT's.
    """
    check_release()
    siblings.separate(unwrapped(model))


def register(config: LoraConfig) -> LoraConfig:
    """Have ``get_peft_model(model, config)`` build fused layers from the start; return ``config``.

    For each ``nn.Linear`` and transformers ``Conv1D`` that the config selects. What is not a plain
    one, such as a quantised layer, is left to PEFT. The registration is not saved with the config.
    Raises as `patch_peft`, and TypeError for anything but PEFT's ``LoraConfig``.
    """
    peft = check_release()
    from transformers.pytorch_utils import Conv1D

    from fastlora.peft.linear import registered_layer

    if not isinstance(config, peft.LoraConfig):
        raise TypeError(f"config must be a peft.LoraConfig, got {type(config).__name__}")
    config._register_custom_module(dict.fromkeys((nn.Linear, Conv1D), registered_layer))
    return config


def check_release() -> ModuleType:
    """Return PEFT; raise where there is none, or one whose layers were not tested."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("PEFT is needed: pip install 'fastlora-kernels[peft]'") from error
    release = tuple(map(int, re.findall(r"\d+", peft.__version__)[:2]))
    if not TESTED[0] <= release < TESTED[1]:
        those = " up to before ".join(".".join(map(str, release)) for release in TESTED)
        what = f"PEFT {peft.__version__} was not tested with this fastlora"
        raise RuntimeError(f"{what}, whose fused layers stand in for those of {those}")
    return peft


def check_not_compiled(model: nn.Module) -> nn.Module:
    """Return the model inside of wrappers; raise ValueError where any of it is compiled."""
    plain = unwrapped(model)
    for part in (model, *plain.modules()):
        if "_orig_mod" in part._modules or part._compiled_call_impl is not None:
            kind = type(part).__name__
            raise ValueError(f"{kind} is compiled: patch the model first, then compile it")
    return plain
