# SPDX-License-Identifier: Apache-2.0
"""What `lora_linear` refuses, in which words, and where it runs at all."""

import math

import pytest
import torch
from measuring import run_python
from test_operator import arguments, formula

import fastlora

ones = torch.ones
SPARSE = "must be dense, got a tensor of layout torch.sparse_coo"
# What is given, its value, and how the error begins after its name.
WRONG_VALUES = [
    ("x", ones(()), "must have at least one dimension"),
    ("weight", ones(10, 9), "must be [N, 8] to match x (6, 8), got (10, 9)"),
    ("weight", ones(8), "must be 2-D, got shape (8,)"),
    ("weight", ones(10, 8, device="meta"), "is on meta, but x is on cpu"),
    ("lora_A", ones(3, 7), "must be [R, 8] to match x (6, 8) and weight (10, 8), got (3, 7)"),
    ("lora_A", ones(0, 8), "must have rank at least 1"),
    ("lora_B", ones(10, 4), "must be [10, 3]"),
    ("lora_B", ones(9, 3), "must be [10, 3]"),
    ("bias", ones(9), "must be [10]"),
    ("bias", ones(10, device="meta"), "is on meta"),
    ("scaling", ones(2), "must be a number or a 0-d tensor on cpu, got shape (2,)"),
    ("scaling", 1e39, "must be finite in float32, got 1e+39"),
    ("scaling", -(10**400), "must be finite in float32, got -1"),
    ("scaling", math.nan, "must be finite in float32, got nan"),
    ("dropout_p", 1.5, "must be between 0 and 1, got 1.5"),
    ("dropout_p", math.nan, "must be between 0 and 1, got nan"),
    ("impl", "cuda", "must be one of auto, triton"),
]
WRONG_TYPES = [
    ("x", ones(2, 8).long(), "must be float32, bfloat16, float16 or float64, got torch.i"),
    ("x", [1.0], "must be a Tensor, got list"),
    ("x", ones(6, 8).to_sparse(), SPARSE),
    ("weight", ones(10, 8).half(), "must have the dtype of x (torch.float32), got to"),
    ("weight", ones(10, 8).to_sparse(), SPARSE),
    ("lora_A", ones(3, 8).half(), "must have the dtype of x (torch.float32), got to"),
    ("lora_A", ones(3, 8).to_sparse(), SPARSE),
    ("lora_B", ones(10, 3).half(), "must have the dtype of lora_A (torch.float32)"),
    ("lora_B", ones(10, 3).to_sparse_csr(), SPARSE.replace("coo", "csr")),
    ("bias", ones(10).bfloat16(), "must have the dtype of x"),
    ("bias", [1.0], "must be a Tensor or None, got list"),
    ("scaling", "1", "must be a number or a 0-d tensor, got str"),
    ("scaling", True, "must be a number or a 0-d tensor, got bool"),
    ("scaling", 1j, "must be a number or a 0-d tensor, got complex"),
    ("scaling", torch.tensor(1j), "must be a real number, got a tensor of torch.complex64"),
    ("dropout_p", "a", "must be a number, got str"),
]


@pytest.mark.parametrize(("error", "wrong"), [(ValueError, WRONG_VALUES), (TypeError, WRONG_TYPES)])
def test_wrong_arguments(error, wrong):
    t = arguments()
    fastlora.lora_linear(**t)
    for name, value, said in wrong:
        with pytest.raises(error) as found:
            fastlora.lora_linear(**{**t, name: value})
        assert str(found.value).startswith(f"{name} {said}")


# Importing one of them raises ImportError.
LACKING = dict.fromkeys(("triton", "peft", "transformers", "matplotlib", "tqdm"))


@pytest.mark.parametrize(
    ("before", "said"),
    [("", "TRITON_INTERPRET=1"), (f"sys.modules |= {LACKING}", "Triton is not installed; pip")],
    ids=["not interpreted", "not installed"],
)
def test_where_triton_cannot_run_that_is_said(before, said):
    """Nothing else needs it, nor the extras."""
    if torch.cuda.is_available() and not before:
        pytest.skip("a GPU is here: the kernels run without the interpreter")
    code = f"""
import sys
{before}
import torch, fastlora
o = torch.ones(2, 2)
fastlora.LoRALinear(2, 3)(o).sum().backward()
try:
    fastlora.lora_linear(o, o, o, o, impl="triton")
except RuntimeError as error:
    print(error)
"""
    out = run_python(code, TRITON_INTERPRET="0")
    assert "impl='triton' cannot run on x.device 'cpu'" in out and said in out


def test_float64_runs_on_torch_and_not_on_triton():
    t = arguments(torch.float64)
    torch.testing.assert_close(fastlora.lora_linear(**t, impl="blocks"), formula(**t))
    with pytest.raises(TypeError, match="x is float64, which impl='triton' does not take"):
        fastlora.lora_linear(**t, impl="triton")
