# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for PEFT's own tests: every LoRA linear that PEFT makes is fused, and counted.

It keeps the cases of LoRA on multi-layer perceptrons, embeddings and convolutions, and of several
and mixed adapters. Run by test_peft_suite.py, in a process of its own.
"""

from peft import LoraConfig, PeftConfig
from peft.tuners.lora.model import LoraModel

from fastlora.peft import linear as peft_layer

# Parameters of 12 kinds times 331 models: PEFT's casts at loading, which no forward sees.
SLOW = ("test_adapter_dtype_autocast",)
MODELS = ("MLP", "Emb", "Conv")
SEVERAL = ("TestMultipleActiveAdapters", "TestMixedAdapterBatches", "TestRequiresGrad")
calls = {"fused": 0, "own": 0}


def pytest_configure(config):
    made = LoraModel._create_new_module
    fused, own = peft_layer.lora_sum, peft_layer.lora.Linear.forward

    def new_layer(lora_config, adapter_name, target, **kwargs):
        layer = made(lora_config, adapter_name, target, **kwargs)
        peft_layer.fuse(layer)
        return layer

    def counted(*args):
        calls["fused"] += 1
        return fused(*args)

    def own_forward(self, *args, **kwargs):
        calls["own"] += type(self) is not peft_layer.FusedLinear
        return own(self, *args, **kwargs)

    LoraModel._create_new_module = staticmethod(new_layer)
    peft_layer.lora_sum = counted
    peft_layer.lora.Linear.forward = own_forward


def pytest_collection_modifyitems(config, items):
    chosen = [item for item in items if _is_lora(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def _is_lora(item):
    given = getattr(item, "callspec", None)
    if item.originalname in SLOW or given is None:
        return False
    values = list(given.params.values())
    kinds = {v if isinstance(v, type) else type(v) for v in values}
    kinds = {kind for kind in kinds if issubclass(kind, PeftConfig)}
    models = [v for v in values if isinstance(v, str) and v.startswith(MODELS)]
    return kinds == {LoraConfig} and bool(models or item.cls.__name__ in SEVERAL)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"calls: {calls['fused']} fused, {calls['own']} unpatched")
