# SPDX-License-Identifier: Apache-2.0
"""The `library` implementation launches what it says: few kernels, whatever the adapters' dtype."""

from __future__ import annotations

import aot
import pytest
import torch
from recorder import recording
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.operator import library, steps
from fastlora.operator.operands import Operands

FREE = {"aten::view", "aten::t", "aten::slice", "aten::empty", "aten::new_empty", "aten::detach"}
FREE |= {"aten::as_strided", "aten::empty_strided", "aten::transpose", "aten::promote_types"}


class Launches(TorchDispatchMode):
    """The kernels that PyTorch's own operations would launch, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launched(call):
    with recording(aot.CHIPS[90]) as recorded, Launches() as others:
        result = call()
    return [c.kernel.__name__ for c in recorded], others.names, result


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("sizes", [(512,), (512, 256, 256)], ids=["one", "three"])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_float32_adapters_take_one_launch_for_each_low_rank_product(base, sizes, p):
    """Enough elements that products without our kernels would split the factors into terms."""
    M, K, R, n = 1024, 384, 16, len(sizes)
    seed = torch.ones(1, dtype=torch.int64) if p else None
    x, dys = torch.randn(M, K).to(base), [torch.randn(M, size).to(base) for size in sizes]
    weights = [torch.randn(size, K).to(base) for size in sizes]
    factors = [(torch.randn(R, K), torch.randn(size, R)) for size in sizes]
    rest = None, seed, 2.0, p
    projections = [Operands(w, *ab, *rest) for w, ab in zip(weights, factors, strict=True)]
    ours, others, (_, ss) = launched(lambda: steps.forward(library, x, projections))
    assert ours == ["shrink_kernel", "outputs_kernel"]
    assert others == ["aten::addmm_"] * n
    backward = library, dys, x, projections, ss, True, [(True, True)] * n
    ours, others, _ = launched(lambda: steps.backward(*backward))
    assert ours.count("input_grad_kernel") == 1
    assert len(ours) == n + 1 + 2 + 1  # ds and db of each and their sums, da of all and its sums
    assert others == ["aten::addmm_"] * n
