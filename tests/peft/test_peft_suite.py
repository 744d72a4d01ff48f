# SPDX-License-Identifier: Apache-2.0
"""PEFT's own tests, with every LoRA linear fused: nobody can tell, but for the calls counted.

In the process that runs them this file is a plugin of pytest. It keeps the cases of LoRA on
multi-layer perceptrons, embeddings and convolutions, and of several and mixed adapters; and those
of experts' weights, on models of the same classes with random weights.
"""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import peft
import pytest
import tiny_models as tiny
from peft.tuners.lora.model import LoraModel
from transformers import AutoModelForCausalLM

from fastlora.layers import experts
from fastlora.peft import linear as peft_layer

SOURCE = Path(sys.prefix) / "peft-source" / f"peft-{peft.__version__}.tar.gz"
COMMON = ("testing_common.py", "testing_utils.py")
# By file, calls of linear layers, those of them with DoRA, and calls of experts, with adapters that
# are neither merged nor disabled; and tests that pass.
FUSED = {
    "0.21.2": {
        "test_custom_models.py": (1157, 384, 0, 1870),
        "test_lora_variants.py": (2, 2, 0, 2),
        "test_target_parameters.py": (930, 0, 1784, 230),
    }
}
# Tests that count what PEFT folds into weights.
FOLDING = re.compile("multiple_parameters_on_same_module|result_caching_works|under_autocast")
# Tests of DoRA without such parameters; others load models that are not here.
DORA = re.compile(r"dora_adapters|lora_(with|and)_dora|dora_(params|unmerge)")
# Parameters of 12 kinds times 331 models: PEFT's casts at loading, which no forward sees.
SLOW = ("test_adapter_dtype_autocast",)
MODELS = ("MLP", "Emb", "Conv")
SEVERAL = ("TestMultipleActiveAdapters", "TestMixedAdapterBatches", "TestRequiresGrad")
calls = {"fused": 0, "dora": 0, "experts": 0, "own": 0}


@pytest.mark.parametrize("file", FUSED["0.21.2"])
def test_peft_s_own_tests(tmp_path, file):
    if not SOURCE.exists():
        pytest.skip(f"PEFT's source distribution is not in {SOURCE.parent}; `make test` fetches it")
    if peft.__version__ not in FUSED:
        pytest.skip(f"how many calls are fused is not known for PEFT {peft.__version__}")
    folder = tmp_path / "peft_tests"
    folder.mkdir()
    (folder / "__init__.py").touch()
    with tarfile.open(SOURCE) as archive:
        for name in (file, *COMMON):
            member = archive.extractfile(f"peft-{peft.__version__}/tests/{name}")
            (folder / name).write_bytes(member.read())
    here = Path(__file__).parent
    paths = [str(tmp_path), str(here), str(here.parent / "tools"), os.environ.get("PYTHONPATH", "")]
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    options = ["-q", "-W", "ignore", "-p", "test_peft_suite", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(folder / file)]
    run = subprocess.run(
        command, cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-1000:]
    *counts, passed = FUSED[peft.__version__][file]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > passed
    assert "calls: {} fused ({} of DoRA), {} of experts, 0 unpatched".format(*counts) in run.stdout


def pytest_configure(config):
    """Have every LoRA linear that PEFT makes fused, and count."""
    made = LoraModel._create_new_module
    fused, own = peft_layer.lora_sum, peft_layer.lora.Linear.forward
    of_experts, pretrained = experts._experts, AutoModelForCausalLM.from_pretrained

    def new_layer(lora_config, adapter_name, target, **kwargs):
        return peft_layer.fuse(made(lora_config, adapter_name, target, **kwargs))

    def counted(x, weight, bias, adapters):
        calls["fused"] += 1
        calls["dora"] += any(magnitude is not None for *_, magnitude in adapters)
        return fused(x, weight, bias, adapters)

    def own_forward(self, *args, **kwargs):
        calls["own"] += type(self) is not peft_layer.FusedLinear
        return own(self, *args, **kwargs)

    def experts_counted(*args):
        calls["experts"] += 1
        return of_experts(*args)

    def from_pretrained(cls, name, *args, **kwargs):
        kind = re.search(r"tiny-(?:random-)?(\w+)ForCausalLM$", str(name))
        if kind is None:
            return pretrained(name, *args, **kwargs)
        model = tiny.experts(kind[1]) if kind[1] in tiny.EXPERTS else tiny.decoder(kind[1])
        model.name_or_path = model.config._name_or_path = name
        return model

    experts._experts = experts_counted
    AutoModelForCausalLM.from_pretrained = classmethod(from_pretrained)
    LoraModel._create_new_module = staticmethod(new_layer)
    peft_layer.lora_sum = counted
    peft_layer.lora.Linear.forward = own_forward


def pytest_collection_modifyitems(config, items):
    chosen = [item for item in items if _is_lora(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def _is_lora(item):
    given = getattr(item, "callspec", None)
    if item.path.name == "test_target_parameters.py":
        return not FOLDING.search(item.originalname)
    if DORA.search(item.originalname):
        return True
    if item.originalname in SLOW or given is None:
        return False
    values = list(given.params.values())
    kinds = {v if isinstance(v, type) else type(v) for v in values}
    kinds = {kind for kind in kinds if issubclass(kind, peft.PeftConfig)}
    models = [v for v in values if isinstance(v, str) and v.startswith(MODELS)]
    return kinds == {peft.LoraConfig} and bool(models or item.cls.__name__ in SEVERAL)


def pytest_terminal_summary(terminalreporter):
    counts = "calls: {fused} fused ({dora} of DoRA), {experts} of experts, {own} unpatched"
    terminalreporter.write_line(counts.format(**calls))
